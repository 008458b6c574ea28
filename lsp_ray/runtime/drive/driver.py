"""Driver: the loop between a policy that decides and workers that act."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from lsp_ray.device.step_report import StepReport
from lsp_ray.runtime.drive.event_log import EventLog
from lsp_ray.runtime.drive.layer_times import LayerTimes
from lsp_ray.runtime.drive.ledger import ClosedStep, Ledger, OpReport
from lsp_ray.runtime.drive.step_judge import StepJudge
from lsp_ray.schedule.ops import CostsMeasured, DeltaDue, Event, GradientReady, Op, OpDone, StepJudged
from lsp_ray.schedule.policy import Policy

STEPS_AHEAD = 2  # steps submitted at once: the device goes from one to the next without waiting for the driver

Completion = GradientReady | DeltaDue | StepReport | OpReport


class Workers(Protocol):
    """Those who act: actors on Ray, or threads of this process."""

    def start_step(self, step: int) -> None:
        """Let the device run `step` after those started before; returns at once."""
        ...

    def drain(self) -> None:
        """Let the device, after the steps started, add deltas that no forward may come to add; returns at once."""
        ...

    def launch(self, op: Op, grad_scale: float = 1.0) -> None:
        """Start an operation; returns at once. An update is made with gradients times `grad_scale`.

        An update that is launched a second time takes the place of the first. A delta of the scale 0 is void.
        """
        ...

    def next_completions(self) -> list[Completion]:
        """Wait for something to happen and return it.

        Raises:
            LspRayError: What was waited for failed, died or did not happen in time.
        """
        ...


class Driver:
    """Trains: passes every completion to the policy and launches what it answers.

    Args:
        workers: Who acts.
        policy: Who decides; for as many layers as there are units.
        learning_rates: One for every step.
        judge: Fresh; for the policy's layers, parts and GPUs, and the first step. Default: of steps of one part.
        on_step: Called with each step, in order.
        first_step: The first to be run.
        event_log: Where events and decisions are written, so that they can be replayed.
    """

    def __init__(
        self,
        workers: Workers,
        policy: Policy,
        learning_rates: Sequence[float],
        *,
        judge: StepJudge | None = None,
        on_step: Callable[[ClosedStep], None],
        first_step: int = 0,
        event_log: EventLog | None = None,
    ) -> None:
        self._workers = workers
        self._policy = policy
        self._on_step = on_step
        self._first_step = first_step
        self._num_started = first_step
        self._num_drained = first_step
        self._judge = judge or StepJudge(policy.num_layers, first_step=first_step)
        self._event_log = event_log
        self._grad_scales: dict[int, float] = {}  # of steps that are judged and not closed
        self.times = LayerTimes(policy.num_layers)
        self.ledger = Ledger(policy.num_layers, learning_rates, first_step, len(set(policy.gpu_of_part)))

    def train(self, end: int, should_stop: Callable[[], bool] = lambda: False) -> None:
        """Run the steps before `end`, fewer where `should_stop` says so; on return their deltas have come up."""
        self._start_steps(end, should_stop)
        while self.ledger.num_closed < self._num_started:
            for completion in self._workers.next_completions():
                self._handle(completion)
                self._start_steps(end, should_stop)
            while (closed := self.ledger.close_next()) is not None:
                del self._grad_scales[closed.timeline.step]
                self._on_step(closed)
                self._tell_costs()

    def _start_steps(self, end: int, should_stop: Callable[[], bool]) -> None:
        is_over = should_stop()
        while not is_over and self._num_started < min(end, self._judge.num_run + STEPS_AHEAD):
            self._workers.start_step(self._num_started)
            self._num_started += 1
            is_over = should_stop()
        if self._policy.room is None or self._num_drained == self._num_started:
            return
        if is_over or self._num_started == end:  # the room is for deltas that a forward comes to: now none does
            self._workers.drain()
            self._num_drained = self._num_started

    def _handle(self, completion: Completion) -> None:
        match completion:
            case StepReport():
                self.times.add_step(completion)
                self._add_judged(self._judge.add_step(completion))
            case OpReport(span=span):
                self.ledger.add_op(completion)
                self.times.add_op(span)
                self._decide(OpDone(op=Op(stream=span.stream, step=span.step, layer=span.layer, part=span.part)))
                self._add_judged(self._judge.add_op(completion))
            case GradientReady() | DeltaDue():
                self._decide(completion)

    def _add_judged(self, report: StepReport | None) -> None:
        if report is None:
            return
        self.ledger.add_step(report)
        self._grad_scales[report.step] = report.grad_scale
        if self._policy.speculates:
            self._decide(StepJudged(step=report.step, stands=report.grad_scale == 1.0))

    def _tell_costs(self) -> None:
        """Tell the policy what layers cost, ever more rarely: after 1, 2, 4, 8 … steps."""
        num_closed = self.ledger.num_closed - self._first_step
        if self._policy.num_layers and num_closed & (num_closed - 1) == 0:
            self._decide(CostsMeasured(step=self.ledger.num_closed - 1, layers=self.times.medians()))

    def _decide(self, event: Event) -> None:
        actions = self._policy.handle(event)
        for action in actions:
            self._workers.launch(action.op, self._grad_scales.get(action.op.step, 1.0))
        if self._event_log is not None:
            self._event_log.write(event, actions)
