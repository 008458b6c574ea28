"""Cluster: how many GPUs and machines compute a step, where its shards are, and what lies between the machines.

A machine with shards is a home of some layers. What the GPUs of another machine compute of such a layer comes in there,
their sum or part by part, and its delta goes out to each machine once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from lsp_ray.config import PayloadDtype, ShardNodes
from lsp_ray.errors import ConfigError
from lsp_ray.sim.store import fewest_to_sum, sum_blocks

MOST_NODES, MOST_GPUS = 128, 1024  # beyond, nobody has measured anything like it
# Measured over loopback, 1 MB at a time, one way after the other: a core passes 2.9 to 5.4 GB in a second of its time,
# with the copy out of a slot or into it, and a connection 3.8 GB/s at best (docs/log). A core at either end does it.
COPY_BYTES_PER_S = 3.0e9
_REACHED = 0.9  # of a network's rate
DRIVER_S = 0.00011  # of the driver's processor an operation: 33 ms for a step of 306 on four GPUs, 20 ms for one of 99
NODES_FOR_SHARDS_ON_ALL = 3  # of two machines both links carry as much either way, and one alone is lost with less
NARROWEST = 256  # a run's own d: where bfloat16 hides less, int8 is taken


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Machines that are alike, each on a switch by a link of its own.

    Attributes:
        num_nodes: Machines, the driver's included.
        gpus_per_node: GPUs of each.
        network_gbit: Rate of a machine's link, 10⁹ bits a second each way; of no meaning on one.
        parts_per_gpu: Parts of a step that each GPU computes in turn.
        shard_nodes: The machines that have shards, see `RuntimeConfig.shard_nodes`.
    """

    num_nodes: int = 1
    gpus_per_node: int = 1
    network_gbit: float = 10.0
    parts_per_gpu: int = 1
    shard_nodes: ShardNodes = "auto"

    def __post_init__(self) -> None:
        for name in ("num_nodes", "gpus_per_node", "parts_per_gpu"):
            if getattr(self, name) < 1:
                raise ConfigError(f"cluster.{name}", "be at least 1", getattr(self, name))
        if not (math.isfinite(self.network_gbit) and self.network_gbit > 0):
            raise ConfigError("cluster.network_gbit", "be a number above 0", self.network_gbit)

    @property
    def num_gpus(self) -> int:
        """Of all machines."""
        return self.num_nodes * self.gpus_per_node

    @property
    def num_away(self) -> int:
        """Machines beside the driver's."""
        return self.num_nodes - 1

    @property
    def num_homes(self) -> int:
        """Machines that have shards."""
        return self.num_nodes if has_shards_on_all(self.shard_nodes, self.num_nodes) else 1

    @property
    def num_parts(self) -> int:
        """Of a step."""
        return self.num_gpus * self.parts_per_gpu

    @property
    def network_bytes_per_s(self) -> float:
        """What goes over a machine's link each way, whatever the copies take."""
        return _REACHED * self.network_gbit * 1e9 / 8

    def network_s(self, down_bytes: Sequence[float], up_bytes: Sequence[float]) -> float:
        """Seconds in which the busiest link is at work, one way, where a machine sends and gets so much of each layer.

        That link is a home's. What comes in for its own layers shares it with deltas of others, where there are any.
        """
        return max(self._home_s(home, down_bytes, up_bytes) for home in range(self.num_homes))

    def _home_s(self, home: int, down_bytes: Sequence[float], up_bytes: Sequence[float]) -> float:
        if not self.num_away:
            return 0.0
        ways = (
            self.num_away * sum(own[home :: self.num_homes]) + sum(others) - sum(others[home :: self.num_homes])
            for own, others in ((down_bytes, up_bytes), (up_bytes, down_bytes))
        )
        return max(ways) / min(self.network_bytes_per_s, self.num_away * COPY_BYTES_PER_S)

    def driver_s(self, num_layers: int) -> float:
        """Seconds of the driver's processor a step: each part's payload, each update, and each GPU's delta."""
        return (self.num_parts + 1 + self.num_gpus) * num_layers * DRIVER_S


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrivals:
    """What comes in of a layer at its home: single parts and sums of several.

    Attributes:
        num_single: Parts, its own machine's with them.
        num_sums: Of other machines.
        sent_single: Parts that another machine sends, on average.
        sent_sums: The same of sums.
        num_summed: Parts in these.
    """

    num_single: int
    num_sums: int
    sent_single: float
    sent_sums: float
    num_summed: float


@lru_cache(maxsize=256)
def arrivals(cluster: Cluster, payload_dtype: PayloadDtype) -> Arrivals:
    """Count what comes in, as `runtime.actors.keepers` decides: where GPUs have several parts, nothing is added up."""
    own = cluster.gpus_per_node * cluster.parts_per_gpu
    num_away = cluster.num_away
    if cluster.parts_per_gpu > 1 or not num_away:
        single = float(own if num_away else 0)
        return Arrivals(num_single=cluster.num_parts, num_sums=0, sent_single=single, sent_sums=0.0, num_summed=0.0)
    blocks = [
        block
        for node in range(1, cluster.num_nodes)
        for block in sum_blocks(range(own * node, own * (node + 1)), cluster.num_parts, fewest_to_sum(payload_dtype))
    ]
    num_single, num_sums = sum(len(block) == 1 for block in blocks), sum(len(block) > 1 for block in blocks)
    return Arrivals(
        num_single=own + num_single,
        num_sums=num_sums,
        sent_single=num_single / num_away,
        sent_sums=num_sums / num_away,
        num_summed=own - num_single / num_away,
    )


def has_shards_on_all(asked: ShardNodes, num_nodes: int) -> bool:
    """Whether every machine that has GPUs is to have shards."""
    return asked == "all" or (asked == "auto" and num_nodes >= NODES_FOR_SHARDS_ON_ALL)


ONE_GPU = Cluster()
