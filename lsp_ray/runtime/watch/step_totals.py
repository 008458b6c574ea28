"""StepTotals: what a run's stops and its summary ask of its steps, added up as they pass; no step is kept."""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import dataclass, field
from statistics import median

from lsp_ray.trace import StepMetrics


@dataclass(slots=True)
class _Timed:
    """Of some steps; their times, 8 bytes each, for the median."""

    times_s: array[float] = field(default_factory=lambda: array("d"))
    num_tokens: int = 0
    exposed_s: float = 0.0

    def add(self, metrics: StepMetrics) -> None:
        self.times_s.append(metrics.step_time_s)
        self.num_tokens += metrics.num_tokens
        self.exposed_s += metrics.exposed_s


class StepTotals:
    """Is given every step of a run, in order, those before its checkpoint too.

    Args:
        measured: Number of the step whose memory was measured, which made it slower: it is in no time.

    Attributes:
        last: Number of the last step; 0 before the first.
        best: The first step with the lowest eval loss; None where none was measured, or not as a number.
        num_without_gain: Measurements of eval loss since the best one; all of them where none is a number.
        num_clipped: See `Summary`.
        num_skipped: See `Summary`.
    """

    def __init__(self, measured: int) -> None:
        self._measured = measured
        self._alone, self._others = _Timed(), _Timed()
        self._bytes_d2h: Counter[int] = Counter()  # nearly always the same number
        self._bytes_h2d: Counter[int] = Counter()
        self.last = self.num_without_gain = self.num_clipped = self.num_skipped = 0
        self.best: StepMetrics | None = None

    def add(self, metrics: StepMetrics) -> None:
        """Take in the next step."""
        self.last = metrics.step
        (self._alone if metrics.step == self._measured else self._others).add(metrics)
        self._bytes_d2h[metrics.bytes_d2h] += 1
        self._bytes_h2d[metrics.bytes_h2d] += 1
        self.num_clipped += 0.0 < metrics.grad_scale < 1.0
        self.num_skipped += metrics.grad_scale == 0.0
        if metrics.eval_loss is not None:
            self._compare(metrics, metrics.eval_loss)

    def _compare(self, metrics: StepMetrics, loss: float) -> None:
        lowest = None if self.best is None else self.best.eval_loss
        if loss == loss and (lowest is None or loss < lowest):
            self.best, self.num_without_gain = metrics, 0
        else:
            self.num_without_gain += 1

    @property
    def _timed(self) -> _Timed:
        return self._others if self._others.times_s else self._alone

    @property
    def step_time_s_median(self) -> float:
        """See `Summary`; of at least one step, as what follows."""
        return median(self._timed.times_s)

    @property
    def tokens_per_second(self) -> float:
        """See `Summary`."""
        return self._timed.num_tokens / sum(self._timed.times_s)

    @property
    def overlap_fraction(self) -> float:
        """See `Summary`."""
        return 1.0 - self._timed.exposed_s / sum(self._timed.times_s)

    @property
    def bytes_d2h_per_step(self) -> int:
        """See `Summary`."""
        return round(median(self._bytes_d2h.elements()))

    @property
    def bytes_h2d_per_step(self) -> int:
        """See `Summary`."""
        return round(median(self._bytes_h2d.elements()))
