"""Judge: whether a step's updates are made with its gradients as they are, scaled down, or not at all."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from lsp_ray.device.unit import Unit
from lsp_ray.errors import NonFiniteGradientError, NonFiniteLossError

NORM_EPS = 1e-6  # torch.nn.utils.clip_grad_norm_'s


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A step's losses, the norm of its gradients as they are sent, their factor: 1, less to clip them, 0 to skip it.

    `losses` are by part of the step. Where it has several, the norm of their sum is not known here: it says 0, and the
    factor is 1 or 0.
    """

    losses: Mapping[int, float]
    grad_norm: float
    grad_scale: float


@dataclass(frozen=True, slots=True)
class _Part:
    """What was noted of a part: its micro-batches' losses, the norms of each unit's gradients in as many parts."""

    losses: list[torch.Tensor] = field(default_factory=list)
    norms: dict[int, Sequence[torch.Tensor]] = field(default_factory=dict)


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
        self._parts: dict[int, _Part] = {}
        self._now = _Part()

    def begin(self, part: int) -> None:
        """Say that what is noted from now on is of this part of the step."""
        self._now = self._parts[part] = _Part()

    def weigh(self, loss: torch.Tensor) -> torch.Tensor:
        """Note a micro-batch's share of the loss; return what its backward begins with, without waiting for it.

        1, or NaN where the loss is not finite: no gradient of such a loss may pass for one.
        """
        loss = loss.detach()
        self._now.losses.append(loss)
        return torch.where(torch.isfinite(loss), 1.0, math.nan)

    def see(self, unit: Unit, gradients: Sequence[torch.Tensor]) -> None:
        """Note the norms of a unit's complete gradients, in as many parts as they come."""
        if len(gradients) == 1:
            self._now.norms[unit.index] = [torch.linalg.vector_norm(gradients[0], dtype=torch.float32)]
        elif gradients:
            # on a GPU three kernels for all of them
            self._now.norms[unit.index] = torch._foreach_norm(list(gradients), 2, torch.float32)

    def verdict(self, step: int, learning_rate: float, *, is_whole: bool = True) -> Verdict:
        """Judge the step whose losses and gradients were noted, and forget them; waits for the device.

        Args:
            step: For messages.
            learning_rate: For messages.
            is_whole: Whether what was noted is all of the step, so that its norm is known; see `clipping`.

        Raises:
            NonFiniteLossError: The loss is NaN or infinite, and nothing is skipped.
            NonFiniteGradientError: The norm of a layer's gradients is NaN or infinite, and nothing is skipped; names
                the layer at which the backward met it first.
        """
        parts, self._parts = self._parts, {}
        noted = [number for part in parts.values() for number in self._noted(part)]
        numbers = iter(torch.stack(noted).tolist() if noted else [])
        losses, norms, is_lost = {}, [0.0], False
        for index, part in parts.items():
            losses[index] = sum(next(numbers) for _ in part.losses)
            seen = [unit for unit in self._units if unit.index in part.norms]
            norms = [math.hypot(*(next(numbers) for _ in part.norms[unit.index])) for unit in seen]
            if not math.isfinite(losses[index]) and not self._skips:
                message = f"loss of step {step} is {losses[index]}; learning_rate was {learning_rate:g} there"
                raise NonFiniteLossError(message)
            is_lost = not self._are_finite(step, seen, norms) or not math.isfinite(losses[index]) or is_lost
        grad_norm = math.hypot(*norms) if is_whole else 0.0
        scale = 0.0 if is_lost else clipping(grad_norm, self._max_grad_norm)
        return Verdict(losses=losses, grad_norm=grad_norm, grad_scale=scale)

    def _noted(self, part: _Part) -> Iterator[torch.Tensor]:
        yield from part.losses
        for unit in self._units:
            yield from part.norms.get(unit.index, ())

    def _are_finite(self, step: int, seen: Sequence[Unit], norms: Sequence[float]) -> bool:
        for unit, norm in zip(reversed(seen), reversed(norms), strict=True):
            if math.isfinite(norm):
                continue
            if self._skips:
                return False
            raise NonFiniteGradientError(
                f"the gradient of layer {unit.name} in step {step} is not finite (its norm is {norm}); it is the first "
                "such layer of the backward"
            )
        return True


def clipping(grad_norm: float, max_grad_norm: float) -> float:
    """Return min(1, max_grad_norm / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_ has it; a bound of 0 is none."""
    return min(1.0, (max_grad_norm or math.inf) / (grad_norm + NORM_EPS))
