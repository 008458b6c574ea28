"""Network: how payloads get to their shard's node and deltas from it. Each node has a lane out and a lane in.

A transfer takes its seconds on both lanes, in order of departure on each; what comes in faster than a node takes it in
waits on its way. So many nodes that send to one at a time are served one after the other, and none of them stands
still for that: the lanes of all are busy together.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lsp_ray.errors import ConfigError
from lsp_ray.schedule.ops import Op
from lsp_ray.trace import WorkStream


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossing:
    """Seconds on a lane for what one layer sends, to or from one node.

    Attributes:
        sum_s: For a node's processors to add up what its GPUs send, beforehand; 0 where each part crosses by itself.
        down_s: All that a node's GPUs send.
        up_s: The delta, once.
    """

    sum_s: float = 0.0
    down_s: float
    up_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkCosts:
    """Who is where, and what crosses.

    Attributes:
        num_nodes: At least 2; each has a GPU.
        node_of_shard: Of each shard.
        nodes_of_gpu: Of each GPU that is simulated, the nodes that have one which does the same; it then stands for all
            of them, and gets a delta when the last of them has it.
        layers: Shallowest first.
    """

    num_nodes: int
    node_of_shard: tuple[int, ...]
    nodes_of_gpu: tuple[tuple[int, ...], ...]
    layers: tuple[Crossing, ...]

    def __post_init__(self) -> None:
        nodes = range(self.num_nodes)
        if not {node for nodes_of_one in self.nodes_of_gpu for node in nodes_of_one} == set(nodes) >= {0, 1}:
            raise ConfigError("sim.nodes_of_gpu", "name every node, of at least 2", self.nodes_of_gpu)
        if not set(self.node_of_shard) <= set(nodes):
            raise ConfigError("sim.node_of_shard", f"be nodes from 0 to {self.num_nodes - 1}", self.node_of_shard)


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """A layer's payload (D2H) or delta (H2D) from one node to another."""

    way: WorkStream
    step: int
    layer: int
    source: int
    target: int


@dataclass(frozen=True, slots=True)
class Summed:
    """What a node sends is ready to leave it."""

    transfer: Transfer


@dataclass(frozen=True, slots=True)
class Left:
    """The lane out of a node is free."""

    node: int


@dataclass(frozen=True, slots=True)
class Arrived:
    """A transfer is over."""

    transfer: Transfer


Happening = Summed | Left | Arrived


class _Stretches:
    """When a lane carried something, in order."""

    def __init__(self) -> None:
        self._starts_s: list[float] = []
        self._ends_s: list[float] = []

    def add(self, now_s: float, seconds: float) -> float:
        """Carry something for so long, as soon as the lane is free; returns the end."""
        start_s = max(now_s, self._ends_s[-1]) if self._ends_s else now_s
        self._starts_s.append(start_s)
        self._ends_s.append(start_s + seconds)
        return start_s + seconds

    def busy_s(self, start_s: float, end_s: float) -> float:
        """Seconds of [start_s, end_s] that were taken."""
        among = range(bisect_left(self._ends_s, start_s), bisect_left(self._starts_s, end_s))
        return sum(min(self._ends_s[i], end_s) - max(self._starts_s[i], start_s) for i in among)


