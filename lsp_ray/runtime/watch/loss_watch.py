"""LossWatch: says so once where the training loss runs away."""

from __future__ import annotations

from collections import deque
from statistics import fmean

WINDOW_STEPS = 10
MOST_RISE = 1.2  # times the loss that training began with: no healthy run comes there


class LossWatch:
    """Compares the mean of the last ten losses with that of the first ten."""

    def __init__(self) -> None:
        self._first: list[float] = []
        self._last: deque[float] = deque(maxlen=WINDOW_STEPS)
        self._has_warned = False

    def warning(self, loss: float, learning_rate: float) -> str | None:
        """Take a step's loss in; return a line to show, at most once."""
        if loss != loss:  # a step that was skipped
            return None
        self._last.append(loss)
        if len(self._first) < WINDOW_STEPS:
            self._first.append(loss)
            return None
        began, now = fmean(self._first), fmean(self._last)
        if self._has_warned or not (began > 0 and now > MOST_RISE * began):
            return None
        self._has_warned = True
        return (
            f"warning: the loss runs away: {now:.4g} on average over the last {WINDOW_STEPS} steps, {began:.4g} over "
            f"the first; a learning rate below {learning_rate:.2g}, --warmup_steps or --max_grad_norm 1.0 may help"
        )
