"""Slot: a buffer in Ray's object store that is allocated once and reused every step without copies.

Ray promises neither that an object may be written nor that anyone notices: there is one writer for each slot at a time,
hand-over is by message, and the header's generation (the step of its payload) exposes a reader who came too early or
too late.

Layout: one page of header (int64 generation), then the float32 payload, both page-aligned so that each slot can be
page-locked on its own.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch

from lsp_ray.errors import StaleSlotError
from lsp_ray.sim.store import PAGE_BYTES, slot_bytes

_EMPTY = -1


def new_slot_buffer(numel: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """Return the zeroed buffer to put into the object store for a slot of `numel` elements."""
    return np.zeros(slot_bytes(numel), dtype=np.uint8)


def new_slot(numel: int, name: str) -> Slot:
    """Return a slot in this process's own memory, for threads in the actors' place."""
    return Slot(new_slot_buffer(numel), numel, name)


class Slot:
    """A process's view of a slot.

    Args:
        buffer: What `ray.get` returned for the slot's object: shared memory, read-only by flag alone. Holding it keeps
            the object in its place; the store neither spills nor moves what is held.
        numel: Payload length in float32 elements.
        name: For error messages.
    """

    def __init__(self, buffer: np.ndarray[tuple[int], np.dtype[np.uint8]], numel: int, name: str) -> None:
        self._buffer = buffer
        self._name = name
        first = -buffer.ctypes.data % PAGE_BYTES
        # the array's read-only flag guards the object for others; this project's protocol is what guards it here
        writable = (ctypes.c_uint8 * buffer.nbytes).from_address(buffer.ctypes.data)
        memory = np.frombuffer(memoryview(writable), dtype=np.uint8)
        self._generation = memory[first : first + 8].view(np.int64)
        payload_start = first + PAGE_BYTES
        self.payload = torch.from_numpy(memory[payload_start : payload_start + 4 * numel].view(np.float32))

    def to_write(self) -> torch.Tensor:
        """Return the flat float32 payload for writing; until `publish` every reader is refused."""
        self._generation[0] = _EMPTY
        return self.payload

    def publish(self, step: int) -> None:
        """Say that the payload is complete and belongs to `step`."""
        self._generation[0] = step

    @property
    def generation(self) -> int | None:
        """What `publish` was called with last; None while the payload is being written."""
        held = int(self._generation[0])
        return None if held == _EMPTY else held

    def to_read(self, step: int) -> torch.Tensor:
        """Return the flat float32 payload of `step`, a view into the store.

        Raises:
            StaleSlotError: The slot holds another step's payload, or none.
        """
        held = int(self._generation[0])
        if held != step:
            content = "no payload" if held == _EMPTY else f"the payload of step {held}"
            raise StaleSlotError(f"slot {self._name} holds {content}, expected step {step}")
        return self.payload
