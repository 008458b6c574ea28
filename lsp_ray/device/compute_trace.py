"""ComputeTrace: the compute stream's spans of one step, taken at hooks that are there anyway."""

from __future__ import annotations

from lsp_ray.device.backend import Backend, Stamp
from lsp_ray.trace import ComputeSpan, Phase

_Label = tuple[Phase, int]  # with the unit's index


class ComputeTrace:
    """Cuts the stream's time line into stretches; nothing is waited for until `spans`.

    A forward begins at a unit's hook and ends at the next one. A backward is known by its end, where a gradient of the
    unit is complete; what lies beyond the last unit (the output layer, the loss) counts as the deepest unit's.
    A forward that is recomputed in the backward is part of the backward.

    Args:
        backend: Gives the stamps.
        is_on: Whether to take any; all calls do nothing if not.
    """

    def __init__(self, backend: Backend, *, is_on: bool) -> None:
        self._backend = backend
        self._is_on = is_on
        self._is_backward = False
        self._open: _Label | None = None
        self._cuts: list[tuple[Stamp, _Label | None]] = []  # a stamp, and what went on until then
        self._cut(None)

    def begin(self, phase: Phase, unit: int) -> None:
        """The forward side turns to something else."""
        if not self._is_backward:
            self._cut(self._open)
            self._open = phase, unit

    def pause(self) -> None:
        """What is under way ends; what follows is a wait, or belongs to no unit."""
        if not self._is_backward:
            self._cut(self._open)
            self._open = None

    def begin_backward(self) -> None:
        """The forward is over."""
        self.pause()
        self._is_backward = True

    def gradient_done(self, unit: int) -> None:
        """One of the unit's gradients is there."""
        self._cut((Phase.BACKWARD, unit))

    def end_backward(self) -> None:
        """The backward is over; another micro-batch's forward may follow."""
        self._is_backward = False
        self.pause()

    def end(self) -> Stamp:
        """Close the last span and return the stamp behind everything; to be called before the device is waited for."""
        self.pause()
        self._is_on = False
        return self._backend.stamp()

    def spans(self, step: int, end: Stamp, end_s: float) -> tuple[ComputeSpan, ...]:
        """Return the spans of the step, neighbours with one label as one.

        Args:
            step: Goes into the spans.
            end: From `end`; the device has passed it.
            end_s: The host's clock when it had.
        """
        spans: list[ComputeSpan] = []
        start_s = 0.0
        label_before: _Label | None = None
        for stamp, label in self._cuts:
            now_s = end_s - stamp.seconds_until(end)
            if label is not None:
                phase, unit = label
                if label == label_before:
                    start_s = spans.pop().start_s
                spans.append(ComputeSpan(phase=phase, step=step, layer=unit, start_s=start_s, end_s=now_s))
            start_s, label_before = now_s, label
        return tuple(spans)

    def _cut(self, label: _Label | None) -> None:
        if self._is_on:
            self._cuts.append((self._backend.stamp(), label))
