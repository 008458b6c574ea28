"""Policies: events in, actions out. Layer 0 is the shallowest, the first that the next forward needs.

Every layer passes through the same three operations (D2H, CPU, H2D). A step has equal parts, of which a GPU computes
one or more in turn: each part's payload goes down by itself, the update is of their sum, and its delta comes up to
every GPU. A lane executes operations: one for each shard, and for each direction of each GPU's link one to each machine
that has shards. A policy decides in which order a lane takes what is ready.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from typing import ClassVar

from lsp_ray.schedule.delta_room import DeltaRoom
from lsp_ray.schedule.ops import (
    Action,
    CostsMeasured,
    DeltaDue,
    Event,
    GradientReady,
    Launch,
    Op,
    OpDone,
    StepAgain,
    StepJudged,
    StepRun,
)
from lsp_ray.schedule.transition import transition_layer
from lsp_ray.trace import WorkStream

_WAY = (WorkStream.D2H, WorkStream.CPU, WorkStream.H2D)
_NEXT_STREAM = {WorkStream.D2H: WorkStream.CPU, WorkStream.CPU: WorkStream.H2D}

Lane = tuple[WorkStream, int]  # the stream; of the CPU the shard, else GPU · machines with shards + the layer's
_LayerStep = tuple[WorkStream, int, int]  # a layer's pass through a stream: the step, the layer


class Policy(ABC):
    """Order of operations for layers 0 … num_layers-1.

    Args:
        shard_of_layer: The shard that owns each layer's optimizer state; its length is the number of layers.
        depth: Operations a lane may hold at once. Two hide the way of a message behind the operation before it;
            more would take decisions too early.
        speculates: Whether updates are launched before their step is judged. Their deltas then go up only after that,
            and the updates are launched a second time where the step does not stand.
        room: For deltas on a GPU; None does not bound them.
        gpu_of_part: The GPU that computes each part of a step; GPUs are numbered from 0 without a gap.
        home_of_layer: The machine of each layer's shard, numbered in the same way; default: there is one.

    Attributes:
        staleness: Steps by which a delta is late on purpose: that of step t is added before the forward of step
            t + 1 + staleness. Whoever executes must keep to it.
    """

    staleness: ClassVar[int] = 0

    def __init__(
        self,
        shard_of_layer: Sequence[int],
        *,
        depth: int = 2,
        speculates: bool = False,
        room: DeltaRoom | None = None,
        gpu_of_part: Sequence[int] = (0,),
        home_of_layer: Sequence[int] = (),
    ) -> None:
        self.speculates = speculates
        self.room = room
        self.gpu_of_part = tuple(gpu_of_part)
        self.num_gpus = len(set(gpu_of_part))
        self._parts = {
            WorkStream.D2H: range(len(gpu_of_part)),
            WorkStream.CPU: range(1),
            WorkStream.H2D: range(self.num_gpus),
        }
        self.num_layers = len(shard_of_layer)
        self._shard_of_layer = tuple(shard_of_layer)
        self.home_of_layer = tuple(home_of_layer) or (0,) * self.num_layers
        self.num_homes = max(self.home_of_layer, default=0) + 1
        self._depth = depth
        self._begin(-1)

    def _begin(self, last_judged: int) -> None:
        self._due: dict[int, tuple[int, int]] = {}  # GPU -> step and layer of the furthest delta that it has come to
        self._ready: dict[Lane, list[Op]] = {}
        self._in_flight: Counter[Lane] = Counter()
        self._num_done: Counter[tuple[WorkStream, int]] = Counter()  # layers, with all their parts
        self._to_do: dict[_LayerStep, int] = {}  # parts that are not done, of layers announced by a gradient
        self._last_judged = self._last_run = last_judged
        self._early: dict[Op, bool] = {}  # updates launched before their step was judged -> whether they have ended
        self._void: set[Op] = set()  # updates under way that must be made again

    def handle(self, event: Event) -> list[Action]:
        """Return the operations to launch now that `event` happened."""
        match event:
            case OpDone():
                self._complete(event.op)
            case GradientReady():
                self._announce(event)
            case DeltaDue(step=step, layer=layer, gpu=gpu):
                self._due[gpu] = max(self._due.get(gpu, (step, layer)), (step, layer))
            case CostsMeasured():
                self.learn(event)
            case StepJudged():
                self._judge(event)
            case StepRun(step=step):
                self._last_run = step
            case StepAgain(step=step):
                self._begin(step - 1)
        free = [lane for lane, queue in self._ready.items() if queue and self._in_flight[lane] < self._depth]
        return [Launch(op=op) for lane in sorted(free) for op in self._take(lane)]

    @abstractmethod
    def urgency(self, op: Op, position: int) -> tuple[int, ...]:
        """Sort key among the ready operations of a lane, smallest first; `position` counts arrivals in the lane."""

    def admits(self, op: Op) -> bool:
        """Whether a ready operation may be launched yet."""
        return True

    def learn(self, costs: CostsMeasured) -> None:  # noqa: B027 - a hook: nothing to do is an answer
        """Take note of what the layers cost; most policies do not care."""

    def all_done(self, stream: WorkStream, step: int) -> bool:
        """Whether every layer has finished its operation on `stream` for `step`."""
        return self._num_done[stream, step] == self.num_layers

    def _announce(self, ready: GradientReady) -> None:
        if len(self._due) < self.num_gpus:
            self._due = dict.fromkeys(self._parts[WorkStream.H2D], (ready.step, 0)) | self._due
        if (WorkStream.D2H, ready.step, ready.layer) not in self._to_do:  # by the first of its parts
            self._to_do.update(((stream, ready.step, ready.layer), len(parts)) for stream, parts in self._parts.items())
        self._enqueue(Op(stream=WorkStream.D2H, step=ready.step, layer=ready.layer, part=ready.part))

    def _enqueue(self, op: Op) -> None:
        self._ready.setdefault(self.lane_of(op), []).append(op)

    def lane_of(self, op: Op) -> Lane:
        """Who executes an operation."""
        match op.stream:
            case WorkStream.CPU:
                return op.stream, self._shard_of_layer[op.layer]
            case WorkStream.D2H:
                gpu = self.gpu_of_part[op.part]
            case _:
                gpu = op.part
        return op.stream, gpu * self.num_homes + self.home_of_layer[op.layer]

    def _complete(self, op: Op) -> None:
        self._in_flight[self.lane_of(op)] -= 1
        if self._void and op in self._void:
            self._void.remove(op)
            self._enqueue(op)
        elif self._early and op in self._early:
            self._early[op] = True
        else:
            self._finish(op)

    def _judge(self, event: StepJudged) -> None:
        self._last_judged = event.step
        for op in [op for op in self._early if op.step == event.step]:
            has_ended = self._early.pop(op)
            if has_ended and event.stands:
                self._finish(op)
            elif has_ended:
                self._enqueue(op)
            elif not event.stands:
                self._void.add(op)

    def _finish(self, op: Op) -> None:
        layer = op.stream, op.step, op.layer
        self._to_do[layer] -= 1
        if self._to_do[layer] > 0:
            return
        del self._to_do[layer]
        self._num_done[op.stream, op.step] += 1
        if self.all_done(WorkStream.H2D, op.step):  # nobody will ask for this step any more
            for stream in _WAY:
                del self._num_done[stream, op.step]
        if op.stream in _NEXT_STREAM:
            after = _NEXT_STREAM[op.stream]
            for part in self._parts[after]:
                self._enqueue(Op(stream=after, step=op.step, layer=op.layer, part=part))

    def _take(self, lane: Lane) -> list[Op]:
        queue = self._ready[lane]
        in_order: Sequence[int] = range(len(queue))
        if len(queue) > 1:
            in_order = sorted(in_order, key=lambda position: self.urgency(queue[position], position))
        startable = (position for position in in_order if self._may_start(queue[position]))
        taken = list(islice(startable, self._depth - self._in_flight[lane]))
        if not taken:
            return []
        ops = [queue[position] for position in taken]
        self._in_flight[lane] += len(ops)
        if self.speculates and lane[0] is WorkStream.CPU:
            self._early.update({op: False for op in ops if op.step > self._last_judged})
        self._ready[lane] = [op for position, op in enumerate(queue) if position not in taken]
        return ops

    def _may_start(self, op: Op) -> bool:
        return self.admits(op) and self._finds_slot(op) and self._finds_room(op) and self._keeps_together(op)

    def _keeps_together(self, op: Op) -> bool:
        """Whether `op` lets no GPU go on to weights that another one, if it is lost, will never have.

        The first layer's delta opens a step: it comes up once the step before is over on all GPUs and its payloads are
        down. So the others still have the weights of the step that a lost one is missing in.
        """
        if op.stream is not WorkStream.H2D or op.layer > 0 or self.num_gpus == 1:
            return True
        return op.step <= self._last_run and self.all_done(WorkStream.D2H, op.step)

    def _finds_room(self, op: Op) -> bool:
        """Whether the device may hold the delta, if `op` brings one up."""
        if self.room is None or op.stream is not WorkStream.H2D:
            return True
        due, delta = self._due[op.part], (op.step, op.layer)
        return delta <= due or self.room.holds(due, delta)

    def _finds_slot(self, op: Op) -> bool:
        """Whether the slot that `op` writes has been read by all its readers: it is the same in every step."""
        reader = _NEXT_STREAM.get(op.stream)
        return reader is None or (reader, op.step - 1, op.layer) not in self._to_do


class LayerwiseFcfs(Policy):
    """Each layer's way down, through its update and up starts as soon as its gradient is there, in order of arrival."""

    def urgency(self, op: Op, position: int) -> tuple[int, ...]:
        """First come, first served."""
        return (position,)


