"""Moments: AdamW's state of one parameter of LSPAdamW, as the tensors that its state_dict holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lsp_ray.optim.adamw import AdamWHyper, AdamWState, adamw_delta_


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """m and v, contiguous float32 of any shape, and the number of updates, a scalar that stays on the CPU."""

    step: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor

    @classmethod
    def zeros(cls, shape: tuple[int, ...], device: torch.device) -> Moments:
        """Moments before the first update."""
        exp_avg, exp_avg_sq = (torch.zeros(shape, device=device) for _ in range(2))
        return cls(step=torch.zeros(()), exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)

    @classmethod
    def from_state(cls, state: Mapping[str, torch.Tensor]) -> Moments:
        """The moments whose `state` this was; shared with it."""
        return cls(step=state["step"], exp_avg=state["exp_avg"], exp_avg_sq=state["exp_avg_sq"])

    def state(self) -> dict[str, torch.Tensor]:
        """The tensors by torch's names; they stay these moments' own."""
        return {"step": self.step, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}

    @property
    def device(self) -> torch.device:
        """Where m and v are."""
        return self.exp_avg.device

    def delta(self, grad: torch.Tensor, *, learning_rate: float, hyper: AdamWHyper) -> torch.Tensor:
        """Advance by a gradient of the same shape; returns AdamW's step, float32, −lr included."""
        # the fused kernel wants the count beside m and v, from where reading it would wait for the device
        step = torch.full((), float(self.step), device=self.device)
        adam = AdamWState(exp_avg=self.exp_avg.view(-1), exp_avg_sq=self.exp_avg_sq.view(-1), step=step)
        delta = torch.empty_like(self.exp_avg)
        adamw_delta_(delta.view(-1), grad.reshape(-1).float(), adam, learning_rate=learning_rate, hyper=hyper)
        self.step.add_(1)
        return delta
