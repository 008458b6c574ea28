"""AdamW's step as a delta: what to add to the weights, with the learning rate's sign and scale in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.optim.adamw import adamw


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamWHyper:
    """AdamW's constants, torch's defaults. Weight decay is not here: it acts where the weights are."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8


@dataclass(slots=True, kw_only=True)
class AdamWState:
    """First and second moments of one flat buffer, float32 (numel,), and the number of updates so far.

    `error`, alike, is what coarse deltas have left out until now; None where they are not coarse. `total`, alike, is
    the sum of all updates; None where whoever gets them adds them up.
    """

    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    step: torch.Tensor
    error: torch.Tensor | None = None
    total: torch.Tensor | None = None

    @classmethod
    def zeros(
        cls, numel: int, device: torch.device | None = None, *, keeps_error: bool = False, keeps_total: bool = False
    ) -> AdamWState:
        """State before the first update, on `device` (default: the CPU)."""
        return cls(
            exp_avg=torch.zeros(numel, device=device),
            exp_avg_sq=torch.zeros(numel, device=device),
            step=torch.zeros((), device=device),
            error=torch.zeros(numel, device=device) if keeps_error else None,
            total=torch.zeros(numel, device=device) if keeps_total else None,
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """What it consists of, by name; the tensors stay this state's own."""
        tensors = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq, "step": self.step}
        more = {"error": self.error, "total": self.total}
        return {**tensors, **{name: tensor for name, tensor in more.items() if tensor is not None}}

    def parts(self, size: int) -> Iterator[tuple[int, AdamWState]]:
        """Views of so many elements each, with the first one's position; the number of updates is a copy in each."""
        for first in range(0, self.exp_avg.numel(), size):
            yield first, self.part(first, size)

    def part(self, first: int, size: int) -> AdamWState:
        """A view of so many elements from one on; the number of updates is a copy."""
        part = {name: tensor[first : first + size] for name, tensor in self.tensors().items() if name != "step"}
        return AdamWState(step=self.step.clone(), **part)

    def clone(self) -> AdamWState:
        """Return a copy."""
        return AdamWState(**{name: tensor.clone() for name, tensor in self.tensors().items()})

    def copy_(self, other: AdamWState) -> None:
        """Take the other's values, in this state's tensors."""
        theirs = other.tensors()
        for name, tensor in self.tensors().items():
            tensor.copy_(theirs[name])


def adamw_delta_(
    delta: torch.Tensor, grad: torch.Tensor, state: AdamWState, *, learning_rate: float, hyper: AdamWHyper
) -> None:
    """Write AdamW's step for `grad` into `delta` and advance `state`.

    delta = −lr · m̂ / (sqrt(v̂) + eps) (Loshchilov and Hutter, Algorithm 2, without the decay term; torch's fused
    kernel computes it). The caller adds it. `delta` and `grad` are flat float32 on the state's device and owned by the
    caller; they must not overlap.
    """
    delta.zero_()  # from a zero parameter, the updated parameter is the step itself
    with torch.no_grad():
        adamw(
            [delta],
            [grad],
            [state.exp_avg],
            [state.exp_avg_sq],
            [],
            [state.step],
            fused=True,
            amsgrad=False,
            beta1=hyper.beta1,
            beta2=hyper.beta2,
            lr=learning_rate,
            weight_decay=0.0,
            eps=hyper.eps,
            maximize=False,
        )
