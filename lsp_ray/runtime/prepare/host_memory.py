"""HostMemory: how much main and shared memory is free, and whether a job fits into it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil

from lsp_ray.device.shared_weights import CAN_SHARE
from lsp_ray.errors import ConfigError
from lsp_ray.runtime.prepare.job import Job
from lsp_ray.runtime.prepare.machines import parts_sent
from lsp_ray.sim.store import payload_bytes, slot_bytes, store_bytes

_SHARED_MEMORY = Path("/dev/shm")
_CGROUP = Path("/sys/fs/cgroup")  # version 2; as a container sees its own


@dataclass(frozen=True, slots=True, kw_only=True)
class HostMemory:
    """Bytes that a run may still take; what it writes to shared memory counts in both."""

    main_bytes: int
    shared_bytes: int


def read_host_memory(cgroup: Path = _CGROUP, shared_memory: Path = _SHARED_MEMORY) -> HostMemory:
    """Look at what is free now; a container's own limit counts, which the machine's figures know nothing of."""
    main_bytes = int(psutil.virtual_memory().available)
    limit_bytes = _free_in(cgroup)
    return HostMemory(
        main_bytes=main_bytes if limit_bytes is None else min(main_bytes, limit_bytes),
        shared_bytes=int(psutil.disk_usage(str(shared_memory)).free) if shared_memory.is_dir() else 0,
    )


def check_memory(job: Job, host: HostMemory) -> None:
    """Raise ConfigError where the job cannot fit: Ray would go to the disk without a word, and Linux kill an actor.

    Counted are the object store and, for main memory, the weights and blocks' inputs that wait there: a bound from
    below, as other activations are not. What is to be quantised is loaded one by one; frozen weights that stay in main
    memory are there once for all GPU actors, where the system can share them.
    """
    smaller = "a smaller lsp.subspace_dim" if job.config.method == "lsp" else "method lsp"
    in_own_store = job.config.runtime.address is None  # else the cluster has one, which is looked at there
    if in_own_store and job.store_bytes > host.shared_bytes:
        raise ConfigError(
            "method",
            f"fit its slots into {_shown(host.shared_bytes)} of shared memory that are free in {_SHARED_MEMORY} "
            f"({_shown(job.store_bytes)} needed)",
            job.config.method,
            hint=f"{smaller} needs less; in Docker, --shm-size sets how much there is",
        )
    beside = job.layout.nodes.count(job.layout.nodes[0]) if job.layout.nodes else job.layout.num_gpus
    frozen_bytes = (1 if CAN_SHARE else beside) * job.streamed_bytes
    other_bytes = 0 if job.quantized else max(0, job.num_weights * job.dtype.itemsize - job.streamed_bytes)
    is_brought = job.device == "cuda"  # the others are in main memory for a while alone
    parked_bytes = beside * job.inputs.parked_bytes if job.inputs is not None else 0
    nodes = job.layout.nodes
    own_store_bytes = store_bytes_at(job, nodes[0], is_own=True) if nodes else job.store_bytes
    needed_bytes = own_store_bytes + frozen_bytes + (1 if is_brought else beside) * other_bytes + parked_bytes
    if needed_bytes - parked_bytes <= host.main_bytes < needed_bytes:
        raise ConfigError(
            "runtime.activations",
            f"be device, as with blocks' inputs of {_shown(parked_bytes)} the run needs "
            f"{_shown(needed_bytes)} of main memory at least, of which {_shown(host.main_bytes)} are free",
            "host",
            hint="a smaller per_device_train_batch_size or max_seq_length needs less",
        )
    if needed_bytes > host.main_bytes:
        raise ConfigError(
            "model_name_or_path",
            f"fit, with what method {job.config.method} sends, into {_shown(host.main_bytes)} of main memory that are "
            f"free ({_shown(needed_bytes)} needed at least)",
            job.config.model_name_or_path,
            hint="python -m lsp_ray.plan says what each method needs",
        )


def store_bytes_at(job: Job, node: str, *, is_own: bool, num_spare_gpus: int = 0) -> int:
    """Of the object store of one machine of several: slots of its shards' units, and of what it sends to others.

    Args:
        job: The run.
        node: The machine's name.
        is_own: Whether it is the driver's.
        num_spare_gpus: On which lost ones of other machines may be replaced, each with slots of its own.
    """
    layout, payload_dtype = job.layout, job.codec.payload_dtype
    homes = dict(zip(layout.homes, range(len(layout.homes)), strict=True))
    home = homes.get(node if layout.shard_nodes else "" if is_own else node)
    home_of_unit = layout.home_of_unit
    here = [unit for unit, other in enumerate(home_of_unit) if other == home]
    elsewhere = [unit for unit, other in enumerate(home_of_unit) if other != home]
    sent = {name: parts_sent(job, name) for name in dict.fromkeys(layout.nodes)}
    divided = [len(layout.parts_of(gpu)) for gpu in range(layout.num_gpus)]
    largest = job.config.replicas if job.has_parts_to_divide else max(divided)
    num_slots = sum(map(len, sent.get(node, ()))) + 1 + num_spare_gpus * (largest + 1)  # parts and their delta
    num_sums = sum(len(block) > 1 for name, blocks in sent.items() if name != node for block in blocks)
    num_summed = sum(len(block) for name, blocks in sent.items() if name != node for block in blocks if len(block) > 1)
    way = [slot_bytes(payload_bytes(job.payload_sizes[unit], payload_dtype)) for unit in elsewhere]
    return num_slots * sum(way) + store_bytes(
        [job.payload_sizes[unit] for unit in here],
        [layout.shard_of_unit[unit] for unit in here],
        speculates=job.speculates,
        payload_dtype=payload_dtype,
        summed=job.sums is not None,
        num_parts=job.config.replicas - num_summed,
        num_sums=num_sums,
    )


def _free_in(cgroup: Path) -> int | None:
    """Bytes below a control group's limit, its page cache not counted; None where there is no limit."""
    try:
        limit, used = ((cgroup / name).read_text(encoding="ascii").strip() for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text(encoding="ascii").splitlines())
    except OSError:
        return None
    return None if limit == "max" else max(0, int(limit) - int(used) + int(stat["inactive_file"]))


def _shown(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB"
