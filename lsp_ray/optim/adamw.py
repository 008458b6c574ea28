"""AdamW's step as a delta: what to add to the weights, with the learning rate's sign and scale in it."""

from __future__ import annotations

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
    """First and second moments of one flat buffer, float32 (numel,), and the number of updates so far."""

    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    step: torch.Tensor

    @classmethod
    def zeros(cls, numel: int, device: torch.device | None = None) -> AdamWState:
        """State before the first update, on `device` (default: the CPU)."""
        return cls(
            exp_avg=torch.zeros(numel, device=device),
            exp_avg_sq=torch.zeros(numel, device=device),
            step=torch.zeros((), device=device),
        )

    def clone(self) -> AdamWState:
        """Return a copy."""
        return AdamWState(exp_avg=self.exp_avg.clone(), exp_avg_sq=self.exp_avg_sq.clone(), step=self.step.clone())

    def copy_(self, other: AdamWState) -> None:
        """Take the other's values, in this state's tensors."""
        self.exp_avg.copy_(other.exp_avg)
        self.exp_avg_sq.copy_(other.exp_avg_sq)
        self.step.copy_(other.step)


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
