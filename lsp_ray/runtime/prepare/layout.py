"""Layout: how many shards, which units each owns, and how the cores are divided."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from lsp_ray.config import RunConfig, RuntimeConfig
from lsp_ray.runtime.prepare.machines import Machine, place
from lsp_ray.sim.cluster import has_shards_on_all
from lsp_ray.sim.store import balanced

CORES_FOR_TWO_SHARDS = 16  # below, one with all threads is faster; more than two slow lsp down (simulated, docs/log.md)
EVEN_ENOUGH = 1.05  # so much longer may a step's slowest GPU take under the even division: measuring is no surer
GPU_HOST_THREADS = 2  # what the GPU actor needs of the CPU where the GPU computes: launches and the two copy threads


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Threads of each actor, the shard that owns each unit, and the GPU that computes each part of a step.

    `nodes` are the names of the machines of all GPUs, `shard_nodes` of those of all shards; empty: all are on one, the
    driver's.
    """

    device_threads: int
    shard_threads: int
    shard_of_unit: tuple[int, ...]
    gpu_of_part: tuple[int, ...] = (0,)
    nodes: tuple[str, ...] = ()
    shard_nodes: tuple[str, ...] = ()

    @property
    def num_shards(self) -> int:
        """Shards with at least one unit."""
        return len(set(self.shard_of_unit))

    @property
    def total_threads(self) -> int:
        """Threads of all actors together."""
        return self.num_gpus * self.device_threads + self.num_shards * self.shard_threads

    @property
    def num_gpus(self) -> int:
        """GPUs, or CPU actors in their place, that compute."""
        return len(set(self.gpu_of_part))

    @property
    def homes(self) -> tuple[str, ...]:
        """Names of the machines that have shards, each once; one, without a name, where that is the driver's alone."""
        return tuple(dict.fromkeys(self.shard_nodes)) or ("",)

    @property
    def home_of_unit(self) -> tuple[int, ...]:
        """By unit, the number of its shard's machine among `homes`."""
        if not self.shard_nodes:
            return (0,) * len(self.shard_of_unit)
        return tuple(self.homes.index(self.shard_nodes[shard]) for shard in self.shard_of_unit)

    def name_of(self, gpu: int) -> str:
        """What people and Ray's dashboard call it."""
        name = "gpu" if self.num_gpus == 1 else f"gpu-{gpu}"
        return f"{name}@{self.nodes[gpu]}" if self.nodes else name

    def num_beside(self, gpu: int) -> int:
        """GPUs on its machine, with itself."""
        return self.nodes.count(self.nodes[gpu]) if self.nodes else self.num_gpus

    def parts_of(self, gpu: int) -> range:
        """The parts of a step that a GPU computes, one after the other."""
        first = self.gpu_of_part.index(gpu)
        return range(first, first + self.gpu_of_part.count(gpu))

    def units_of(self, shard_index: int) -> list[int]:
        """The units that a shard owns."""
        return [unit for unit, owner in enumerate(self.shard_of_unit) if owner == shard_index]


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreShares:
    """How many shards and GPU actors there are, and the threads of each actor."""

    num_gpus: int
    num_shards: int
    shard_threads: int
    device_threads: int