class EarliestDeadline(Policy):
    """As layerwise; among the ready goes first what the next forward needs first."""

    def urgency(self, op: Op, position: int) -> tuple[int, ...]:
        """The start of its forward is a delta's deadline: the older step, then the shallower layer."""
        return op.step, op.layer


class Layerwise(Policy):
    """Each layer's way down, through its update and up starts as soon as its gradient is there (paper, Section 4).

    Deep layers are served first come, first served; from the transition layer on the shallowest goes first, so that the
    deep layers' backlog does not hold up the layers that the next forward needs first.

    Args:
        transition_layer: Layers below it overtake; default: half of the layers until their costs are measured, then
            what `transition_layer` computes from them.
    """

    def __init__(
        self,
        shard_of_layer: Sequence[int],
        *,
        depth: int = 2,
        speculates: bool = False,
        room: DeltaRoom | None = None,
        gpu_of_part: Sequence[int] = (0,),
        home_of_layer: Sequence[int] = (),
        transition_layer: int | None = None,
    ) -> None:
        super().__init__(
            shard_of_layer,
            depth=depth,
            speculates=speculates,
            room=room,
            gpu_of_part=gpu_of_part,
            home_of_layer=home_of_layer,
        )
        self._learns = transition_layer is None
        self.transition_layer = self.num_layers // 2 if transition_layer is None else transition_layer

    def urgency(self, op: Op, position: int) -> tuple[int, ...]:
        """Shallow layers by depth, then deep layers by arrival."""
        return (0, op.layer) if op.layer < self.transition_layer else (1, position)

    def learn(self, costs: CostsMeasured) -> None:
        """Put the transition where these costs ask for it, unless it was given."""
        if self._learns:
            self.transition_layer = transition_layer(costs.layers, self._shard_of_layer)


class Sequential(Policy):
    """Zero-Offload's order: gradients go down during the backward, then all updates run, then all deltas come up."""

    def urgency(self, op: Op, position: int) -> tuple[int, ...]:
        """First come, first served; on the way up the next forward's first layer first."""
        return (op.layer,) if op.stream is WorkStream.H2D else (position,)

    def admits(self, op: Op) -> bool:
        """An update waits for every payload of its step, a prefetch for every update."""
        match op.stream:
            case WorkStream.CPU:
                return self.all_done(WorkStream.D2H, op.step)
            case WorkStream.H2D:
                return self.all_done(WorkStream.CPU, op.step)
        return True


class Delayed(Sequential):
    """Zero-Offload's order with updates one step late: that of step t runs beside step t + 1.

    The order is sequential's, but what the device trains with is not: it says so by its staleness.
    """

    staleness = 1


POLICIES: dict[str, type[Policy]] = {
    "sequential": Sequential,
    "delayed": Delayed,
    "layerwise_fcfs": LayerwiseFcfs,
    "layerwise": Layerwise,
    "earliest_deadline": EarliestDeadline,
}
