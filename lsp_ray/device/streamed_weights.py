"""StreamedWeights: frozen weights that live in main memory and come up block by block behind the compute.

A few buffers on the device hold the blocks that are needed next (see `BlockRing`). Two threads: the compute's, in the
blocks' hooks, and one that copies. A buffer is written again once the compute stream has passed the fence behind its
last read. Blocks must be checkpointed: what the first forward keeps of a weight is not there any more in the backward.
Pieces of the output embedding come up between forward and backward, as blocks that follow the others.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lsp_ray.device.backend import Backend, Fence, Stamp
from lsp_ray.device.compute_trace import ComputeTrace
from lsp_ray.device.frozen_block import FrozenBlock
from lsp_ray.device.host_embedding import HostEmbedding
from lsp_ray.device.host_table import HostTable
from lsp_ray.device.link import Link
from lsp_ray.device.streamed_head import HeadPiece, StreamedHead
from lsp_ray.errors import DeadlineError
from lsp_ray.schedule.block_ring import FEWEST_BUFFERS, BlockRing
from lsp_ray.trace import Span, Wait, WorkStream

WEIGHTS_TIMEOUT_S = 600.0  # only a hang lasts so long
_AFTER_DELTAS = 1  # of those that one use needs: a delta is the smaller one


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamedStep:
    """What weights, or activations, did in a step: copies that began in it, their bytes, and waits for them."""

    copies: tuple[Span, ...] = ()
    bytes_h2d: int = 0
    bytes_d2h: int = 0
    waits: tuple[Wait, ...] = ()


class StreamedWeights:
    """See the module's text.

    Args:
        blocks: In forward order.
        backend: Copies and fences.
        num_buffers: Blocks that are on the device at one time.
        changed: What waiting threads sleep on.
        tables: Of embeddings that stay in main memory as well, each once.
        embedding: What looks up in one of them.
        head: What goes through one of them.

    Attributes:
        link: Copies take turns on it with deltas.
        host_bytes: All memory on the host.
        num_pieces: Of the output embedding, in the order of uses; 0: it is on the device.
        num_pageable: Blocks, and tables, from whose memory a GPU copies more slowly, as it could not be page-locked.
    """

    def __init__(
        self,
        blocks: Sequence[FrozenBlock],
        backend: Backend,
        *,
        num_buffers: int = FEWEST_BUFFERS,
        changed: threading.Condition | None = None,
        tables: Sequence[HostTable] = (),
        embedding: HostEmbedding | None = None,
        head: StreamedHead | None = None,
    ) -> None:
        self._backend, self._tables, self._embedding, self._head = backend, tables, embedding, head
        self._blocks: list[FrozenBlock | HeadPiece] = [*blocks, *(head.parts if head is not None else ())]
        self.num_pieces = len(self._blocks) - len(blocks)
        self._changed = changed or threading.Condition()
        self.link = Link(self._changed)
        self._ring = BlockRing(len(blocks), num_buffers, self.num_pieces)
        self.host_bytes = [*(block.host_bytes for block in blocks), *(table.table_VH for table in tables)]
        locked = self.host_bytes[: len(blocks)] + ([head.table.table_VH] if head is not None else [])
        is_gpu = backend.device.type == "cuda"
        self.num_pageable = sum(is_gpu and not backend.page_lock(memory) for memory in locked)
        self._block_of_unit = {block.unit: index for index, block in enumerate(blocks)}
        size = max(block.host_bytes.numel() for block in self._blocks)
        num_buffers = min(num_buffers, len(self._blocks))
        self._buffers = [backend.empty(WorkStream.H2D, size, torch.uint8) for _ in range(num_buffers)]
        self._arrived: dict[int, Fence] = {}  # block -> behind its copy
        self._read: dict[int, Fence] = {}  # block -> behind its last reads
        self._error: Exception | None = None
        self._is_closed = False
        self._copies: list[tuple[int, float, float]] = []  # block, when its copy began and ended
        self._stalls: list[tuple[int, Stamp, Stamp]] = []  # block, when the compute stream began to wait, and ended
        self._trace = ComputeTrace(backend, is_on=False)
        self._hooks = [hook for index, block in enumerate(blocks) for hook in self._hooked(index, block.module)]
        if head is not None:
            head.come_to = lambda piece: self._come_to(len(blocks) + piece, backward=False)
        self._thread: threading.Thread | None = None

    @property
    def buffer_bytes(self) -> int:
        """On the device."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def start(self) -> None:
        """Copy on a thread of its own, until `close`."""
        self._thread = threading.Thread(target=self.bring_all, name="weights", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Let the thread end, and the model be without hooks; its weights are on the host."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        for hook in self._hooks:
            hook.remove()
        for block in self._blocks:
            block.put_back()
        for used in (self._embedding, self._head, *self._tables):
            if used is not None:
                used.close()

    # on the compute thread

    def begin_step(self, step: int, num_passes: int, trace: ComputeTrace) -> None:
        """So many micro-batches of `step` follow; waits are cut out of the spans of `trace`."""
        self._trace = trace
        with self._changed:
            self._ring.begin_step(step, num_passes)
            self._copies, self._stalls = [], []

    def begin_pass(self) -> None:
        """A micro-batch's forward follows."""
        with self._changed:
            self._ring.begin_pass()
            self._changed.notify_all()

    def end_step(self, step: int, end: Stamp, end_s: float) -> StreamedStep:
        """Return what happened since `begin_step`; the device has passed `end`, at `end_s` of the host's clock."""
        with self._changed:
            copies, stalls = self._copies, self._stalls
        return StreamedStep(
            copies=tuple(
                Span(stream=WorkStream.H2D, step=step, layer=self._blocks[block].unit, start_s=start_s, end_s=done_s)
                for block, start_s, done_s in copies
            ),
            bytes_h2d=sum(self._blocks[block].host_bytes.nbytes for block, _, _ in copies),
            waits=waits_of(
                [(self._blocks[block].unit, began, ended) for block, began, ended in stalls], step, end, end_s
            ),
        )

    def _hooked(self, index: int, module: nn.Module) -> Iterator[Any]:
        def before_forward(_module: nn.Module, _args: object) -> None:
            self._come_to(index, backward=False)

        def after_forward(_module: nn.Module, _args: object, output: object) -> None:
            for part in output if isinstance(output, tuple | list) else (output,):
                if isinstance(part, torch.Tensor) and part.requires_grad:
                    part.register_hook(before_backward)

        def before_backward(_grad: torch.Tensor) -> None:
            self._come_to(index, backward=True)

        yield module.register_forward_pre_hook(before_forward)
        yield module.register_forward_hook(after_forward)

    def _come_to(self, block: int, *, backward: bool) -> None:
        left = self._ring.at  # no other thread changes it
        if block == left:
            with self._changed:
                self._ring.use(block, backward=backward)
                self._changed.notify_all()
            return
        read = None if left is None else self._leave(left)
        with self._changed:
            if left is not None and read is not None:
                self._read[left] = read
            self._ring.use(block, backward=backward)
            is_there = block in self._arrived
            self._changed.notify_all()
        began = None if is_there else self._pause()
        with self._changed:
            came = self._changed.wait_for(lambda: block in self._arrived or self._error is not None, WEIGHTS_TIMEOUT_S)
            if self._error is not None:
                raise self._error
            if not came:
                raise DeadlineError(f"the weights of block {block} did not come up within {WEIGHTS_TIMEOUT_S:.0f} s")
            fence, buffer = self._arrived[block], self._buffers[self._ring.buffer_of(block)]
        self._backend.wait(WorkStream.GPU, fence)
        if began is not None:
            self._stalls.append((block, began, self._backend.stamp()))
        with self._backend.launch(WorkStream.GPU, reads=(buffer,)):
            self._blocks[block].point_to(buffer)

    def _leave(self, block: int) -> Fence:
        """Return a fence behind all that reads the block's buffer."""
        buffer = self._buffers[self._ring.buffer_of(block)]
        with self._backend.launch(WorkStream.GPU, reads=(buffer,)):
            self._blocks[block].put_back()
        return self._backend.record(WorkStream.GPU)

    def _pause(self) -> Stamp:
        self._trace.pause()
        return self._backend.stamp()

    # on the thread that copies

    def bring_all(self) -> None:
        """Bring up what is wanted until `close`."""
        try:
            while self._bring_next():
                pass
        except Exception as error:  # noqa: BLE001 - raised where it is waited for
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _bring_next(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._ring.wanted() is not None)
            bring = self._ring.wanted()
            if self._is_closed or bring is None:
                return False
            self._ring.begin(bring)
            read = None
            if bring.evicts is not None:
                del self._arrived[bring.evicts]
                read = self._read.pop(bring.evicts, None)
        block, buffer = self._blocks[bring.block], self._buffers[bring.buffer]
        if read is not None:
            read.synchronize()  # before the turn: while the compute still reads, the link is for deltas
        with self.link.turn(bring.due, _AFTER_DELTAS):
            start_s = time.monotonic()
            self._backend.copy_async(WorkStream.H2D, buffer[: block.host_bytes.numel()], block.host_bytes)
            fence = self._backend.record(WorkStream.H2D)
            self.link.pace(fence, block.host_bytes.nbytes, start_s=start_s)
            fence.synchronize()  # the link is free when this one is done, and not before
        with self._changed:
            self._copies.append((bring.block, start_s, time.monotonic()))
            self._arrived[bring.block] = fence
            self._changed.notify_all()
        return True

    def delta_due(self, step: int, unit: int) -> int:
        """The number of the use that reads what a delta changes in a forward of `step`; on any thread."""
        with self._changed:
            return self._ring.delta_due(step, self._block_of_unit.get(unit, 0))


def waits_of(stalls: Sequence[tuple[int, Stamp, Stamp]], step: int, end: Stamp, end_s: float) -> tuple[Wait, ...]:
    """Waits of the compute stream, from their units, begins and ends; the device has passed `end` at `end_s`."""
    return tuple(
        Wait(step=step, layer=unit, start_s=end_s - began.seconds_until(end), end_s=end_s - ended.seconds_until(end))
        for unit, began, ended in stalls
    )
