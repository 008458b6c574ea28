"""Lanes of a simulation: each executes one operation at a time, at a rate that depends on who else is busy.

A GPU on another machine has a payload on its link first and then on the network, a delta the other way round; its lane
is busy with one all the while.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from lsp_ray.schedule.ops import Op
from lsp_ray.schedule.policy import Lane
from lsp_ray.sim.copies import Copy
from lsp_ray.sim.costs import StepCosts
from lsp_ray.trace import WorkStream

_LINK = (WorkStream.D2H, WorkStream.H2D)


@dataclass(slots=True)
class LaneState:
    """A lane: operations launched and waiting, and the one under way with the seconds it needs at full rate.

    `crosses` says that it is on the network, `then_s` what it needs after that, or before. Operations wait with their
    deadlines; `copies` wait beside them.
    """

    waiting: deque[tuple[Op, int]] = field(default_factory=deque)
    copies: list[Copy] = field(default_factory=list)
    op: Op | Copy | None = None
    crosses: bool = False
    then_s: float | None = None
    start_s: float = 0.0
    left_s: float = 0.0
    rate: float = 1.0
    since_s: float = 0.0
    version: int = 0


class Lanes:
    """All lanes of a run.

    Args:
        costs: Of a step.
        ends: Told when a lane's operation will be over, with the version of that promise: a later one takes its place.
    """

    def __init__(self, costs: StepCosts, ends: Callable[[float, Lane, int], None]) -> None:
        self._costs, self._ends = costs, ends
        self._states: dict[Lane, LaneState] = {}

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
            state.op, state.left_s = copy, copy.seconds
        elif state.waiting:
            state.op, _ = state.waiting.popleft()
            self._set_seconds(state, state.op, lane[1])
        else:
            return
        state.start_s = state.since_s = now_s
        state.rate = 0.0  # set below, together with the others'
        self._set_rates(lane, now_s)

    def _set_seconds(self, state: LaneState, op: Op, index: int) -> None:
        cost, network = self._costs.layers[op.layer], self._costs.network
        state.left_s = {WorkStream.D2H: cost.d2h_s, WorkStream.CPU: cost.cpu_s, WorkStream.H2D: cost.h2d_s}[op.stream]
        if network is not None and op.stream in _LINK and network.away[index]:
            state.then_s = network.layers_s[op.layer]
            state.crosses = op.stream is WorkStream.H2D
            if state.crosses:
                state.left_s, state.then_s = state.then_s, state.left_s

    def finish(self, lane: Lane, version: int, now_s: float) -> tuple[Op | Copy, float] | None:
        """End a lane's operation and return it with its start; None where that is not its end yet."""
        state = self._states[lane]
        if state.version != version:
            return None
        if state.then_s is not None:
            state.left_s, state.then_s, state.crosses = state.then_s, None, not state.crosses
            state.since_s, state.rate = now_s, 0.0
            self._set_rates(lane, now_s)
            return None
        op, state.op, state.crosses = state.op, None, False
        assert op is not None, "an end that holds belongs to an operation"
        self._set_rates(lane, now_s)
        return op, state.start_s

    def _set_rates(self, changed: Lane, now_s: float) -> None:
        """Give every operation under way that the change concerns the rate it has from now on."""
        for lane in self._concerned(changed):
            state = self._states.get(lane)
            if state is None or state.op is None:
                continue
            rate = self._rate(lane)
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
        return [(stream, changed[1]) for stream in _LINK] if changed[0] in _LINK else [changed]

    def _rate(self, lane: Lane) -> float:
        if self._states[lane].crosses:
            return self._rate_between_machines(lane[0])
        stream, gpu = lane
        both = stream in _LINK and all(self._is_busy((way, gpu)) for way in _LINK)
        rate = self._costs.shared_link_rate if both else 1.0
        shares = self._costs.host
        if shares is None:
            return rate
        taken = sum(shares.of(other[0]) for other in self._states if self._is_busy(other))
        return rate / max(1.0, taken)

    def _rate_between_machines(self, direction: WorkStream) -> float:
        network = self._costs.network
        assert network is not None, "without a network nothing crosses one"
        num_beside = sum(
            network.away[gpu] for (stream, gpu), state in self._states.items() if stream is direction and state.crosses
        )
        return min(network.most, 1.0 / num_beside)

    def _is_busy(self, lane: Lane) -> bool:
        """On this machine's side of the network."""
        state = self._states.get(lane)
        return state is not None and state.op is not None and not state.crosses
