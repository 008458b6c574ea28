"""NUMA nodes: the cores beside one of a machine's memories, and processes that keep to them.

A machine with several sockets has several memories, and what a core reads from another one's, or sends to a GPU that
hangs there, takes longer. Nothing here gives a process a core that it was not allowed before.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

SYSTEM = Path("/sys")


@dataclass(frozen=True, slots=True, kw_only=True)
class NumaNode:
    """One of a machine's memories, by Linux's number, and those of its cores that this process may use."""

    index: int
    cores: frozenset[int]

    def __str__(self) -> str:
        return f"the {len(self.cores)} cores of NUMA node {self.index}"


def numa_nodes(allowed: Collection[int] | None = None, system: Path = SYSTEM) -> list[NumaNode]:
    """This machine's, by number; none where only one has cores for this process, or the system does not say.

    Args:
        allowed: Cores; default: this process's.
        system: Where the kernel tells of the machine.
    """
    own = os.sched_getaffinity(0) if allowed is None else allowed
    found = []
    for folder in system.glob("devices/system/node/node[0-9]*"):
        with suppress(OSError, ValueError):
            cores = cores_in((folder / "cpulist").read_text(encoding="ascii")).intersection(own)
            found += [NumaNode(index=int(folder.name.removeprefix("node")), cores=cores)] if cores else []
    return sorted(found, key=lambda node: node.index) if len(found) > 1 else []


def cores_in(ranges: str) -> frozenset[int]:
    """Cores as Linux lists them, such as `0-3,8`; an empty list for memory without any."""
    bounds = [part.partition("-") for part in ranges.strip().split(",") if part]
    return frozenset(core for first, _, last in bounds for core in range(int(first), int(last or first) + 1))


def pci_address(gpu: int) -> str:
    """Where a CUDA device of this process is plugged in, as the kernel names it; empty where torch does not tell."""
    found: Any = torch.cuda.get_device_properties(gpu)
    if not hasattr(found, "pci_bus_id"):
        return ""
    return f"{found.pci_domain_id:04x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0"


def node_near(pci: str, there: Sequence[NumaNode], system: Path = SYSTEM) -> NumaNode | None:
    """That of a GPU; None where the system does not say, or says one that this process may not use."""
    try:
        index = int((system / "bus/pci/devices" / pci / "numa_node").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    return next((node for node in there if node.index == index), None)


def node_of_actor(there: Sequence[NumaNode], num_threads: int, system: Path = SYSTEM) -> NumaNode | None:
    """That of this process's GPU, its first; None where so many threads would have to share its cores."""
    node = node_near(pci_address(0), there, system) if there else None
    return node if node is not None and num_threads <= len(node.cores) else None


def nodes_of_shards(
    there: Sequence[NumaNode], num_shards: int, num_threads: int, taken: Mapping[int, int]
) -> list[NumaNode | None]:
    """Spread shards over nodes; None: its node has not as many cores to spare, and it runs wherever it did before.

    Args:
        there: The nodes; may be none.
        num_shards: At least 1.
        num_threads: Of each shard.
        taken: By a node's number, threads of GPU actors there, see `threads_near`.
    """
    left = {node.index: len(node.cores) - taken[node.index] for node in there}
    chosen: list[NumaNode | None] = []
    for shard in range(num_shards):
        node = there[shard * len(there) // num_shards] if there else None
        if node is not None and left[node.index] >= num_threads:
            left[node.index] -= num_threads
            chosen.append(node)
        else:
            chosen.append(None)
    return chosen


def threads_near(
    there: Sequence[NumaNode], num_gpus: int, num_threads: int, system: Path = SYSTEM
) -> Mapping[int, int]:
    """By a node's number, threads of the actors of this machine's first GPUs, so many each."""
    gpus = range(min(num_gpus, torch.cuda.device_count())) if there else ()
    near = [node_near(pci_address(gpu), there, system) for gpu in gpus]
    return {node.index: num_threads * near.count(node) for node in there}


def run_on(cores: Collection[int]) -> None:
    """Keep this process's threads, and those that they will start, to these cores, as far as each may use them."""
    for thread in psutil.Process().threads():
        with suppress(ProcessLookupError):  # it has ended
            allowed = os.sched_getaffinity(thread.id).intersection(cores)
            if allowed:
                os.sched_setaffinity(thread.id, allowed)
