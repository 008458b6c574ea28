"""UnitSlots: what a layer's payloads cross in, in Ray's object store; actors pass each other its references."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch

from lsp_ray.optim.adamw import AdamWState
from lsp_ray.optim.codec import Codec
from lsp_ray.optim.sums import SummedPart
from lsp_ray.runtime.transport.slots import OpenSlots, Slot, new_slot_buffer
from lsp_ray.sim.store import state_numel


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitSlots:
    """One unit's slots on one machine: object references of the ways down, the way up and the state.

    Attributes:
        unit: Its number.
        numel: Length of its payloads, before they are encoded.
        codec: Of the payloads.
        sums: The parts of a payload whose updates the shard adds up; None where it does not.
        parts: Of a step, those that each way down is for: one, encoded, or the sum of several, float32.
        down: See above.
        up: See above.
        state: See above; None where the shard is on another machine.
    """

    unit: int
    numel: int
    codec: Codec
    sums: Sequence[SummedPart] | None
    parts: Sequence[range]
    down: Sequence[ray.ObjectRef[Any]]
    up: ray.ObjectRef[Any]
    state: ray.ObjectRef[Any] | None

    def open(self) -> OpenSlots:
        """Map the slots of all ways into this process; see `Slot` for errors."""
        node = own_node()

        def opened(ref: ray.ObjectRef[Any], name: str, own: range = range(1)) -> Slot:
            numel, dtype = _room(self.numel, self.codec, own)
            return Slot(ray.get(ref), numel, f"{name} {self.unit}", dtype, node)

        downs = {own.start: opened(ref, "down", own) for own, ref in zip(self.parts, self.down, strict=True)}
        return OpenSlots(down=downs, up=opened(self.up, "up"))

    def open_state(self) -> Slot:
        """Map the state's slot into this process; see `state_numel`."""
        assert self.state is not None, "the state is on the shard's machine"
        return self.open_undo(self.state, "state")

    def open_total(self) -> torch.Tensor:
        """Map that part of the state's slot which is the sum of all updates."""
        total = state_in(self.open_state().payload, self.numel, summed=True).total
        assert total is not None
        return total

    def open_undo(self, ref: ray.ObjectRef[Any], name: str = "undo") -> Slot:
        """Map a slot that is large enough for the unit's state."""
        numel = state_numel(self.numel, self.codec.payload_dtype, summed=self.sums is not None)
        return Slot(ray.get(ref), numel, f"{name} {self.unit}", node=own_node())


def own_node() -> str:
    """The number of this process's node, as Ray has it."""
    node: str = ray.get_runtime_context().get_node_id()
    return node


def new_unit_slots(
    unit: int,
    numel: int,
    codec: Codec,
    sums: Sequence[SummedPart] | None = None,
    parts: Sequence[range] = (range(1),),
    *,
    has_state: bool = True,
) -> UnitSlots:
    """Allocate a unit's slots on this node, for payloads of `numel` elements; `sim.store` counts them."""
    sizes = [length * dtype.itemsize for length, dtype in (_room(numel, codec, own) for own in parts)]
    length, dtype = _room(numel, codec)
    slots = UnitSlots(
        unit=unit,
        numel=numel,
        codec=codec,
        sums=sums,
        parts=tuple(parts),
        down=[new_slot(size) for size in sizes],
        up=new_slot(length * dtype.itemsize),
        state=new_slot(state_bytes(numel, codec, sums)) if has_state else None,
    )
    if has_state:
        slots.open_state().publish(0)  # zeros: the state before the first update
    return slots


def _room(numel: int, codec: Codec, parts: range = range(1)) -> tuple[int, torch.dtype]:
    """Elements and their type of a slot, see `UnitSlots.parts`."""
    return (codec.wire_numel(numel), codec.dtype) if len(parts) == 1 else (numel, torch.float32)


def new_undo(slots: Sequence[UnitSlots], *, is_shared: bool) -> Mapping[int, ray.ObjectRef[Any]]:
    """Allocate, for a shard's units, a slot for each one's state: the same for all, or one each."""
    sizes = [state_bytes(own.numel, own.codec, own.sums) for own in slots]
    if not is_shared:
        return {own.unit: new_slot(size) for own, size in zip(slots, sizes, strict=True)}
    shared = new_slot(max(sizes))
    return {own.unit: shared for own in slots}


def new_slot(num_bytes: int) -> ray.ObjectRef[Any]:
    """Allocate a slot for so many bytes of payload in the store of this node, whose number it carries."""
    ref = ray.put(new_slot_buffer(num_bytes))
    Slot(ray.get(ref), 0, "new").claim(own_node())
    return ref


def state_bytes(numel: int, codec: Codec, sums: Sequence[SummedPart] | None) -> int:
    """Of the optimizer's state of `numel` values."""
    return torch.float32.itemsize * state_numel(numel, codec.payload_dtype, summed=sums is not None)


def state_in(payload: torch.Tensor, numel: int, *, summed: bool) -> AdamWState:
    """The optimizer's state of `numel` values in a slot's payload, as views."""
    names = ("exp_avg", "exp_avg_sq", "total" if summed else "error")  # the third, if kept
    parts = dict(zip(names, payload[:-1].split(numel), strict=False))
    return AdamWState(step=payload[-1], **parts)
