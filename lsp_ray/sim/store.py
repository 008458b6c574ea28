"""Shared memory that a run's slots take, counted before they are there.

Each unit has a slot for its payload of each part of a step on the way down, or for a sum of several, one for its delta
on the way up and one for its optimizer state (m, v, the number of updates and, where deltas are int8, what they have
left out, or the sum of all updates). Beside them are undo slots: where updates may be taken back once their step is
judged, one for each unit's state; else one for each shard, as large as its largest state.
"""

from __future__ import annotations

from collections.abc import Sequence

from lsp_ray.config import PayloadDtype

PAGE_BYTES = 4096
_VALUES = 64  # of a payload, whose bytes are compared with those of a sum
SPARE_BYTES = 96 << 20  # of the object store, beside the slots: the job's data, messages, and Ray's own minimum


def payload_bytes(numel: int, payload_dtype: PayloadDtype) -> int:
    """Bytes in which `numel` values cross the link, see `optim.codec`."""
    if payload_dtype == "int8":
        return 66 * -(-numel // 64)  # blocks of 64, each with a scale of 2 bytes
    return {"bfloat16": 2, "float32": 4}[payload_dtype] * numel


def fewest_to_sum(payload_dtype: PayloadDtype) -> int:
    """Return how many encoded parts are more bytes than their sum, which is float32."""
    return payload_bytes(_VALUES, "float32") // payload_bytes(_VALUES, payload_dtype) + 1


def singly(parts: range) -> list[range]:
    """Each part of a step by itself."""
    return [range(part, part + 1) for part in parts]


def sum_blocks(own: range, num_parts: int, fewest: int) -> list[range]:
    """Divide neighbouring parts into those that `optim.parts.tree_sum` adds up before others, and single ones.

    Args:
        own: Of `num_parts` in all.
        num_parts: See above.
        fewest: That are worth a sum.
    """
    blocks = []
    first = own.start
    while first < own.stop:
        width = 1
        while first % (2 * width) == 0 and (first + 2 * width <= own.stop or own.stop == num_parts > first + width):
            width *= 2
        block = range(first, min(first + width, own.stop))
        blocks += [block] if len(block) >= fewest else singly(block)
        first = block.stop
    return blocks


def size_text(num_bytes: int) -> str:
    """The same for people: "1.2 MB", "798.0 kB"."""
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:.1f} kB"


def slot_bytes(num_bytes: int) -> int:
    """Bytes of the object behind a slot for so many bytes: header, payload and room to align them."""
    return 2 * PAGE_BYTES + -(-num_bytes // PAGE_BYTES) * PAGE_BYTES


def state_numel(numel: int, payload_dtype: PayloadDtype, *, summed: bool = False) -> int:
    """float32 elements of the slot for the optimizer's state of `numel` values.

    m, v, the number of updates and a third of them, where there is one: the sum, or what int8 has left out.
    """
    return (3 if summed or payload_dtype == "int8" else 2) * numel + 1


def store_bytes(
    payload_sizes: Sequence[int],
    shard_of_unit: Sequence[int],
    *,
    speculates: bool,
    payload_dtype: PayloadDtype,
    summed: bool = False,
    num_parts: int = 1,
    num_sums: int = 0,
) -> int:
    """Return the size of the object store that a run needs.

    Args:
        payload_sizes: Elements of each unit's payload; empty where nothing leaves the device.
        shard_of_unit: Which shard owns it.
        speculates: Whether updates may have to be made again, so that every unit's state is kept until then.
        payload_dtype: In which values cross the link.
        summed: Whether shards keep the sum of all updates.
        num_parts: Of a step that come singly, each of which has slots of its own for the way down.
        num_sums: Of several parts that come in place of these, float32.
    """
    ways = [slot_bytes(payload_bytes(numel, payload_dtype)) for numel in payload_sizes]
    states = [slot_bytes(4 * state_numel(numel, payload_dtype, summed=summed)) for numel in payload_sizes]
    largest: dict[int, int] = {}
    for shard, state in zip(shard_of_unit, states, strict=True):
        largest[shard] = max(state, largest.get(shard, 0))
    undo = sum(states) if speculates else sum(largest.values())
    sums = num_sums * sum(slot_bytes(4 * numel) for numel in payload_sizes)
    return (num_parts + 1) * sum(ways) + sums + sum(states) + undo + SPARE_BYTES


def balanced(sizes: Sequence[int], num_shards: int) -> tuple[int, ...]:
    """Give each unit, the largest first, to the shard with the least so far; ties go to the lowest index."""
    load = [0] * num_shards
    owner = [0] * len(sizes)
    for unit in sorted(range(len(sizes)), key=lambda unit: (-sizes[unit], unit)):
        shard = min(range(num_shards), key=lambda index: (load[index], index))
        owner[unit] = shard
        load[shard] += sizes[unit]
    return tuple(owner)
