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
    """A step's loss, the norm of its gradients as they are sent, their factor: 1, less to clip them, 0 to skip it."""

    loss: float
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
        self._norms: dict[int, Sequence[torch.Tensor]] = {}
        self._losses: list[torch.Tensor] = []

    def weigh(self, loss: torch.Tensor) -> torch.Tensor:
        """Note a micro-batch's share of the loss; return what its backward begins with, without waiting for it.

        1, or NaN where the loss is not finite: no gradient of such a loss may pass for one.
        """
        loss = loss.detach()
        self._losses.append(loss)
        return torch.where(torch.isfinite(loss), 1.0, math.nan)

    def see(self, unit: Unit, gradients: Sequence[torch.Tensor]) -> None:
        """Note the norms of a unit's complete gradients, in as many parts as they come."""
        if len(gradients) == 1:
            self._norms[unit.index] = [torch.linalg.vector_norm(gradients[0], dtype=torch.float32)]
        elif gradients:
            # on a GPU three kernels for all of them
            self._norms[unit.index] = torch._foreach_norm(list(gradients), 2, torch.float32)

    def verdict(self, step: int, learning_rate: float) -> Verdict:
        """Judge the step whose losses and gradients were noted, and forget them; waits for the device.

        scale = min(1, max_grad_norm / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_ has it.

        Raises:
            NonFiniteLossError: The loss is NaN or infinite, and nothing is skipped.
            NonFiniteGradientError: The norm of a layer's gradients is NaN or infinite, and nothing is skipped; names
                the layer at which the backward met it first.
        """
        seen = [unit for unit in self._units if unit.index in self._norms]
        noted = [*self._losses, *(norm for unit in seen for norm in self._norms[unit.index])]
        numbers = iter(torch.stack(noted).tolist() if noted else [])
        losses = [next(numbers) for _ in self._losses]
        norms = [math.hypot(*(next(numbers) for _ in self._norms[unit.index])) for unit in seen]
        self._losses, self._norms = [], {}
        loss, grad_norm = sum(losses), math.hypot(*norms)
        is_lost = not math.isfinite(loss)
        if is_lost and not self._skips:
            raise NonFiniteLossError(f"loss of step {step} is {loss}; learning_rate was {learning_rate:g} there")
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
            return Verdict(loss=loss, grad_norm=grad_norm, grad_scale=0.0)
        bound = self._max_grad_norm or math.inf
        return Verdict(loss=loss, grad_norm=grad_norm, grad_scale=min(1.0, bound / (grad_norm + NORM_EPS)))
