"""Cluster: how many GPUs and machines compute a step, and what lies between the machines."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lsp_ray.errors import ConfigError

MOST_NODES, MOST_GPUS = 128, 1024  # beyond, nobody has measured anything like it
# Measured with Ray's objects between two namespaces of two shared cores: 0.118 GB/s at 1 Gbit/s, 0.443 at 4; without a
# limit 117 MB in 107 ms, which a core at either end copies (raw TCP: 3.1 GB/s).
_REACHED = 0.9  # of a network's rate
COPY_BYTES_PER_S = 1.15e9  # over a node's boundary, for each core that copies; there is one each way
DRIVER_S = 0.0002  # of the driver's processor an operation: 19 to 24 ms for a step of 99 operations, over lanes
NARROWEST = 256  # a run's own d: where bfloat16 hides less, int8 is taken


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Machines that are alike, each on a switch by a link of its own; every GPU computes one part of a step.

    Attributes:
        num_nodes: Machines; layers are dealt out to the shards of all.
        gpus_per_node: GPUs of each.
        network_gbit: Rate of a machine's link, 10⁹ bits a second each way; of no meaning on one.
    """

    num_nodes: int = 1
    gpus_per_node: int = 1
    network_gbit: float = 10.0

    def __post_init__(self) -> None:
        for name in ("num_nodes", "gpus_per_node"):
            if getattr(self, name) < 1:
                raise ConfigError(f"cluster.{name}", "be at least 1", getattr(self, name))
        if not (math.isfinite(self.network_gbit) and self.network_gbit > 0):
            raise ConfigError("cluster.network_gbit", "be a number above 0", self.network_gbit)

    @property
    def num_gpus(self) -> int:
        """Of all machines, and so parts of a step."""
        return self.num_nodes * self.gpus_per_node

    @property
    def network_bytes_per_s(self) -> float:
        """What goes over a machine's link each way: as much as it lets through, and as a core copies."""
        return min(_REACHED * self.network_gbit * 1e9 / 8, COPY_BYTES_PER_S)

    def driver_s(self, num_layers: int) -> float:
        """Seconds of the driver's processor a step: each part's payload, each update, and each GPU's delta."""
        return (2 * self.num_gpus + 1) * num_layers * DRIVER_S


ONE_GPU = Cluster()
