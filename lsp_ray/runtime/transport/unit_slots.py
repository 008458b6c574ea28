"""UnitSlots: what a layer's payloads cross in, in Ray's object store; actors pass each other its references."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch

from lsp_ray.optim.adamw import AdamWState
from lsp_ray.optim.codec import Codec
from lsp_ray.optim.sums import SummedPart
from lsp_ray.runtime.transport.slots import OpenSlots, Slot, new_slot_buffer
from lsp_ray.runtime.transport.slots import new_slot as new_own_slot
from lsp_ray.sim.store import payload_bytes, state_numel


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitSlots:
    """One unit's slots: object references of the ways down, one for each part of a step, the way up and the state.

    Attributes:
        unit: Its number.
        numel: Length of its payloads, before they are encoded.
        codec: Of the payloads.
        sums: The parts of a payload whose updates the shard adds up; None where it does not.
        down: See above.
        up: See above.
        state: See above.
    """

    unit: int
    numel: int
    codec: Codec
    sums: Sequence[SummedPart] | None
    down: Sequence[ray.ObjectRef[Any]]
    up: ray.ObjectRef[Any]
    state: ray.ObjectRef[Any]

    def open(self) -> OpenSlots:
        """Map the slots of all ways into this process; see `Slot` for errors."""
        numel, dtype, node = self.codec.wire_numel(self.numel), self.codec.dtype, own_node()
        downs = [Slot(ray.get(ref), numel, f"down {self.unit}", dtype, node) for ref in self.down]
        return OpenSlots(down=downs, up=Slot(ray.get(self.up), numel, f"up {self.unit}", dtype, node))

    def open_state(self) -> Slot:
        """Map the state's slot into this process; see `state_numel`."""
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


class OwnSlots:
    """A unit's slots in an actor's own memory, where those in Ray's object store are another machine's.

    Args:
        like: Those of the store.
        parts: Of a step, that are computed here; others have slots without room.
    """

    def __init__(self, like: UnitSlots, parts: Collection[int]) -> None:
        self.unit = like.unit
        self._numel, self._codec = like.numel, like.codec
        self._has_part = [part in parts for part in range(len(like.down))]
        self._total: torch.Tensor | None = None

    def open(self) -> OpenSlots:
        """Allocate them."""
        numel, dtype = self._codec.wire_numel(self._numel), self._codec.dtype
        downs = [new_own_slot(numel if has else 0, f"down {self.unit}", dtype) for has in self._has_part]
        return OpenSlots(down=downs, up=new_own_slot(numel, f"up {self.unit}", dtype))

    def open_total(self) -> torch.Tensor:
        """A place for the sum of all updates, see `UnitSlots.open_total`; the same each time."""
        if self._total is None:
            self._total = torch.zeros(self._numel)
        return self._total


def own_node() -> str:
    """The number of this process's node, as Ray has it."""
    node: str = ray.get_runtime_context().get_node_id()
    return node


def new_unit_slots(
    unit: int, numel: int, codec: Codec, sums: Sequence[SummedPart] | None = None, num_parts: int = 1
) -> UnitSlots:
    """Allocate a unit's slots on this node, for payloads of `numel` elements; `sim.store` counts them."""
    wire_bytes = payload_bytes(numel, codec.payload_dtype)
    *downs, up = (new_slot(wire_bytes) for _ in range(num_parts + 1))
    state = new_slot(state_bytes(numel, codec, sums))
    slots = UnitSlots(unit=unit, numel=numel, codec=codec, sums=sums, down=downs, up=up, state=state)
    slots.open_state().publish(0)  # zeros: the state before the first update
    return slots


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
