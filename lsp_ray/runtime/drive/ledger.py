"""Ledger: collects what the streams report and closes a step when all of it is there.

A step's clock runs from the end of the step before to its own end, and stands still in a pause. The deltas of step t
are late, if at all, in the forward that adds them (of step t + 1, under a stale policy of step t + 2), which is where
their waiting is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from lsp_ray.device.step_report import StepReport
from lsp_ray.optim.reproject import Reprojection
from lsp_ray.trace import Cause, Span, StepMetrics, Timeline, Wait, WaitPart, WorkStream, busy_s, exposed, wait_parts

_STREAMS = {stream.value: stream for stream in WorkStream}
STEPS_KEPT = 2  # so many steps before, operations still reach into a step: one, and one more under a stale policy


@dataclass(frozen=True, slots=True, kw_only=True)
class OpReport:
    """A finished operation of a lane: its span and, of copies, the bytes it moved.

    `reprojections` come with a payload that is the first in new subspaces: its update must carry the moments over.
    `square_sum` comes with an update of several parts' gradients: that of their sum, see `optim.parts`.
    """

    span: Span
    size_bytes: int = 0
    reprojections: tuple[Reprojection, ...] = ()
    square_sum: float | None = None

    def __reduce__(self) -> tuple[Callable[..., OpReport], tuple[object, ...]]:
        """For pickling: as dataclasses do it, the driver takes twice as long to read one, and a step has hundreds."""
        span = self.span
        own = self.size_bytes, self.reprojections, self.square_sum
        return _read, (span.stream.value, span.step, span.layer, span.start_s, span.end_s, span.part, *own)


def _read(
    stream: str,
    step: int,
    layer: int,
    start_s: float,
    end_s: float,
    part: int,
    size_bytes: int,
    reprojections: tuple[Reprojection, ...],
    square_sum: float | None,
) -> OpReport:
    span = Span(stream=_STREAMS[stream], step=step, layer=layer, start_s=start_s, end_s=end_s, part=part)
    return OpReport(span=span, size_bytes=size_bytes, reprojections=reprojections, square_sum=square_sum)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosedStep:
    """All there is to say about a step; `notes` are lines for a person."""

    metrics: StepMetrics
    timeline: Timeline
    notes: tuple[str, ...] = ()


class Ledger:
    """Turns reports, in any order, into one ClosedStep a step, in order.

    Args:
        num_units: Units that pass down, through their update and up in every step; 0 if nothing leaves the device.
        gpus: To which each unit's delta comes up, by name.
        learning_rates: One for every step.
        first_step: The first to be closed.
    """

    def __init__(
        self, num_units: int, learning_rates: Sequence[float], first_step: int = 0, gpus: Sequence[str] = ("gpu",)
    ) -> None:
        self._names, self._num_up = gpus, num_units * len(gpus)
        self._learning_rates = learning_rates
        self._steps: dict[int, StepReport] = {}
        self._ops: dict[int, list[OpReport]] = {}
        self._ups: Counter[int] = Counter()  # of those, by step: on the way up
        self._pauses: dict[int, tuple[float, float]] = {}  # step that comes next -> from when until when
        self.num_closed = first_step
        self.peak_device_bytes: int | None = None

    def add_step(self, report: StepReport) -> None:
        """Note that a step's backward is done, on all GPUs, and judged."""
        self._steps[report.step] = report
        if report.peak_device_bytes is not None:
            self.peak_device_bytes = report.peak_device_bytes

    def add_op(self, report: OpReport) -> None:
        """Note that an operation is done."""
        self._ops.setdefault(report.span.step, []).append(report)
        self._ups[report.span.step] += report.span.stream is WorkStream.H2D

    def forget(self, step: int, is_dropped: Callable[[OpReport], bool]) -> None:
        """Drop operations of a step that are made again."""
        self._ops[step] = [op for op in self._ops.get(step, []) if not is_dropped(op)]
        self._ups[step] = sum(op.span.stream is WorkStream.H2D for op in self._ops[step])

    def add_pause(self, start_s: float, end_s: float) -> None:
        """Note that training stood still between the last closed step, whose deltas are all up, and the next."""
        self._pauses[self.num_closed] = start_s, end_s

    def close_next(self) -> ClosedStep | None:
        """Return the next step in order if all of its reports are there, else None."""
        step = self.num_closed
        report = self._steps.get(step)
        # the way up is a unit's last operation; updates may have been made twice
        if report is None or self._ups[step] < self._num_up:
            return None
        spans = self._spans(report)
        closed = ClosedStep(
            metrics=self._metrics(report, spans), timeline=self._timeline(report, spans), notes=report.notes
        )
        self.num_closed += 1
        self._steps.pop(step - 1, None)
        self._ops.pop(step - STEPS_KEPT, None)
        del self._ups[step]
        self._pauses.pop(step, None)
        return closed

    def _spans(self, report: StepReport) -> list[Span]:
        """Of the operations that reach into the step, or come after it began."""
        begins_s = min(report.start_s, self._counted(report)[0][0])  # a GPU may begin before the slowest has ended
        reaching = range(report.step - STEPS_KEPT, report.step + 1)
        return [op.span for number in reaching for op in self._ops.get(number, ()) if op.span.end_s > begins_s]

    def _counted(self, report: StepReport) -> list[tuple[float, float]]:
        """When the step's clock runs."""
        before = self._steps.get(report.step - 1)
        start_s = before.end_s if before else report.start_s
        pause = self._pauses.get(report.step)
        return [(start_s, report.end_s)] if pause is None else [(start_s, pause[0]), (pause[1], report.end_s)]

    def _waits(self, report: StepReport) -> Sequence[Wait]:
        """Those of the step; before a pause the device waits as well, for the last delta."""
        before = self._steps.get(report.step - 1)
        if before is None or report.step not in self._pauses:
            return report.waits
        up = [op.span for op in self._ops.get(before.step, []) if op.span.stream is WorkStream.H2D]
        last = max(up, key=lambda span: span.end_s, default=None)
        if last is None or last.end_s <= before.end_s:
            return report.waits
        wait = Wait(step=last.step, layer=last.layer, start_s=before.end_s, end_s=last.end_s)
        return [wait, *report.waits]

    def _timeline(self, report: StepReport, spans: Sequence[Span]) -> Timeline:
        return Timeline(
            step=report.step,
            start_s=self._counted(report)[-1][0],
            end_s=report.end_s,
            compute=report.compute,
            ops=tuple(op.span for op in self._ops.get(report.step, [])),
            waits=(
                *wait_parts(report.waits, spans, report.waiting_parts),
                *(
                    WaitPart(cause=cause, step=wait.step, layer=wait.layer, start_s=wait.start_s, end_s=wait.end_s)
                    for cause, moved in (
                        (Cause.WEIGHTS, report.weights),
                        (Cause.ACTIVATIONS, report.activations),
                    )
                    for wait in moved.waits
                ),
            ),
            weights=report.weights.copies,
            activations=report.activations.copies,
        )

    def _metrics(self, report: StepReport, spans: Sequence[Span]) -> StepMetrics:
        own = self._ops.get(report.step, [])
        counted = self._counted(report)
        step_time_s = sum(end_s - start_s for start_s, end_s in counted)
        # of several GPUs one may have begun the step, and waited, while others were still at the one before
        waits = [part for wait in self._waits(report) for part in _within(wait, counted)]
        late = exposed(waits, spans, report.waiting_parts)
        weights_s, activations_s = (
            sum(part.end_s - part.start_s for wait in moved.waits for part in _within(wait, counted))
            for moved in (report.weights, report.activations)
        )
        spans = [*spans, *report.weights.copies, *report.activations.copies]

        def busy(stream: WorkStream) -> float:
            return sum(busy_s(spans, stream, start_s, end_s) for start_s, end_s in counted)

        def moved(stream: WorkStream) -> int:
            return sum(op.size_bytes for op in own if op.span.stream is stream)

        return StepMetrics(
            step=report.step + 1,
            loss=report.loss,
            grad_norm=report.grad_norm,
            grad_scale=report.grad_scale,
            learning_rate=self._learning_rates[report.step],
            num_tokens=report.num_tokens,
            tokens_per_second=report.num_tokens / step_time_s,
            step_time_s=step_time_s,
            gpu_busy_s=step_time_s - late.total_s - weights_s - activations_s,
            d2h_busy_s=busy(WorkStream.D2H),
            cpu_busy_s=busy(WorkStream.CPU),
            h2d_busy_s=busy(WorkStream.H2D),
            exposed_d2h_s=late.d2h_s,
            exposed_cpu_s=late.cpu_s,
            exposed_h2d_s=late.h2d_s,
            exposed_peers_s=late.peers_s,
            exposed_weights_s=weights_s,
            exposed_activations_s=activations_s,
            computed_s_by_gpu=dict(zip(self._names, report.computed_s, strict=True)) if report.computed_s else None,
            bytes_d2h=moved(WorkStream.D2H) + report.activations.bytes_d2h,
            bytes_h2d=moved(WorkStream.H2D) + report.weights.bytes_h2d + report.activations.bytes_h2d,
            bias=report.bias.relative if report.bias else None,
            bias_by_layer=_by_name(report.bias.relative_by_unit) if report.bias else None,
            num_refitted=report.bias.num_refitted if report.bias else None,
        )


def _within(wait: Wait, counted: Sequence[tuple[float, float]]) -> list[Wait]:
    """What of a wait lies in the time that counts."""
    cut = [(max(wait.start_s, start_s), min(wait.end_s, end_s)) for start_s, end_s in counted]
    return [replace(wait, start_s=start_s, end_s=end_s) for start_s, end_s in cut if start_s < end_s]


def _by_name(bias_by_unit: Mapping[int, float]) -> dict[str, float]:
    """As JSON has it: keys are text."""
    return {str(unit): bias for unit, bias in bias_by_unit.items()}