def divide_cores(
    runtime: RuntimeConfig, *, num_units: int, cores: int, on_gpu: bool, nodes: Sequence[str] = ()
) -> CoreShares:
    """Divide a machine's cores among the actors; see `plan_layout`. `num_units` is 0 if nothing leaves the device."""
    default = 2 if cores >= CORES_FOR_TWO_SHARDS else 1
    num_gpus = 1 if runtime.num_gpus == "auto" else runtime.num_gpus
    beside = max(map(nodes.count, nodes), default=num_gpus)  # that share a machine
    num_shards = min(runtime.num_shards or default, max(1, num_units))
    if on_gpu:
        device_threads = runtime.device_threads or min(GPU_HOST_THREADS, max(1, cores // beside))
        shard_threads = runtime.shard_threads or max(1, (cores - beside * device_threads) // num_shards)
    else:
        # compressed updates are small next to forward and backward: a quarter of the cores is enough for them
        shard_threads = runtime.shard_threads or max(1, cores // 4 // num_shards)
        left = cores - shard_threads * num_shards if num_units else cores
        device_threads = runtime.device_threads or max(1, left // beside)
    return CoreShares(
        num_gpus=num_gpus, num_shards=num_shards, shard_threads=shard_threads, device_threads=device_threads
    )


def plan_layout(
    runtime: RuntimeConfig,
    payload_sizes: Sequence[int],
    *,
    cores: int,
    on_gpu: bool,
    num_parts: int = 1,
    nodes: Sequence[str] = (),
) -> Layout:
    """Divide units, parts and cores.

    Args:
        runtime: What was asked for; what is None is chosen here.
        payload_sizes: Elements of each unit's payload; empty if nothing leaves the device.
        cores: CPU cores this run may use, on each machine.
        on_gpu: Whether a GPU computes; if not, the GPU actor needs most of the cores itself.
        num_parts: Of a step.
        nodes: Names of the machines of all GPUs; empty: there is one machine.
    """
    shares = divide_cores(runtime, num_units=len(payload_sizes), cores=cores, on_gpu=on_gpu, nodes=nodes)
    homes = tuple(dict.fromkeys(nodes)) if shards_everywhere(runtime, nodes) else ()
    num_shards = min(shares.num_shards * max(1, len(homes)), max(1, len(payload_sizes)))
    shard_of_unit = balanced(payload_sizes, num_shards)
    return Layout(
        device_threads=shares.device_threads,
        shard_threads=shares.shard_threads,
        shard_of_unit=shard_of_unit,
        gpu_of_part=even_parts(num_parts, shares.num_gpus),
        nodes=tuple(nodes),
        # neighbouring layers, which set out one after the other, are at home on different machines
        shard_nodes=tuple(homes[shard % len(homes)] for shard in sorted(set(shard_of_unit))) if homes else (),
    )


def shards_everywhere(runtime: RuntimeConfig, nodes: Sequence[str]) -> bool:
    """Whether every machine that has GPUs is to have shards; see `RuntimeConfig.shard_nodes`."""
    return has_shards_on_all(runtime.shard_nodes, len(set(nodes)))


def even_parts(num_parts: int, num_gpus: int) -> tuple[int, ...]:
    """Return the GPU of each part where all are alike."""
    return tuple(part * num_gpus // num_parts for part in range(num_parts))


def parts_by_pace(num_parts: int, part_s: Sequence[float]) -> tuple[int, ...]:
    """Return the GPU of each part so that the slowest is over as early as can be; each has one, and they are in order.

    Args:
        num_parts: Of a step; at least one for each GPU.
        part_s: What a part takes on each GPU.
    """
    counts = [1] * len(part_s)
    for _ in range(num_parts - len(part_s)):
        ends_s = [(count + 1) * own_s for count, own_s in zip(counts, part_s, strict=True)]
        counts[ends_s.index(min(ends_s))] += 1
    by_pace = tuple(gpu for gpu, count in enumerate(counts) for _ in range(count))
    even = even_parts(num_parts, len(part_s))
    return by_pace if _slowest_s(even, part_s) > EVEN_ENOUGH * _slowest_s(by_pace, part_s) else even


def _slowest_s(gpu_of_part: Sequence[int], part_s: Sequence[float]) -> float:
    return max(gpu_of_part.count(gpu) * own_s for gpu, own_s in enumerate(part_s))


def layout_of(config: RunConfig, payload_sizes: Sequence[int], machines: Sequence[Machine], *, on_gpu: bool) -> Layout:
    """`plan_layout` for a run whose GPUs are a number by now, on this machine or those of a cluster."""
    num_gpus = config.runtime.num_gpus
    assert num_gpus != "auto", "is decided by now"
    places = place(num_gpus, machines, on_gpu=on_gpu) if len(machines) > 1 else []
    own_cores = len(os.sched_getaffinity(0))
    return plan_layout(
        config.runtime,
        payload_sizes,
        cores=min([own_cores, *(machine.cores for machine in places)]),
        on_gpu=on_gpu,
        num_parts=config.replicas,
        nodes=[machine.name for machine in places],
    )
