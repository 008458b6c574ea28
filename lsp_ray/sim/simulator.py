"""Simulator: runs a live policy on costs instead of machines.

The device computes its plan; each lane (a direction of the link, or a shard) executes one operation at a time, in the
order in which the policy launched them. Nothing is random, so the same costs give the same trace to the last bit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from lsp_ray.errors import ConfigError
from lsp_ray.schedule.ops import CostsMeasured, DeltaDue, Event, Op, OpDone
from lsp_ray.schedule.policy import Lane, Policy, lane_of
from lsp_ray.sim.costs import StepCosts
from lsp_ray.sim.device_plan import DeviceTask, device_tasks
from lsp_ray.sim.event_queue import EventQueue
from lsp_ray.trace import Exposed, Span, Wait, WorkStream, busy_s, exposed

_LINK = (WorkStream.D2H, WorkStream.H2D)


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedStep:
    """Figures of one step, as the live run's: from the end of the backward before to the end of its own."""

    step: int
    step_s: float
    exposed: Exposed
    busy_s: dict[WorkStream, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """What happened, in order of its end."""

    spans: tuple[Span, ...]
    waits: tuple[Wait, ...]
    steps: tuple[SimulatedStep, ...]

    @property
    def typical(self) -> SimulatedStep:
        """The last step: by then every step is like the one before."""
        return self.steps[-1]


@dataclass(slots=True)
class _LaneState:
    """A lane: operations launched and waiting, and the one under way with the seconds it needs at full rate."""

    waiting: deque[Op] = field(default_factory=deque)
    op: Op | None = None
    start_s: float = 0.0
    left_s: float = 0.0
    rate: float = 1.0
    since_s: float = 0.0
    version: int = 0


@dataclass(frozen=True, slots=True)
class _DeviceDone:
    task: DeviceTask


@dataclass(frozen=True, slots=True)
class _LaneDone:
    """`version` tells an end that still holds from one that a change of rate has moved."""

    lane: Lane
    version: int


_Happening = _DeviceDone | _LaneDone | Event


class Simulator:
    """One run of `num_steps` steps; call `run` once.

    Args:
        costs: Of one step; all steps are alike.
        policy: Who decides, fresh; None where nothing leaves the device.
        shard_of_layer: What the policy was made with.
        num_steps: Enough for the pipeline to fill; the figures to read are the last step's.

    Raises:
        ConfigError: The arguments do not fit each other.
    """

    def __init__(
        self, costs: StepCosts, policy: Policy | None, shard_of_layer: Sequence[int], *, num_steps: int = 6
    ) -> None:
        if num_steps < 1:
            raise ConfigError("sim.num_steps", "be at least 1", num_steps)
        if policy is not None and not policy.num_layers == len(shard_of_layer) == len(costs.layers):
            bound = f"name a shard for each of the {len(costs.layers)} layers, as its policy does"
            raise ConfigError("sim.shard_of_layer", bound, len(shard_of_layer))
        self._costs, self._policy, self._shard_of_layer = costs, policy, shard_of_layer
        self._num_steps = num_steps
        staleness = policy.staleness if policy is not None else 0
        self._is_bounded = policy is not None and policy.room is not None
        self._tasks = device_tasks(
            costs, num_steps, offloads=policy is not None, staleness=staleness, drains=self._is_bounded
        )
        self._queue: EventQueue[_Happening] = EventQueue()
        self._lanes: dict[Lane, _LaneState] = {}
        self._up: set[Op] = set()  # deltas on the device that no forward has asked for
        self._blocked: DeviceTask | None = None
        self._now_s = self._blocked_since_s = 0.0
        self._spans: list[Span] = []
        self._waits: list[Wait] = []
        self._step_ends_s: dict[int, float] = {}

    def run(self) -> Simulation:
        """Run until every delta is up.

        Raises:
            ConfigError: The policy left the device waiting for a delta for ever.
        """
        self._next_task()
        while self._queue:
            self._now_s, happening = self._queue.pop()
            self._happen(happening)
        if self._blocked is not None:
            raise ConfigError("sim.policy", "bring every delta up", f"none for {self._blocked.awaits}")
        return Simulation(spans=tuple(self._spans), waits=tuple(self._waits), steps=tuple(self._figures()))

    def _happen(self, happening: _Happening) -> None:
        match happening:
            case _DeviceDone(task=task):
                self._finish_task(task)
            case _LaneDone(lane=lane, version=version):
                if self._lanes[lane].version == version:
                    self._finish_op(lane)
            case event:
                self._decide(event)

    def _decide(self, event: Event) -> None:
        assert self._policy is not None, "without a policy nothing is announced"
        for action in self._policy.handle(event):
            op = action.op
            lane = lane_of(op, self._shard_of_layer, self._policy.gpu_of_part)
            self._lanes.setdefault(lane, _LaneState()).waiting.append(op)
            self._start_op(lane)

    # the device

    def _next_task(self) -> None:
        task = next(self._tasks, None)
        if task is None:
            return
        if self._is_bounded and task.awaits is not None:
            due = DeltaDue(step=task.awaits.step, layer=task.awaits.layer)
            self._queue.push(self._now_s + self._costs.hop_s, due)
        if task.awaits is not None and task.awaits not in self._up:
            self._blocked, self._blocked_since_s = task, self._now_s
        else:
            self._compute(task)

    def _compute(self, task: DeviceTask) -> None:
        if task.awaits is not None:
            self._up.remove(task.awaits)
        self._queue.push(self._now_s + task.seconds, _DeviceDone(task), priority=1)

    def _finish_task(self, task: DeviceTask) -> None:
        self._step_ends_s[task.step] = self._now_s
        if task.seconds > 0.0:
            self._add_span(WorkStream.GPU, task.step, task.layer, self._now_s - task.seconds)
        if task.announces is not None:
            self._queue.push(self._now_s + self._costs.hop_s, task.announces)
            if (task.step, task.layer) == (0, 0):  # the live driver, too, tells after the first step what layers cost
                measured = CostsMeasured(step=0, layers=self._costs.measured)
                self._queue.push(self._now_s + self._costs.hop_s, measured)
        self._next_task()

    def _arrive(self, op: Op) -> None:
        self._up.add(op)
        task = self._blocked
        if task is not None and task.awaits == op:
            self._blocked = None
            self._waits.append(Wait(step=op.step, layer=op.layer, start_s=self._blocked_since_s, end_s=self._now_s))
            self._compute(task)

    # the lanes

    def _start_op(self, lane: Lane) -> None:
        state = self._lanes[lane]
        if state.op is not None or not state.waiting:
            return
        state.op = op = state.waiting.popleft()
        cost = self._costs.layers[op.layer]
        state.left_s = {WorkStream.D2H: cost.d2h_s, WorkStream.CPU: cost.cpu_s, WorkStream.H2D: cost.h2d_s}[op.stream]
        state.start_s = state.since_s = self._now_s
        state.rate = 0.0  # set below, together with the other direction's
        self._set_rates(lane)

    def _finish_op(self, lane: Lane) -> None:
        state = self._lanes[lane]
        op, state.op = state.op, None
        assert op is not None, "an end that holds belongs to an operation"
        self._add_span(op.stream, op.step, op.layer, state.start_s)
        if op.stream is WorkStream.H2D:
            self._arrive(op)
        self._queue.push(self._now_s + self._costs.hop_s, OpDone(op=op))
        self._set_rates(lane)
        self._start_op(lane)

    def _set_rates(self, changed: Lane) -> None:
        """Give every copy under way the rate it has from now on; a shard's rate never changes."""
        lanes = [(stream, 0) for stream in _LINK] if changed[0] in _LINK else [changed]
        busy = [(lane, self._lanes[lane]) for lane in lanes if lane in self._lanes and self._lanes[lane].op]
        rate = self._costs.shared_link_rate if len(busy) > 1 else 1.0
        for lane, state in busy:
            if state.rate == rate:
                continue
            state.left_s = max(0.0, state.left_s - (self._now_s - state.since_s) * state.rate)
            state.since_s, state.rate = self._now_s, rate
            state.version += 1
            self._queue.push(self._now_s + state.left_s / rate, _LaneDone(lane, state.version))

    # the record

    def _add_span(self, stream: WorkStream, step: int, layer: int, start_s: float) -> None:
        self._spans.append(Span(stream=stream, step=step, layer=layer, start_s=start_s, end_s=self._now_s))

    def _figures(self) -> Iterator[SimulatedStep]:
        start_s = 0.0
        for step in range(self._num_steps):
            end_s = self._step_ends_s[step]
            waits = [wait for wait in self._waits if start_s <= wait.start_s < end_s]
            yield SimulatedStep(
                step=step,
                step_s=end_s - start_s,
                exposed=exposed(waits, self._spans),
                busy_s={stream: busy_s(self._spans, stream, start_s, end_s) for stream in WorkStream},
            )
            start_s = end_s
