"""Slot: a buffer in Ray's object store that is allocated once and reused every step without copies.

Ray promises neither that an object may be written nor that anyone notices: there is one writer for each slot at a time,
hand-over is by message, and the header's generation (the step of its payload) exposes a reader who came too early or
too late.

On another node the same object is a copy that nobody writes to, whose first generation would pass for step 0: a slot
carries the number of its node, and is an error elsewhere.

Layout: one page of header (int64 generation: 0 for no payload, else its step + 1; then the node's number, ASCII), then
the payload, both page-aligned so that each slot can be page-locked on its own.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from lsp_ray.errors import ForeignSlotError, StaleSlotError
from lsp_ray.sim.store import PAGE_BYTES, slot_bytes

Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]

_EMPTY = 0  # as in a new buffer
_NODE = slice(8, 128)  # of the header: bytes


def as_bytes(payload: torch.Tensor) -> Bytes:
    """A view of a flat tensor's bytes."""
    view: Bytes = payload.view(torch.uint8).numpy()
    return view


def new_slot_buffer(num_bytes: int) -> Bytes:
    """Return the zeroed buffer to put into the object store for a slot with so many bytes of payload."""
    return np.zeros(slot_bytes(num_bytes), dtype=np.uint8)


def new_slot(numel: int, name: str, dtype: torch.dtype = torch.float32) -> Slot:
    """Return a slot in this process's own memory, for threads in the actors' place."""
    return Slot(new_slot_buffer(dtype.itemsize * numel), numel, name, dtype)


class Slot:
    """A process's view of a slot.

    Args:
        buffer: What `ray.get` returned for the slot's object: shared memory, read-only by flag alone. Holding it keeps
            the object in its place; the store neither spills nor moves what is held.
        numel: Payload length in elements.
        name: For error messages.
        dtype: Of the payload's elements.
        node: Where this process is; default: a slot that no other process has.

    Raises:
        ForeignSlotError: The slot is another node's.
    """

    def __init__(
        self,
        buffer: Bytes,
        numel: int,
        name: str,
        dtype: torch.dtype = torch.float32,
        node: str | None = None,
    ) -> None:
        self._buffer = buffer
        self._name = name
        first = -buffer.ctypes.data % PAGE_BYTES
        # the array's read-only flag guards the object for others; this project's protocol is what guards it here
        writable = (ctypes.c_uint8 * buffer.nbytes).from_address(buffer.ctypes.data)
        memory = np.frombuffer(memoryview(writable), dtype=np.uint8)
        self._generation = memory[first : first + 8].view(np.int64)
        self._node = memory[first : first + PAGE_BYTES][_NODE]
        if node is not None and self._node.tobytes().rstrip(b"\0") != node.encode("ascii"):
            raise ForeignSlotError(f"slot {name} is not of this node: what it holds here is a copy")
        payload_start = first + PAGE_BYTES
        payload = memory[payload_start : payload_start + dtype.itemsize * numel]
        self.payload = torch.from_numpy(payload).view(dtype)

    def claim(self, node: str) -> None:
        """Say of a new slot that it is this node's."""
        number = node.encode("ascii")
        self._node[: len(number)] = np.frombuffer(number, dtype=np.uint8)

    def to_write(self) -> torch.Tensor:
        """Return the flat payload for writing; until `publish` every reader is refused."""
        self._generation[0] = _EMPTY
        return self.payload

    def publish(self, step: int) -> None:
        """Say that the payload is complete and belongs to `step`."""
        self._generation[0] = step + 1

    @property
    def generation(self) -> int | None:
        """What `publish` was called with last; None before that and while the payload is being written."""
        held = int(self._generation[0])
        return None if held == _EMPTY else held - 1

    def to_read(self, step: int) -> torch.Tensor:
        """Return the flat payload of `step`, a view into the store.

        Raises:
            StaleSlotError: The slot holds another step's payload, or none.
        """
        held = self.generation
        if held != step:
            content = "no payload" if held is None else f"the payload of step {held}"
            raise StaleSlotError(f"slot {self._name} holds {content}, expected step {step}")
        return self.payload


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenSlots:
    """A unit's slots, mapped; `down` by part of a step, of a sum of several by the first one."""

    down: Mapping[int, Slot]
    up: Slot

    def gradients(self, step: int) -> list[torch.Tensor]:
        """The payloads of all parts of `step`, or their sums, flat; see `Slot.to_read`."""
        return [slot.to_read(step) for slot in self.down.values()]