class Network:
    """Carries what a simulated step sends from node to node.

    Args:
        costs: Of each layer.
        shard_of_layer: As the policy has it.
        gpu_of_part: The same.
        push: Told what will happen when; it has to come back to `handle` then.
    """

    def __init__(
        self,
        costs: NetworkCosts,
        shard_of_layer: Sequence[int],
        gpu_of_part: Sequence[int],
        push: Callable[[float, Happening], None],
    ) -> None:
        self._costs, self._push = costs, push
        self._owners = [costs.node_of_shard[shard] for shard in shard_of_layer]
        self._gpu_of_part = gpu_of_part
        self._gpus_of_node: dict[int, list[int]] = {node: [] for node in range(costs.num_nodes)}
        for gpu, nodes in enumerate(costs.nodes_of_gpu):
            for node in nodes:
                self._gpus_of_node[node].append(gpu)
        self._parts_of_node = {
            node: sum(gpu in gpus for gpu in gpu_of_part) for node, gpus in self._gpus_of_node.items()
        }
        self._down: Counter[tuple[int, int, int]] = Counter()  # step, layer, node -> parts that are on their own node
        self._payloads: Counter[tuple[int, int]] = Counter()  # step, layer -> nodes whose payload is at the shard's
        self._deltas: Counter[tuple[int, int, int]] = Counter()  # step, layer, GPU -> nodes of it that have the delta
        self._came_s: dict[Op, float] = {}
        self._waiting: list[deque[Transfer]] = [deque() for _ in range(costs.num_nodes)]
        self._is_sending = [False] * costs.num_nodes
        self._out, self._in = ([_Stretches() for _ in range(costs.num_nodes)] for _ in range(2))

    def has_come(self, op: Op) -> bool:
        """Whether what an operation reads is on its node: all payloads for an update, the delta for a GPU."""
        match op.stream:
            case WorkStream.CPU:
                return self._payloads[op.step, op.layer] == self._costs.num_nodes - 1
            case WorkStream.H2D:
                nodes = self._costs.nodes_of_gpu[op.part]
                there = self._deltas[op.step, op.layer, op.part] + (self._owners[op.layer] in nodes)
                return there == len(nodes)
        return True

    def came_s(self, op: Op) -> float:
        """When what an operation reads had come from other nodes; 0 where nothing had to."""
        return self._came_s.get(op, 0.0)

    def after(self, op: Op, now_s: float) -> None:
        """Send on what an operation has brought to the host, or made there."""
        owner = self._owners[op.layer]
        if op.stream is WorkStream.CPU:
            for turn in range(1, self._costs.num_nodes):  # the next nodes first, so that not all begin with one
                node = (owner + turn) % self._costs.num_nodes
                self._send(Transfer(way=WorkStream.H2D, step=op.step, layer=op.layer, source=owner, target=node), now_s)
        elif op.stream is WorkStream.D2H:
            for node in self._costs.nodes_of_gpu[self._gpu_of_part[op.part]]:
                self._down[op.step, op.layer, node] += 1
                if self._down[op.step, op.layer, node] == self._parts_of_node[node]:
                    del self._down[op.step, op.layer, node]
                    if node != owner:
                        self._sum(
                            Transfer(way=op.stream, step=op.step, layer=op.layer, source=node, target=owner), now_s
                        )

    def handle(self, happening: Happening, now_s: float) -> tuple[list[int], Transfer] | None:
        """Go on; returns the transfer that is over with the simulated GPUs of its target, if one is."""
        match happening:
            case Summed(transfer=transfer):
                self._send(transfer, now_s)
            case Left(node=node):
                self._is_sending[node] = False
                self._depart(node, now_s)
            case Arrived(transfer=transfer):
                return self._arrive(transfer, now_s), transfer
        return None

    def busy_s(self, start_s: float, end_s: float) -> float:
        """Seconds in [start_s, end_s] in which the busiest lane carried something."""
        return max((lane.busy_s(start_s, end_s) for lane in [*self._out, *self._in]), default=0.0)

    def _arrive(self, transfer: Transfer, now_s: float) -> list[int]:
        step, layer, gpus = transfer.step, transfer.layer, self._gpus_of_node[transfer.target]
        if transfer.way is WorkStream.D2H:
            self._payloads[step, layer] += 1
            self._came_s[Op(stream=WorkStream.CPU, step=step, layer=layer)] = now_s
        else:
            for gpu in gpus:
                self._deltas[step, layer, gpu] += 1
                self._came_s[Op(stream=WorkStream.H2D, step=step, layer=layer, part=gpu)] = now_s
        return gpus

    def _sum(self, transfer: Transfer, now_s: float) -> None:
        sum_s = self._costs.layers[transfer.layer].sum_s
        if sum_s > 0.0:
            self._push(now_s + sum_s, Summed(transfer))
        else:
            self._send(transfer, now_s)

    def _send(self, transfer: Transfer, now_s: float) -> None:
        self._waiting[transfer.source].append(transfer)
        self._depart(transfer.source, now_s)

    def _depart(self, node: int, now_s: float) -> None:
        if self._is_sending[node] or not self._waiting[node]:
            return
        transfer = self._waiting[node].popleft()
        cost = self._costs.layers[transfer.layer]
        seconds = cost.down_s if transfer.way is WorkStream.D2H else cost.up_s
        self._is_sending[node] = True
        self._push(self._out[node].add(now_s, seconds), Left(node))
        self._push(self._in[transfer.target].add(now_s, seconds), Arrived(transfer))
