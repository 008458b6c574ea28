"""Timeline: a pure executor. Lanes take as long as they are told; a device waits for its deltas."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from lsp_ray.schedule.ops import DeltaDue, Event, GradientReady, LayerSeconds, Op, OpDone
from lsp_ray.schedule.policy import Lane, Policy
from lsp_ray.trace import WorkStream


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """An operation and its times; `ready_s` is when the one before it, or the gradient, was there."""

    op: Op
    ready_s: float
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """A delta and the step whose forward it was added before."""

    delta_step: int
    layer: int
    step: int
    at_s: float


@dataclass(kw_only=True)
class Timeline:
    """Runs steps: forward from shallow to deep, each layer with its delta, then backward from deep to shallow.

    `ran` and `applied` hold what happened, in order. Where the policy bounds what waits on the device, what is left
    after the last step is added as step `num_steps`.
    """

    policy: Policy
    shard_of_layer: Sequence[int]
    layers: Sequence[LayerSeconds]
    num_steps: int
    ran: list[Ran] = field(default_factory=list)
    applied: list[Applied] = field(default_factory=list)
    now_s: float = 0.0

    def run(self) -> None:
        """Return once nothing more happens; a policy that holds back for ever leaves operations missing."""
        self._heap: list[tuple[float, int, Event | None]] = []
        self._lane_free_s: dict[Lane, float] = {}
        self._ready_s: dict[Op, float] = {}
        self._done: set[Op] = set()
        self._count = 0
        self._device = self._steps()
        self._advance_device()
        while self._heap:
            self.now_s, _, event = heapq.heappop(self._heap)
            if event is not None:
                self._handle(event)
            self._advance_device()

    def _steps(self) -> Iterator[float | Op]:
        """Yield seconds that the device computes, or a delta's way up that it waits for."""
        depth = len(self.layers)
        for step in range(self.num_steps):
            for layer in range(depth):
                delta_step = step - 1 - self.policy.staleness
                if delta_step >= 0:
                    yield from self._delta(delta_step, layer, step)
                yield self.layers[layer].forward_s
            for layer in reversed(range(depth)):
                yield self.layers[layer].backward_s
                self._push(0.0, GradientReady(step=step, layer=layer))
        if self.policy.room is not None:
            for delta_step in range(max(0, self.num_steps - 1 - self.policy.staleness), self.num_steps):
                for layer in range(depth):
                    yield from self._delta(delta_step, layer, self.num_steps)

    def _delta(self, delta_step: int, layer: int, step: int) -> Iterator[Op]:
        if self.policy.room is not None:
            self._push(0.0, DeltaDue(step=delta_step, layer=layer))
        yield Op(stream=WorkStream.H2D, step=delta_step, layer=layer)
        self.applied.append(Applied(delta_step=delta_step, layer=layer, step=step, at_s=self.now_s))

    _waits_for: float | Op | None = 0.0  # time at which the device goes on, or the delta it waits for

    def _advance_device(self) -> None:
        while self._waits_for is not None and self._is_there(self._waits_for):
            wanted = next(self._device, None)
            self._waits_for = self.now_s + wanted if isinstance(wanted, float) else wanted
            if isinstance(wanted, float):
                self._push(wanted, None)

    def _is_there(self, wanted: float | Op) -> bool:
        return wanted in self._done if isinstance(wanted, Op) else wanted <= self.now_s

    def _handle(self, event: Event) -> None:
        match event:
            case OpDone(op=op):
                self._done.add(op)
                following = {WorkStream.D2H: WorkStream.CPU, WorkStream.CPU: WorkStream.H2D}
                if op.stream in following:
                    self._ready_s[Op(stream=following[op.stream], step=op.step, layer=op.layer)] = self.now_s
            case GradientReady(step=step, layer=layer):
                self._ready_s[Op(stream=WorkStream.D2H, step=step, layer=layer)] = self.now_s
        for action in self.policy.handle(event):
            self._launch(action.op)

    def _launch(self, op: Op) -> None:
        lane = op.stream, self.shard_of_layer[op.layer] if op.stream is WorkStream.CPU else 0
        start_s = max(self.now_s, self._lane_free_s.get(lane, 0.0))
        end_s = self._lane_free_s[lane] = start_s + self._cost_s(op)
        self.ran.append(Ran(op=op, ready_s=self._ready_s[op], start_s=start_s, end_s=end_s))
        self._push(end_s - self.now_s, OpDone(op=op))

    def _cost_s(self, op: Op) -> float:
        costs = self.layers[op.layer]
        return {WorkStream.D2H: costs.d2h_s, WorkStream.CPU: costs.cpu_s, WorkStream.H2D: costs.h2d_s}[op.stream]

    def _push(self, after_s: float, event: Event | None) -> None:
        self._count += 1  # of two events at one time the one pushed first happens first
        heapq.heappush(self._heap, (self.now_s + after_s, self._count, event))
