"""StepJudge: puts together what GPUs and shards say of a step, and judges it where no GPU alone can.

A step of one part is judged by the GPU that computes it. Of several parts only the shards see the sum: its norm is
known once every unit's first update is made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from lsp_ray.device.judge import clipping
from lsp_ray.device.step_report import StepReport
from lsp_ray.device.streamed_weights import StreamedStep
from lsp_ray.errors import NonFiniteGradientError
from lsp_ray.runtime.drive.ledger import OpReport
from lsp_ray.trace import WorkStream


class StepJudge:
    """Returns each step's report, of all GPUs and with its verdict, as soon as it can.

    Args:
        num_units: Whose updates tell the norm of a step of several parts.
        num_parts: Of a step.
        num_gpus: Which compute them.
        max_grad_norm: Bound of the global norm; 0 is none.
        skips: Whether a step that is not finite is skipped, else it is an error.

    Attributes:
        num_run: Steps whose backwards are done on all GPUs, from the first on; as given, before any is.
    """

    def __init__(
        self,
        num_units: int,
        *,
        num_parts: int = 1,
        num_gpus: int = 1,
        max_grad_norm: float = 0.0,
        skips: bool = False,
        first_step: int = 0,
    ) -> None:
        self._num_units, self._num_parts, self._num_gpus = num_units, num_parts, num_gpus
        self._max_grad_norm, self._skips = max_grad_norm, skips
        self.num_run = self._num_judged = first_step
        self._reports: dict[int, list[StepReport]] = {}
        self._square_sums: dict[int, dict[int, float]] = {}

    def add_step(self, report: StepReport) -> StepReport | None:
        """Take what a GPU says of its parts; see the class."""
        reports = self._reports.setdefault(report.step, [])
        reports.append(report)
        if len(reports) == self._num_gpus:
            self.num_run = max(self.num_run, report.step + 1)
        return self._judged(report.step)

    def add_op(self, report: OpReport) -> StepReport | None:
        """Take what an operation says; see the class."""
        step = report.span.step
        if report.square_sum is None or step < self._num_judged:  # made again, with what the judge said
            return None
        self._square_sums.setdefault(step, {})[report.span.layer] = report.square_sum
        return self._judged(step)

    def has(self, step: int, parts: set[int]) -> bool:
        """Whether the GPUs of these parts have reported the step."""
        return parts <= {part for report in self._reports.get(step, ()) for part in report.losses}

    def lacking(self, parts: set[int]) -> int:
        """The first step that the GPU of these parts has not reported."""
        step = self._num_judged
        while self.has(step, parts):
            step += 1
        return step

    def forget(self, step: int, parts: set[int]) -> None:
        """Drop what the GPU of these parts has said of a step that it makes again."""
        reports = self._reports.get(step, [])
        self._reports[step] = [report for report in reports if parts.isdisjoint(report.losses)]
        self._square_sums.pop(step, None)  # shards are asked once more: no step is judged before all of it is there
        self.num_run = min(self.num_run, step)  # its report may have come before the payloads that it lacked

    def _judged(self, step: int) -> StepReport | None:
        if len(self._reports.get(step, ())) < self._num_gpus:
            return None
        if self._num_parts == 1:
            (report,) = self._reports.pop(step)
            return report
        square_sums = self._square_sums.get(step, {})
        if len(square_sums) < self._num_units:
            return None
        report = _together(self._reports.pop(step))
        del self._square_sums[step]
        self._num_judged = step + 1
        norms = [math.sqrt(square_sums[unit]) for unit in sorted(square_sums)]
        grad_norm = math.hypot(*norms)
        if report.grad_scale == 0.0:
            return replace(report, grad_norm=grad_norm)
        if math.isfinite(grad_norm):
            return replace(report, grad_norm=grad_norm, grad_scale=clipping(grad_norm, self._max_grad_norm))
        if self._skips:
            return replace(report, grad_norm=grad_norm, grad_scale=0.0)
        unit = next(unit for unit, norm in reversed(list(enumerate(norms))) if not math.isfinite(norm))
        raise NonFiniteGradientError(f"the sum of all parts' gradients of layer {unit} in step {step} is not finite")


def _together(reports: Sequence[StepReport]) -> StepReport:
    """One report of a step; see `StepReport`."""
    reports = sorted(reports, key=lambda report: min(report.losses))  # GPUs have their parts in order
    waited_s = [
        sum(wait.end_s - wait.start_s for wait in (*report.waits, *report.weights.waits, *report.activations.waits))
        for report in reports
    ]
    computed_s = [report.end_s - report.start_s - waited for report, waited in zip(reports, waited_s, strict=True)]
    gpu = waited_s.index(max(waited_s))
    waiting = reports[gpu]
    several = len(reports) > 1
    peaks = [report.peak_device_bytes for report in reports if report.peak_device_bytes is not None]
    return replace(
        reports[0],
        losses={part: loss for report in reports for part, loss in report.losses.items()},
        num_tokens=sum(report.num_tokens for report in reports),
        start_s=min(report.start_s for report in reports),
        end_s=max(report.end_s for report in reports),
        forward_s=max(report.forward_s for report in reports),
        backward_s=max(report.backward_s for report in reports),
        waits=waiting.waits,
        weights=_copied_by(gpu, min(waiting.losses), waiting.weights),
        activations=_copied_by(gpu, min(waiting.losses), waiting.activations),
        waiting_parts=tuple(waiting.losses) if several else None,
        computed_s=tuple(computed_s) if several else (),
        compute=tuple(replace(span, gpu=gpu) for gpu, report in enumerate(reports) for span in report.compute),
        grad_scale=min(report.grad_scale for report in reports),
        peak_device_bytes=max(peaks, default=None),
        notes=tuple(dict.fromkeys(line for report in reports for line in report.notes)),
    )


def _copied_by(gpu: int, part: int, moved: StreamedStep) -> StreamedStep:
    """Where the copies were: as of deltas and payloads, a part stands for the GPU down the link, and its number up."""
    numbers = {WorkStream.H2D: gpu, WorkStream.D2H: part}
    return replace(moved, copies=tuple(replace(span, part=numbers[span.stream]) for span in moved.copies))
