"""Judge: whether a step's updates are made with its gradients as they are, scaled down, or not at all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lsp_ray.device.unit import Unit
from lsp_ray.errors import NonFiniteGradientError, NonFiniteLossError

NORM_EPS = 1e-6  # torch.nn.utils.clip_grad_norm_'s


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The norm of all of a step's gradients as they are sent, and their factor: 1, less to clip them, 0 to skip it."""

    grad_norm: float
    grad_scale: float


class Judge:
    """Collects the norms of a step's gradients on the compute stream and judges once all are there.

    The numbers depend on the units' order alone, not on that in which their gradients come.

    Args:
        units: The trained layers, shallowest first.
        max_grad_norm: Bound of the global norm; 0 is none.
        skips: Whether a step that is not finite is skipped, else it is an error.
    """

    def __init__(self, units: Sequence[Unit], *, max_grad_norm: float = 0.0, skips: bool = False) -> None:
        self._units, self._max_grad_norm, self._skips = units, max_grad_norm, skips
        self._norms: dict[int, torch.Tensor] = {}
        self._is_lost = False

    def accepts(self, step: int, loss: float, learning_rate: float) -> bool:
        """Whether the backward of a micro-batch with this loss may run; once it may not, the step is skipped.

        Raises:
            NonFiniteLossError: The loss is NaN or infinite, and nothing is skipped.
        """
        if math.isfinite(loss):
            return True
        if not self._skips:
            raise NonFiniteLossError(f"loss of step {step} is {loss}; learning_rate was {learning_rate:g} there")
        self._is_lost = True
        return False

    def see(self, unit: Unit) -> None:
        """Note the norm of a unit's complete gradients, before they are taken from their leaves."""
        gradients = [target.leaf.grad.detach() for target in unit.targets if target.leaf.grad is not None]
        if gradients:
            norms = torch._foreach_norm(gradients, 2, torch.float32)  # on a GPU few kernels, however many gradients
            self._norms[unit.index] = torch.linalg.vector_norm(torch.stack(norms).double())

    def verdict(self, step: int) -> Verdict:
        """Judge the step whose gradients were seen, and forget them; waits for the device.

        scale = min(1, max_grad_norm / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_ has it.

        Raises:
            NonFiniteGradientError: The norm of a layer's gradients is NaN or infinite, and nothing is skipped; names
                the layer at which the backward met it first.
        """
        seen = [unit for unit in self._units if unit.index in self._norms]
        norms = torch.stack([self._norms[unit.index] for unit in seen]).tolist() if seen else []
        is_lost, self._norms, self._is_lost = self._is_lost, {}, False
        grad_norm = math.hypot(*norms)
        for unit, norm in zip(reversed(seen), reversed(norms), strict=True):
            if math.isfinite(norm):
                continue
            if not self._skips:
                raise NonFiniteGradientError(
                    f"the gradient of layer {unit.name} in step {step} is not finite (its norm is {norm}); it is the "
                    "first such layer of the backward"
                )
            is_lost = True
        if is_lost:
            return Verdict(grad_norm=grad_norm, grad_scale=0.0)
        bound = self._max_grad_norm or math.inf
        return Verdict(grad_norm=grad_norm, grad_scale=min(1.0, bound / (grad_norm + NORM_EPS)))
