"""Driver: the loop between a policy that decides and workers that act."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from lsp_ray.device.worker import StepReport
from lsp_ray.runtime.event_log import EventLog
from lsp_ray.runtime.layer_times import LayerTimes
from lsp_ray.runtime.ledger import ClosedStep, Ledger, OpReport
from lsp_ray.schedule.ops import CostsMeasured, Event, GradientReady, Op, OpDone
from lsp_ray.schedule.policy import Policy

STEPS_AHEAD = 2  # steps submitted at once: the device goes from one to the next without waiting for the driver

Completion = GradientReady | StepReport | OpReport


class Workers(Protocol):
    """Those who act: actors on Ray, or threads of this process."""

    def start_step(self, step: int) -> None:
        """Let the device run `step` after those started before; returns at once."""
        ...

    def launch(self, op: Op) -> None:
        """Start an operation; returns at once."""
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
        on_step: Called with each step, in order.
        event_log: Where events and decisions are written, so that they can be replayed.
    """

    def __init__(
        self,
        workers: Workers,
        policy: Policy,
        learning_rates: Sequence[float],
        *,
        on_step: Callable[[ClosedStep], None],
        event_log: EventLog | None = None,
    ) -> None:
        self._workers = workers
        self._policy = policy
        self._num_steps = len(learning_rates)
        self._on_step = on_step
        self._event_log = event_log
        self.times = LayerTimes(policy.num_layers)
        self.ledger = Ledger(policy.num_layers, learning_rates)

    def train(self) -> None:
        """Run every step; on return all deltas have come up."""
        for step in range(min(STEPS_AHEAD, self._num_steps)):
            self._workers.start_step(step)
        while not self.ledger.complete:
            for completion in self._workers.next_completions():
                self._handle(completion)
            while (closed := self.ledger.close_next()) is not None:
                self._on_step(closed)
                self._tell_costs()

    def _handle(self, completion: Completion) -> None:
        match completion:
            case StepReport(step=step):
                self.ledger.add_step(completion)
                self.times.add_step(completion)
                if step + STEPS_AHEAD < self._num_steps:
                    self._workers.start_step(step + STEPS_AHEAD)
            case OpReport(span=span):
                self.ledger.add_op(completion)
                self.times.add_op(span)
                self._decide(OpDone(op=Op(stream=span.stream, step=span.step, layer=span.layer)))
            case GradientReady():
                self._decide(completion)

    def _tell_costs(self) -> None:
        """Tell the policy what layers cost, ever more rarely: after 1, 2, 4, 8 … steps."""
        num_closed = self.ledger.num_closed
        if self._policy.num_layers and num_closed & (num_closed - 1) == 0:
            self._decide(CostsMeasured(step=num_closed - 1, layers=self.times.medians()))

    def _decide(self, event: Event) -> None:
        actions = self._policy.handle(event)
        for action in actions:
            self._workers.launch(action.op)
        if self._event_log is not None:
            self._event_log.write(event, actions)
