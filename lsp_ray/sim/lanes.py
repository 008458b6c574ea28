"""Lanes of a simulation: each executes one operation at a time, at a rate that depends on who else is busy."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lsp_ray.schedule.ops import Op
from lsp_ray.schedule.policy import Lane
from lsp_ray.sim.costs import StepCosts
from lsp_ray.sim.streaming import WeightsUp
from lsp_ray.trace import WorkStream

_LINK = (WorkStream.D2H, WorkStream.H2D)


@dataclass(slots=True)
class LaneState:
    """A lane: operations launched and waiting, and the one under way with the seconds it needs at full rate.

    Operations wait with their deadlines; `weights` wait beside them.
    """

    waiting: deque[tuple[Op, int]] = field(default_factory=deque)
    weights: WeightsUp | None = None
    op: Op | WeightsUp | None = None
    start_s: float = 0.0
    left_s: float = 0.0
    rate: float = 1.0
    since_s: float = 0.0
    version: int = 0


class Lanes:
    """All lanes of a run.

    Args:
        costs: Of a step.
        hosts_of: The hosts whose memory a lane's operations read or write.
        ends: Told when a lane's operation will be over, with the version of that promise: a later one takes its place.
    """

    def __init__(
        self,
        costs: StepCosts,
        hosts_of: Callable[[Lane], Sequence[int]],
        ends: Callable[[float, Lane, int], None],
    ) -> None:
        self._costs, self._hosts_of, self._ends = costs, hosts_of, ends
        self._states: dict[Lane, LaneState] = {}
        self._lanes_of_host: dict[int, list[Lane]] = {}

    def add(self, lane: Lane, op: Op | WeightsUp, due: int = 0) -> None:
        """Let `op` wait for its turn: operations in this order, weights until no operation is due as soon."""
        if lane not in self._states:
            self._states[lane] = LaneState()
            for host in self._hosts_of(lane):
                self._lanes_of_host.setdefault(host, []).append(lane)
        state = self._states[lane]
        if isinstance(op, WeightsUp):
            state.weights = op
        else:
            state.waiting.append((op, due))

    def next_op(self, lane: Lane) -> Op | WeightsUp | None:
        """What a lane may start now; None while it is busy or has nothing to do."""
        state = self._states.get(lane)
        if state is None or state.op is not None:
            return None
        if state.weights is not None and (not state.waiting or state.weights.due < state.waiting[0][1]):
            return state.weights
        return state.waiting[0][0] if state.waiting else None

    def start(self, lane: Lane, now_s: float) -> None:
        """Start `next_op`."""
        state, op = self._states[lane], self.next_op(lane)
        assert op is not None, "there is something to start"
        state.op = op
        if isinstance(op, WeightsUp):
            state.weights = None
        else:
            state.waiting.popleft()
        state.left_s = self._seconds(op)
        state.start_s = state.since_s = now_s
        state.rate = 0.0  # set below, together with the others'
        self._set_rates(lane, now_s)

    def _seconds(self, op: Op | WeightsUp) -> float:
        cost = self._costs.layers[op.layer]
        if isinstance(op, WeightsUp):
            return cost.weights_s
        return {WorkStream.D2H: cost.d2h_s, WorkStream.CPU: cost.cpu_s, WorkStream.H2D: cost.h2d_s}[op.stream]

    def finish(self, lane: Lane, version: int, now_s: float) -> tuple[Op | WeightsUp, float] | None:
        """End a lane's operation and return it with its start; None where the promise no longer holds."""
        state = self._states[lane]
        if state.version != version:
            return None
        op, state.op = state.op, None
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
        """The lanes beside it: both directions of a link; where hosts are shared, all of its hosts."""
        if self._costs.host is not None:
            return list(dict.fromkeys(lane for host in self._hosts_of(changed) for lane in self._lanes_of_host[host]))
        return [(stream, changed[1]) for stream in _LINK] if changed[0] in _LINK else [changed]

    def _rate(self, lane: Lane) -> float:
        stream, gpu = lane
        both = stream in _LINK and all(self._is_busy((way, gpu)) for way in _LINK)
        rate = self._costs.shared_link_rate if both else 1.0
        shares = self._costs.host
        if shares is None:
            return rate
        taken = max(
            sum(shares.of(other[0]) for other in self._lanes_of_host[host] if self._is_busy(other))
            for host in self._hosts_of(lane)
        )
        return rate / max(1.0, taken)

    def _is_busy(self, lane: Lane) -> bool:
        state = self._states.get(lane)
        return state is not None and state.op is not None
