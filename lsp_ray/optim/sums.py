"""What a shard must know of a payload to keep the sum of its updates, where nobody else adds them up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lsp_ray.optim.adamw import AdamWState


@dataclass(frozen=True, slots=True, kw_only=True)
class SummedPart:
    """One target's part of a payload.

    Attributes:
        numel: Its elements.
        gain: By how much the entries of a step are enlarged, up to the learning rate in size; 1 leaves them.
        decays: Whether weight decay draws its sum to zero, and so the weight to what it began with.
    """

    numel: int
    gain: float
    decays: bool


def sum_up_(
    state: AdamWState,
    parts: Sequence[SummedPart],
    first: int,
    step: torch.Tensor,
    *,
    learning_rate: float,
    decay: float,
) -> None:
    """Add to a state's sum, from element `first` on, AdamW's step of some elements: total ← keep · total + step.

    Args:
        state: Of the whole payload.
        parts: Of the payload, in order.
        first: The position of `step` in it.
        step: Flat float32; is used up.
        learning_rate: Of the step.
        decay: Decoupled: keep is 1 − learning rate · this.
    """
    assert state.total is not None
    begin = 0
    for part in parts:
        low, high = max(begin, first), min(begin + part.numel, first + step.numel())
        begin += part.numel
        if low >= high:
            continue
        added, total = step[low - first : high - first], state.total[low:high]
        if part.gain != 1.0:
            added.mul_(part.gain).clamp_(-learning_rate, learning_rate)
        if part.decays and decay:
            total.mul_(1.0 - learning_rate * decay)
        total.add_(added)
