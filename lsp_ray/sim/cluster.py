"""Cluster: how many GPUs and machines compute a step, and what lies between the machines.

A star: the driver's machine has all shards and slots, and every GPU on another one a connection of its own to it, over
which payloads come in and copies of deltas go out, one at a time each way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lsp_ray.errors import ConfigError

MOST_NODES, MOST_GPUS = 128, 1024  # beyond, nobody has measured anything like it
# Measured over loopback, 1 MB at a time, one way after the other: a core passes 2.9 to 5.4 GB in a second of its time,
# with the copy out of a slot or into it, and a connection 3.8 GB/s at best (docs/log). A core at either end does it.
COPY_BYTES_PER_S = 3.0e9
_REACHED = 0.9  # of a network's rate
DRIVER_S = 0.00011  # of the driver's processor an operation: 33 ms for a step of 306 on four GPUs, 20 ms for one of 99
NARROWEST = 256  # a run's own d: where bfloat16 hides less, int8 is taken


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Machines that are alike, each on a switch by a link of its own.

    Attributes:
        num_nodes: Machines, the driver's included.
        gpus_per_node: GPUs of each.
        network_gbit: Rate of a machine's link, 10⁹ bits a second each way; of no meaning on one.
        parts_per_gpu: Parts of a step that each GPU computes in turn.
    """

    num_nodes: int = 1
    gpus_per_node: int = 1
    network_gbit: float = 10.0
    parts_per_gpu: int = 1

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
        """GPUs on other machines than the driver's."""
        return self.num_gpus - self.gpus_per_node

    @property
    def num_parts(self) -> int:
        """Of a step."""
        return self.num_gpus * self.parts_per_gpu

    @property
    def network_bytes_per_s(self) -> float:
        """What goes over a machine's link each way, whatever the copies take."""
        return _REACHED * self.network_gbit * 1e9 / 8

    def network_s(self, num_bytes: float) -> float:
        """Seconds in which one payload of so many bytes of every GPU that is elsewhere comes in, or a delta goes out.

        All are on their way at one time: each has its part of the driver's link, and no more than its connection.
        """
        return num_bytes / min(self.network_bytes_per_s / self.num_away, COPY_BYTES_PER_S) if self.num_away else 0.0

    def driver_s(self, num_layers: int) -> float:
        """Seconds of the driver's processor a step: each part's payload, each update, and each GPU's delta."""
        return (self.num_parts + 1 + self.num_gpus) * num_layers * DRIVER_S


ONE_GPU = Cluster()
