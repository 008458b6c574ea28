"""Driver: the loop between a policy that decides and workers that act."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol, cast

from lsp_ray.device.step_report import StepReport
from lsp_ray.errors import CheckpointError, GpuLostError
from lsp_ray.runtime.drive.event_log import EventLog
from lsp_ray.runtime.drive.layer_times import LayerTimes
from lsp_ray.runtime.drive.ledger import ClosedStep, Ledger, OpReport
from lsp_ray.runtime.drive.open_steps import OpenSteps, op_of
from lsp_ray.runtime.drive.step_judge import StepJudge
from lsp_ray.schedule.ops import (
    CostsMeasured,
    DeltaDue,
    Event,
    GradientReady,
    Op,
    OpDone,
    StepAgain,
    StepJudged,
    StepRun,
)
from lsp_ray.schedule.policy import Policy
from lsp_ray.trace import Span, WorkStream

MAX_LOSSES_IN_A_ROW = 3  # of GPUs without a step closed between them: then it is no accident
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
            GpuLostError: A GPU's actor died, of workers that can replace one: see `ReplacingWorkers`.
            LspRayError: What was waited for failed, died or did not happen in time.
        """
        ...


class ReplacingWorkers(Workers, Protocol):
    """Workers with several GPUs, one of which may be lost."""

    def forget(self, gpu: int) -> list[Completion]:
        """Let go of a GPU that is lost: nothing reaches it any more; returns what it had told before."""
        ...

    def can_replace(self, gpu: int, step: int) -> bool:
        """Whether another actor can take its place in this step, with the bits that it would have had."""
        ...

    def is_idle(self) -> bool:
        """Whether no copy and no update is under way."""
        ...

    def replace(self, gpu: int, step: int) -> None:
        """Start another actor in the place of the one forgotten, with what the others have before this step."""
        ...

    def start_again(self, gpu: int, steps: range, *, drains: bool) -> None:
        """Let a new actor run these steps, and `drain` after them; returns at once."""
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
        gpus: Names of the policy's GPUs; default: their numbers.
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
        gpus: Sequence[str] = (),
    ) -> None:
        self._workers = workers
        self._policy = policy
        self._on_step = on_step
        self._first_step = first_step
        self._num_started = first_step
        self._num_drained = first_step
        self._end = first_step  # of the steps under way: nothing is to be done after it before a pause
        self._judge = judge or StepJudge(policy.num_layers, first_step=first_step)
        self._event_log = event_log
        self._open = OpenSteps(policy.num_layers, policy.gpu_of_part)
        self._losses: list[int] = []  # of GPUs: the steps closed at each, since the last step
        self._absent: int | None = None  # the GPU that is lost and not replaced yet
        self._made: set[Op] = set()  # of a step that is told anew: what need not be made again
        self._grad_scales: dict[int, float] = {}  # of steps that are judged and not closed
        self.times = LayerTimes(policy.num_layers)
        names = gpus or [f"gpu-{gpu}" for gpu in range(policy.num_gpus)]
        self.ledger = Ledger(policy.num_layers, learning_rates, first_step, names)

    def train(self, end: int, should_stop: Callable[[], bool] = lambda: False) -> None:
        """Run the steps before `end`, fewer where `should_stop` says so; on return their deltas have come up."""
        self._end = end
        self._start_steps(end, should_stop)
        while self.ledger.num_closed < self._num_started:
            for completion in self._next_completions():
                self._handle(completion)
            self._start_steps(end, should_stop)
            while (closed := self.ledger.close_next()) is not None:
                del self._grad_scales[closed.timeline.step]
                self._open.close(closed.timeline.step)
                self._on_step(closed)
                self._tell_costs()

    def _start_steps(self, end: int, should_stop: Callable[[], bool]) -> None:
        is_over = should_stop()
        while not is_over and self._num_started < min(end, self._judge.num_run + STEPS_AHEAD):
            self._start_step()
            is_over = should_stop()
        if self._policy.room is None or self._num_drained == self._num_started:
            return
        if is_over or self._num_started == end:  # the room is for deltas that a forward comes to: now none does
            self._workers.drain()
            self._num_drained = self._num_started

    def _start_step(self) -> None:
        self._workers.start_step(self._num_started)
        self._num_started += 1

    def _handle(self, completion: Completion) -> None:
        match completion:
            case OpReport():
                op = op_of(completion)
                self.ledger.add_op(completion)
                self.times.add_op(completion.span)
                self._open.add(op)
                self._decide(OpDone(op=op))
                self._add_judged(self._judge.add_op(completion))
            case GradientReady():
                self._open.announce(completion)
                self._decide(completion)
            case DeltaDue():
                self._decide(completion)
            case StepReport():
                self.times.add_step(completion)
                before = self._judge.num_run
                report = self._judge.add_step(completion)
                if self._judge.num_run > before and self._policy.num_gpus > 1:
                    self._decide(StepRun(step=completion.step))
                self._add_judged(report)

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
        events, absent = [event], list[Op]()
        for event in events:
            actions = self._policy.handle(event)
            if self._event_log is not None:
                self._event_log.write(event, actions)
            for action in actions:
                op = action.op
                self._open.launch(op)
                if self._made and op in self._made:
                    self._made.remove(op)
                    events.append(OpDone(op=op))
                elif op.stream is WorkStream.H2D and op.part == self._absent:
                    absent.append(op)
                else:
                    self._workers.launch(op, self._grad_scales.get(op.step, 1.0))
        for op in absent:
            self._do_without(op)

    # a GPU that is lost

    def _next_completions(self) -> list[Completion]:
        try:
            return self._workers.next_completions()
        except GpuLostError as lost:
            self._replace(lost)
            return []

    def _replace(self, lost: GpuLostError) -> None:
        """Let another actor make the step in which a GPU was lost, with the weights that the others have before it.

        They cannot be further: the first layer's delta of a step comes up once all have told it and sent its payloads.
        """
        gpu, workers = lost.gpu, cast("ReplacingWorkers", self._workers)  # no others tell of a lost GPU
        for completion in workers.forget(gpu):
            self._handle(completion)
        own = self._open.parts_of(gpu)
        step = min(self._open.lacking(gpu, self.ledger.num_closed), self._judge.lacking(own))
        if self._is_hopeless() or step == self._end or not workers.can_replace(gpu, step):
            raise lost
        if step == self._num_started:  # it was ahead of the others, which come to where it was by this one
            self._start_step()
        self._let_others_make(step, gpu, workers)
        try:
            workers.replace(gpu, step)
        except CheckpointError as error:  # no room for what it would be given: the last checkpoint is there
            raise lost from error
        self._absent = None
        announced, self._made = self._open.announced_without(gpu, step), self._open.made_without(gpu, step)
        dropped = self._open.forget(gpu, step)
        self.ledger.forget(step, lambda report: op_of(report) in dropped)
        self._judge.forget(step, own)
        self._decide(StepAgain(step=step))
        for ready in announced:
            self._decide(ready)
        drains = self._num_drained == self._num_started and self._policy.room is not None
        workers.start_again(gpu, range(step, self._num_started), drains=drains)

    def _let_others_make(self, step: int, gpu: int, workers: ReplacingWorkers) -> None:
        """Without this GPU, as far as they come."""
        self._absent = gpu
        for op in self._open.coming_up(gpu):
            self._do_without(op)
        while not (self._others_have_made(gpu, step) and workers.is_idle()):
            for completion in workers.next_completions():
                self._handle(completion)

    def _is_hopeless(self) -> bool:
        """Whether GPUs are lost again and again, and no step is closed between."""
        closed = self.ledger.num_closed
        self._losses = [*(at for at in self._losses if at == closed), closed]
        return len(self._losses) >= MAX_LOSSES_IN_A_ROW

    def _do_without(self, op: Op) -> None:
        """A delta that would come up to a GPU that is lost: another one's weights, which replace it, have it."""
        now_s = time.monotonic()
        span = Span(stream=op.stream, step=op.step, layer=op.layer, start_s=now_s, end_s=now_s, part=op.part)
        self._handle(OpReport(span=span))

    def _others_have_made(self, gpu: int, step: int) -> bool:
        """Whether all GPUs but this one have told all of their parts of the step."""
        others = set(range(len(self._policy.gpu_of_part))) - self._open.parts_of(gpu)
        return self._judge.has(step, others) and self._open.have_announced(gpu, step)
