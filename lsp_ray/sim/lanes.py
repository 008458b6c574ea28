"""Lanes of a simulation: each executes one operation at a time, at a rate that depends on who else is busy.

A payload whose layer is at home on another machine is on its GPU's link first, is then added up with others of its
machine, where that is done, and crosses the network; a delta the other way round. Its lane is busy with one all the
while.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto

from lsp_ray.schedule.ops import Op
from lsp_ray.schedule.policy import Lane
from lsp_ray.sim.copies import Copy
from lsp_ray.sim.costs import StepCosts
from lsp_ray.sim.network_links import NetworkLinks
from lsp_ray.trace import WorkStream

_LINK = (WorkStream.D2H, WorkStream.H2D)


class Place(Enum):
    """Where an operation is."""

    HERE = auto()  # on its GPU's link or its shard
    SUM = auto()  # added up by a core
    NETWORK = auto()


@dataclass(slots=True)
class LaneState:
    """A lane: operations launched and waiting, and the one under way with the seconds it needs at full rate.

    `place` is where it is, `then` where it goes from there, with the seconds of each. Operations wait with their
    deadlines; `copies` wait beside them.
    """

    waiting: deque[tuple[Op, int]] = field(default_factory=deque)
    copies: list[Copy] = field(default_factory=list)
    op: Op | Copy | None = None
    place: Place | None = None
    then: deque[tuple[Place, float]] = field(default_factory=deque)
    start_s: float = 0.0
    left_s: float = 0.0
    rate: float = 1.0
    since_s: float = 0.0
    version: int = 0


class Lanes:
    """All lanes of a run.

    Args:
        costs: Of a step.
        num_homes: As the policy has them.
        ends: Told when a lane's operation will be over, with the version of that promise: a later one takes its place.
    """

    def __init__(self, costs: StepCosts, num_homes: int, ends: Callable[[float, Lane, int], None]) -> None:
        self._costs, self._num_homes, self._ends = costs, num_homes, ends
        self._states: dict[Lane, LaneState] = {}
        self._num_here: Counter[Lane] = Counter()  # by stream and GPU, or shard
        self._links = NetworkLinks(costs.network, num_homes) if costs.network is not None else None

    def add(self, lane: Lane, op: Op | Copy, due: int = 0) -> None:
        """Let `op` wait for its turn: operations in this order, copies until nothing is due as soon."""
        state = self._states.setdefault(lane, LaneState())
        if isinstance(op, Copy):
            state.copies.append(op)
        else:
            state.waiting.append((op, due))

    def start(self, lane: Lane, now_s: float) -> None:
        """Start what is to be next, where there is something and the lane is free."""
        state = self._states[lane]
        if state.op is not None:
            return
        copy = min(state.copies, key=lambda copy: copy.due, default=None)
        if copy is not None and (not state.waiting or copy.due < state.waiting[0][1]):
            state.copies.remove(copy)
            state.op, state.then = copy, deque([(Place.HERE, copy.seconds)])
        elif state.waiting:
            state.op, _ = state.waiting.popleft()
            state.then = deque(self._way(state.op, lane[1]))
        else:
            return
        state.start_s = now_s
        self._go_on(lane, state, now_s)

    def _way(self, op: Op, index: int) -> list[tuple[Place, float]]:
        """Where an operation goes, with seconds."""
        cost, network = self._costs.layers[op.layer], self._costs.network
        own_s = {WorkStream.D2H: cost.d2h_s, WorkStream.CPU: cost.cpu_s, WorkStream.H2D: cost.h2d_s}[op.stream]
        own = (Place.HERE, own_s)
        if network is None or op.stream not in _LINK or not network.crosses(*divmod(index, self._num_homes)):
            return [own]
        if op.stream is WorkStream.H2D:
            return [(Place.NETWORK, network.up_s[op.layer]), own]
        added = [(Place.SUM, network.sum_s[op.layer])] if network.sum_s and network.sum_s[op.layer] else []
        return [own, *added, (Place.NETWORK, network.down_s[op.layer])]

    def _go_on(self, lane: Lane, state: LaneState, now_s: float) -> None:
        """Come to the next place, or to the end."""
        self._count(lane, state.place, -1)
        state.place = None
        if state.then:
            state.place, state.left_s = state.then.popleft()
            state.since_s, state.rate = now_s, 0.0  # set below, together with the others'
            self._count(lane, state.place, 1)
        self._set_rates(lane, now_s)

    def _count(self, lane: Lane, place: Place | None, by: int) -> None:
        if place is Place.HERE:
            self._num_here[self._owner(lane)] += by
        elif place is Place.NETWORK:
            assert self._links is not None, "without a network nothing crosses one"
            self._links.change(lane[0], *divmod(lane[1], self._num_homes), by)

    def _owner(self, lane: Lane) -> Lane:
        """The GPU's direction, which several lanes share, or the shard."""
        stream, index = lane
        return (stream, index // self._num_homes) if stream in _LINK else lane

    def finish(self, lane: Lane, version: int, now_s: float) -> tuple[Op | Copy, float] | None:
        """End a lane's operation and return it with its start; None where that is not its end yet."""
        state = self._states[lane]
        if state.version != version:
            return None
        if state.then:
            self._go_on(lane, state, now_s)
            return None
        op, state.op = state.op, None
        assert op is not None, "an end that holds belongs to an operation"
        self._go_on(lane, state, now_s)
        return op, state.start_s

    def _set_rates(self, changed: Lane, now_s: float) -> None:
        """Give every operation under way that the change concerns the rate it has from now on."""
        for lane in self._concerned(changed):
            state = self._states.get(lane)
            if state is None or state.op is None:
                continue
            rate = self._rate(lane, state.place)
            if state.rate == rate:
                continue
            state.left_s = max(0.0, state.left_s - (now_s - state.since_s) * state.rate)
            state.since_s, state.rate = now_s, rate
            state.version += 1
            self._ends(now_s + state.left_s / rate, lane, state.version)

    def _concerned(self, changed: Lane) -> list[Lane]:
        """The lanes beside it: both directions of a link; where host or network are shared, all."""
        if self._costs.host is not None or self._costs.network is not None:
            return list(self._states)
        if changed[0] not in _LINK:
            return [changed]
        first = changed[1] // self._num_homes * self._num_homes
        return [(stream, first + home) for stream in _LINK for home in range(self._num_homes)]

    def _rate(self, lane: Lane, place: Place | None) -> float:
        if place is Place.NETWORK:
            assert self._links is not None, "without a network nothing crosses one"
            return self._links.rate(lane[0], *divmod(lane[1], self._num_homes))
        if place is Place.SUM:
            return 1.0
        stream, index = self._owner(lane)
        both = stream in _LINK and all(self._num_here[way, index] for way in _LINK)
        rate = self._costs.shared_link_rate if both else 1.0
        rate /= self._num_here[stream, index]
        shares = self._costs.host
        if shares is None:
            return rate
        taken = sum(shares.of(other) for (other, _), num in self._num_here.items() if num)
        return rate / max(1.0, taken)
