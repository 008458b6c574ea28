"""Simulator: runs a live policy on costs instead of machines.

Each GPU computes its plan; each lane (of a direction of a GPU's link, or a shard) executes one operation at a time, in
the order in which the policy launched them; what is at home on another machine crosses the network as well. Where
weights come up from main memory, or blocks' inputs go there and back, they take turns with deltas and payloads, by
deadline.
Nothing is random, so the same costs give the same trace to the last bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from lsp_ray.errors import ConfigError
from lsp_ray.schedule.ops import CostsMeasured, DeltaDue, Event, GradientReady, Op, OpDone, StepRun
from lsp_ray.schedule.policy import Lane, Policy
from lsp_ray.sim.copies import Copy, Mover, waited_s
from lsp_ray.sim.costs import StepCosts
from lsp_ray.sim.device_plan import DeviceTask, device_tasks
from lsp_ray.sim.event_queue import EventQueue
from lsp_ray.sim.lanes import Lanes
from lsp_ray.sim.parked_inputs import ParkedInputs
from lsp_ray.sim.simulation import SimulatedStep, Simulation
from lsp_ray.sim.streaming import StreamingGpu
from lsp_ray.trace import Cause, Span, Wait, WorkStream, busy_s, exposed


@dataclass(slots=True)
class _Gpu:
    """A GPU: what it has still to compute, and the task that waits for its delta."""

    index: int
    tasks: Iterator[DeviceTask]
    up: set[Op] = field(default_factory=set)  # deltas on it that no forward has asked for
    blocked: DeviceTask | None = None
    blocked_since_s: float = 0.0
    waits: list[Wait] = field(default_factory=list)
    movers: dict[Cause, Mover] = field(default_factory=dict)  # in the order in which a task needs what they move


@dataclass(frozen=True, slots=True)
class _DeviceDone:
    gpu: _Gpu
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
        policy: Who decides, fresh, and says which GPU computes which part; None where nothing leaves the device.
        shard_of_layer: What the policy was made with.
        num_steps: Enough for the pipeline to fill; the figures to read are the last step's.

    Raises:
        ConfigError: The arguments do not fit each other.
    """

    def __init__(
        self,
        costs: StepCosts,
        policy: Policy | None,
        shard_of_layer: Sequence[int],
        *,
        num_steps: int = 6,
    ) -> None:
        if num_steps < 1:
            raise ConfigError("sim.num_steps", "be at least 1", num_steps)
        if policy is not None and not policy.num_layers == len(shard_of_layer) == len(costs.layers):
            bound = f"name a shard for each of the {len(costs.layers)} layers, as its policy does"
            raise ConfigError("sim.shard_of_layer", bound, len(shard_of_layer))
        self._costs, self._policy, self._shard_of_layer = costs, policy, shard_of_layer
        self._num_steps = num_steps
        self._is_bounded = policy is not None and policy.room is not None
        self._gpu_of_part = policy.gpu_of_part if policy is not None else (0,)
        self._gpus = [self._new_gpu(gpu) for gpu in range(max(self._gpu_of_part) + 1)]
        self._queue: EventQueue[_Happening] = EventQueue()
        if costs.network is not None and len(costs.network.at or (0,)) != len(self._gpus):
            raise ConfigError("sim.at", f"be of {len(self._gpus)} GPUs", costs.network.at)
        self._num_homes = policy.num_homes if policy is not None else 1
        self._lanes = Lanes(costs, self._num_homes, lambda at_s, *promise: self._queue.push(at_s, _LaneDone(*promise)))
        self._now_s = 0.0
        self._spans: list[Span] = []
        self._waits: list[Wait] = []
        self._num_over: Counter[int] = Counter()  # step -> its parts whose backward is over
        self._step_ends: dict[int, tuple[float, _Gpu]] = {}

    def run(self) -> Simulation:
        """Run until every delta is up.

        Raises:
            ConfigError: The policy left a GPU waiting for a delta for ever.
        """
        for gpu in self._gpus:
            for cause in gpu.movers:
                self._bring(gpu, cause)
            self._next_task(gpu)
        while self._queue:
            self._now_s, happening = self._queue.pop()
            self._happen(happening)
        for gpu in self._gpus:
            if gpu.blocked is not None:
                raise ConfigError("sim.policy", "bring every delta up", f"none for {gpu.blocked.awaits}")
        return Simulation(spans=tuple(self._spans), waits=tuple(self._waits), steps=tuple(self._figures()))

    def _happen(self, happening: _Happening) -> None:
        match happening:
            case _DeviceDone(gpu=gpu, task=task):
                self._finish_task(gpu, task)
            case _LaneDone(lane=lane, version=version):
                self._finish_op(lane, version)
            case event:
                self._decide(event)

    def _decide(self, event: Event) -> None:
        assert self._policy is not None, "without a policy nothing is announced"
        for action in self._policy.handle(event):
            lane = self._policy.lane_of(action.op)
            is_link = action.op.stream in (WorkStream.D2H, WorkStream.H2D)
            movers = self._gpus[lane[1] // self._num_homes].movers if is_link else {}
            mover = next(iter(movers.values()), None)
            self._lanes.add(lane, action.op, 0 if mover is None else mover.delta_due(action.op))
            self._lanes.start(lane, self._now_s)

    # the GPUs

    def _new_gpu(self, index: int) -> _Gpu:
        parts = [part for part, gpu in enumerate(self._gpu_of_part) if gpu == index]
        if not parts:
            raise ConfigError("sim.gpu_of_part", f"give GPU {index} a part", self._gpu_of_part)
        tasks = device_tasks(
            self._costs,
            self._num_steps,
            offloads=self._policy is not None,
            staleness=self._policy.staleness if self._policy is not None else 0,
            drains=self._is_bounded,
            gpu=index,
            parts=parts,
        )
        staleness = self._policy.staleness if self._policy is not None else 0
        num_passes = len(parts) * self._costs.num_micro_batches
        gpu = _Gpu(index=index, tasks=tasks)
        if self._costs.num_buffers:
            gpu.movers[Cause.WEIGHTS] = StreamingGpu(index, self._costs, num_passes, staleness)
        if any(layer.input_d2h_s for layer in self._costs.layers):
            gpu.movers[Cause.ACTIVATIONS] = ParkedInputs(index, parts[0], self._costs, num_passes, staleness)
        return gpu

    def _next_task(self, gpu: _Gpu) -> None:
        task = next(gpu.tasks, None)
        if task is None:
            return
        self._enter(gpu, task, tuple(gpu.movers))

    def _enter(self, gpu: _Gpu, task: DeviceTask, causes: Sequence[Cause]) -> None:
        """Come to a task that may still wait for what these move."""
        for cause in causes:
            is_there = gpu.movers[cause].enter(task, self._now_s)
            self._bring(gpu, cause)  # into the place of those that are read no more
            if not is_there:
                return
        self._await_delta(gpu, task)

    def _await_delta(self, gpu: _Gpu, task: DeviceTask) -> None:
        if self._is_bounded and task.awaits is not None:
            due = DeltaDue(step=task.awaits.step, layer=task.awaits.layer, gpu=gpu.index)
            self._queue.push(self._now_s + self._costs.hop_s, due)
        if task.awaits is not None and task.awaits not in gpu.up:
            gpu.blocked, gpu.blocked_since_s = task, self._now_s
        else:
            self._compute(gpu, task)

    def _compute(self, gpu: _Gpu, task: DeviceTask) -> None:
        if task.awaits is not None:
            gpu.up.remove(task.awaits)
        self._queue.push(self._now_s + task.seconds, _DeviceDone(gpu, task), priority=1)

    def _finish_task(self, gpu: _Gpu, task: DeviceTask) -> None:
        self._step_ends[task.step] = self._now_s, gpu
        if task.seconds > 0.0:
            self._add_span(WorkStream.GPU, task.step, task.layer, task.part, self._now_s - task.seconds)
        if task.announces is not None:
            self._announce(task.announces)
        self._next_task(gpu)

    def _announce(self, ready: GradientReady) -> None:
        self._queue.push(self._now_s + self._costs.hop_s, ready)
        self._num_over[ready.step] += ready.layer == 0
        if ready.layer > 0 or self._num_over[ready.step] < len(self._gpu_of_part):
            return
        if len(self._gpus) > 1:
            self._queue.push(self._now_s + self._costs.hop_s, StepRun(step=ready.step))
        if ready.step == 0:  # the live driver, too, tells after the first step what layers cost
            measured = CostsMeasured(step=0, layers=self._costs.measured)
            self._queue.push(self._now_s + self._costs.hop_s, measured)

    def _arrive(self, op: Op) -> None:
        gpu = self._gpus[op.part]
        gpu.up.add(op)
        task = gpu.blocked
        if task is not None and task.awaits == op:
            gpu.blocked = None
            wait = Wait(step=op.step, layer=op.layer, start_s=gpu.blocked_since_s, end_s=self._now_s)
            gpu.waits.append(wait)
            self._waits.append(wait)
            self._compute(gpu, task)

    # weights and blocks' inputs

    def _bring(self, gpu: _Gpu, cause: Cause) -> None:
        copy = gpu.movers[cause].next_copy()
        if copy is not None:
            lane = copy.stream, gpu.index * self._num_homes  # one for all homes, as they share the link
            self._lanes.add(lane, copy)
            self._lanes.start(lane, self._now_s)

    def _have_come(self, gpu: _Gpu, cause: Cause, start_s: float) -> None:
        task = gpu.movers[cause].arrive(start_s, self._now_s)
        self._bring(gpu, cause)
        if task is not None:
            causes = tuple(gpu.movers)
            self._enter(gpu, task, causes[causes.index(cause) + 1 :])

    # the lanes

    def _finish_op(self, lane: Lane, version: int) -> None:
        ended = self._lanes.finish(lane, version, self._now_s)
        if ended is None:
            return
        op, start_s = ended
        if isinstance(op, Copy):
            self._have_come(self._gpus[lane[1] // self._num_homes], op.cause, start_s)
            self._lanes.start(lane, self._now_s)
            return
        self._add_span(op.stream, op.step, op.layer, op.part, start_s)
        if op.stream is WorkStream.H2D:
            self._arrive(op)
        self._queue.push(self._now_s + self._costs.hop_s, OpDone(op=op))
        self._lanes.start(lane, self._now_s)

    # the record

    def _add_span(self, stream: WorkStream, step: int, layer: int, part: int, start_s: float) -> None:
        self._spans.append(Span(stream=stream, step=step, layer=layer, start_s=start_s, end_s=self._now_s, part=part))

    def _figures(self) -> Iterator[SimulatedStep]:
        start_s = 0.0
        for step in range(self._num_steps):
            end_s, last = self._step_ends[step]
            waits = [wait for wait in last.waits if start_s <= wait.start_s < end_s]
            yield SimulatedStep(
                step=step,
                step_s=end_s - start_s,
                exposed=replace(
                    exposed(waits, self._spans),
                    weights_s=waited_s(last.movers.get(Cause.WEIGHTS), start_s, end_s),
                    activations_s=waited_s(last.movers.get(Cause.ACTIVATIONS), start_s, end_s),
                ),
                busy_s={stream: self._busy_s(stream, last, start_s, end_s) for stream in WorkStream},
            )
            start_s = end_s

    def _busy_s(self, stream: WorkStream, gpu: _Gpu, start_s: float, end_s: float) -> float:
        """Of this GPU's lane; of updates, all."""
        spans = [*self._spans, *(span for mover in gpu.movers.values() for span in mover.spans)]
        own = [span for span in spans if span.stream is stream and self._gpu_of(span) in (None, gpu.index)]
        return busy_s(own, stream, start_s, end_s)

    def _gpu_of(self, span: Span) -> int | None:
        """The GPU whose lane it was; None: a shard's."""
        match span.stream:
            case WorkStream.CPU:
                return None
            case WorkStream.H2D:
                return span.part
        return self._gpu_of_part[span.part]
