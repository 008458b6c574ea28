"""HostActivations: what blocks are given in the forward waits in main memory until the backward runs them again.

A checkpointed block keeps its input, (B, S, d), for its backward. Here each goes into one of two buffers on the device
and from there down behind the compute; those of the last two blocks stay there, and the first one's where it is, a leaf
that torch holds in any case. In the backward each comes up again while the block behind it computes. Two threads: the
compute's, where torch packs and unpacks what it keeps, and one that copies, both ways in turn. A buffer is written
again once the fence behind what was done last with it is passed.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from lsp_ray.device.backend import Backend, Fence, Stamp
from lsp_ray.device.compute_trace import ComputeTrace
from lsp_ray.device.kept_input import KeptInput, view_as
from lsp_ray.device.link import Link
from lsp_ray.device.streamed_weights import StreamedStep, waits_of
from lsp_ray.errors import ConfigError, DeadlineError
from lsp_ray.schedule.block_ring import INPUT_BUFFERS, parked_blocks
from lsp_ray.schedule.uses import Uses
from lsp_ray.trace import Span, WorkStream

ACTIVATIONS_TIMEOUT_S = 600.0  # only a hang lasts so long
_AFTER_DELTAS = 1  # of those that one use needs


class HostActivations:
    """See the module's text.

    Args:
        blocks: Unit and module of each checkpointed block, in forward order.
        backend: Copies and fences.
        input_bytes: Of a block's input in the longest micro-batch; where a longer one comes, memory grows.
        up: To take turns on with whatever else comes up; default: a link of its own.
        changed: What waiting threads sleep on.
        num_pieces: Of the output embedding, if they come up on that link; see `Uses`.

    Attributes:
        up: See above.
        down: To be shared with whatever else goes down.
        num_pageable: Inputs whose memory could not be page-locked, so that a GPU copies more slowly.
    """

    def __init__(
        self,
        blocks: Sequence[tuple[int, nn.Module]],
        backend: Backend,
        input_bytes: int,
        *,
        up: Link | None = None,
        changed: threading.Condition | None = None,
        num_pieces: int = 0,
    ) -> None:
        self._units, self._modules = [unit for unit, _ in blocks], [module for _, module in blocks]
        self._block_of_unit = {unit: block for block, unit in enumerate(self._units)}
        self._backend = backend
        self._changed = changed or threading.Condition()
        self.up, self.down = up or Link(self._changed), Link(self._changed)
        self._uses = Uses(len(blocks), num_pieces)
        self._kept: list[KeptInput] = []  # shallow to deep: the last one is needed next
        self._going_down: deque[KeptInput] = deque()
        self._is_copying = self._is_backward = self._is_closed = False
        self._current: KeptInput | None = None  # of the block whose backward is under way
        self._error: Exception | None = None
        self._copies: list[tuple[int, WorkStream, int, float, float]] = []  # block, way, bytes, begin and end
        self._stalls: list[tuple[int, Stamp, Stamp]] = []  # unit, when the compute stream began to wait, and ended
        self._trace = ComputeTrace(backend, is_on=False)
        self._parked = parked_blocks(len(blocks))
        self._make_room(input_bytes)
        self._plain: list[Any] = [module._gradient_checkpointing_func for module in self._modules]
        for block, module in list(enumerate(self._modules))[1:]:
            module._gradient_checkpointing_func = self._checkpointing(block)  # type: ignore[assignment]
        self._thread: threading.Thread | None = None

    @property
    def host_bytes(self) -> list[torch.Tensor]:
        """All inputs' memory on the host."""
        return self._slots

    def start(self) -> None:
        """Copy on a thread of its own, until `close`."""
        self._thread = threading.Thread(target=self.copy_all, name="activations", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Let the thread end, and blocks keep their inputs as they did."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        for module, plain in zip(self._modules, self._plain, strict=True):
            module._gradient_checkpointing_func = plain

    # on the compute thread

    def begin_step(self, step: int, num_passes: int, trace: ComputeTrace) -> None:
        """So many micro-batches of `step` follow; waits are cut out of the spans of `trace`."""
        self._trace = trace
        with self._changed:
            self._uses.begin_step(step, num_passes)
            self._copies, self._stalls = [], []

    def begin_pass(self) -> None:
        """A micro-batch's forward follows; what one without a backward left is let go."""
        with self._changed:
            self._uses.begin_pass()
        if self._kept:
            self._begin(0)

    def end_step(self, step: int, end: Stamp, end_s: float) -> StreamedStep:
        """Return what happened since `begin_step`; the device has passed `end`, at `end_s` of the host's clock."""
        with self._changed:
            copies, stalls = self._copies, self._stalls
        moved = {way: sum(size for _, each, size, _, _ in copies if each is way) for way in WorkStream}
        return StreamedStep(
            copies=tuple(
                Span(stream=way, step=step, layer=self._units[block], start_s=start_s, end_s=done_s)
                for block, way, _, start_s, done_s in copies
            ),
            bytes_h2d=moved[WorkStream.H2D],
            bytes_d2h=moved[WorkStream.D2H],
            waits=waits_of(stalls, step, end, end_s),
        )

    def _checkpointing(self, block: int) -> Callable[..., Any]:
        """What a block calls in place of torch's checkpoint: the same, but for where it keeps its input."""

        def checkpointing(function: Callable[..., Any], *args: Any) -> Any:
            hidden = args[0] if args else None
            if not isinstance(hidden, torch.Tensor):
                kind = type(self._modules[block]).__name__
                bound = f"be device for this model, whose {kind} does not get its input in the first place"
                raise ConfigError("runtime.activations", bound, "host")

            place = hidden.data_ptr(), hidden.shape  # not the tensor: what is packed keeps its hooks

            def pack(tensor: torch.Tensor) -> torch.Tensor | KeptInput:
                # within the block it is the checkpoint's own hooks that are asked
                is_input = (tensor.data_ptr(), tensor.shape) == place
                return self._keep(block, tensor) if is_input else tensor

            with saved_tensors_hooks(pack, self._give_back):
                return self._plain[block](function, *args)

        return checkpointing

    def _keep(self, block: int, tensor: torch.Tensor) -> torch.Tensor | KeptInput:
        if self._is_backward or (not self._kept and tensor.nbytes > self._capacity):
            self._begin(tensor.nbytes)
        if any(kept.block == block for kept in self._kept):
            return tensor  # a block that is used twice in a forward: for its like there is no place
        slot = self._slots[block - 1] if block in self._parked else None
        self._wait_for(block, lambda: bool(self._free))
        with self._changed:
            buffer, last = self._free.popleft()
        if last is not None:
            self._backend.wait(WorkStream.GPU, last)
        like = torch.empty_like(tensor, device="meta")
        with self._backend.launch(WorkStream.GPU, writes=(buffer,)), torch.no_grad():
            view_as(like, buffer).copy_(tensor)
        fence = self._backend.record(WorkStream.GPU)
        kept = KeptInput(block=block, like=like, slot=slot, buffer=buffer, here=fence)
        with self._changed:
            self._kept.append(kept)
            if slot is not None:
                self._going_down.append(kept)
                self._changed.notify_all()
        return kept

    def _give_back(self, kept: torch.Tensor | KeptInput) -> torch.Tensor:
        if isinstance(kept, torch.Tensor):
            return kept
        assert kept in self._kept, "its micro-batch is under way"
        self._leave()
        with self._changed:
            if self._kept[-1] is not kept:  # blocks behind it had no part in the loss
                self._changed.wait_for(self._is_idle)
                while self._kept[-1] is not kept:
                    self._drop(self._kept.pop())
            self._is_backward = True
            self._changed.notify_all()
        self._wait_for(kept.block, lambda: kept.here is not None)
        with self._changed:
            self._kept.pop()
            self._current = kept
            buffer, here = kept.on_device()
        self._backend.wait(WorkStream.GPU, here)
        with self._backend.launch(WorkStream.GPU, reads=(buffer,)):
            return view_as(kept.like, buffer)

    def _leave(self) -> None:
        """The compute is done with the input that it was given last, as blocks' backwards follow each other."""
        if self._current is None:
            return
        buffer, _ = self._current.on_device()
        with self._backend.launch(WorkStream.GPU, reads=(buffer,)):
            self._current = None
        read = self._backend.record(WorkStream.GPU)
        with self._changed:
            self._free.append((buffer, read))
            self._changed.notify_all()

    def _is_idle(self) -> bool:
        return self._error is not None or not (self._is_copying or self._going_down)

    def _drop(self, kept: KeptInput) -> None:
        if kept.buffer is not None:
            self._free.append((kept.buffer, kept.here))

    def _begin(self, num_bytes: int) -> None:
        """Another micro-batch's forward begins."""
        self._leave()
        with self._changed:
            self._changed.wait_for(self._is_idle)
            for kept in self._kept:
                self._drop(kept)
            self._kept, self._is_backward = [], False
        if num_bytes > self._capacity:
            for _, last in self._free:
                if last is not None:
                    self._backend.wait(WorkStream.GPU, last)
            self._make_room(num_bytes)

    def _make_room(self, num_bytes: int) -> None:
        self._slots = [torch.empty(num_bytes, dtype=torch.uint8) for _ in self._parked]
        is_gpu = self._backend.device.type == "cuda"
        self.num_pageable = sum(is_gpu and not self._backend.page_lock(slot) for slot in self._slots)
        self._capacity = num_bytes
        buffers = [self._backend.empty(WorkStream.GPU, num_bytes, torch.uint8) for _ in range(INPUT_BUFFERS)]
        self._free: deque[tuple[torch.Tensor, Fence | None]] = deque((buffer, None) for buffer in buffers)

    def _wait_for(self, block: int, is_there: Callable[[], bool]) -> None:
        began = None
        with self._changed:
            has_to_wait = not is_there()
        if has_to_wait:
            self._trace.pause()
            began = self._backend.stamp()
        with self._changed:
            came = self._changed.wait_for(lambda: is_there() or self._error is not None, ACTIVATIONS_TIMEOUT_S)
        if self._error is not None:
            raise self._error
        if not came:
            raise DeadlineError(f"the input of block {block} was not copied within {ACTIVATIONS_TIMEOUT_S:.0f} s")
        if began is not None:
            self._stalls.append((self._units[block], began, self._backend.stamp()))

    # on the thread that copies

    def copy_all(self) -> None:
        """Copy what is to go down or to come up until `close`."""
        try:
            while self._copy_next():
                pass
        except Exception as error:  # noqa: BLE001 - raised where it is waited for
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _copy_next(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._going_down or self._wanted() is not None)
            if self._is_closed:
                return False
            self._is_copying = True
            down = self._going_down.popleft() if self._going_down else None
            up = self._wanted() if down is None else None
            last = None
            if up is not None:
                up.buffer, last = self._free.popleft()
        if down is not None:
            self._bring_down(down)
        elif up is not None:
            self._bring_up(up, last)
        return True

    def _wanted(self) -> KeptInput | None:
        """What is to come up next, where there is a buffer for it."""
        if not (self._is_backward and self._free):
            return None
        return next((kept for kept in reversed(self._kept) if kept.buffer is None), None)

    def _bring_down(self, kept: KeptInput) -> None:
        size, slot, (buffer, here) = kept.like.nbytes, kept.slot, kept.on_device()
        assert slot is not None, "it has a place to go to"
        here.synchronize()  # before the turn: the span then holds the copy alone
        # the block that needs the buffer next
        with self.down.turn(self._uses.number(kept.block + INPUT_BUFFERS, backward=False)):
            start_s = time.monotonic()
            self._backend.wait(WorkStream.D2H, here)
            self._backend.copy_async(WorkStream.D2H, slot[:size], buffer[:size])
            fence = self._backend.record(WorkStream.D2H)
            self.down.pace(fence, size, start_s=start_s)
            fence.synchronize()  # the link is free when this one is done, and not before
        with self._changed:
            self._note_copy(kept, WorkStream.D2H, start_s)
            self._free.append((buffer, fence))
            kept.buffer = kept.here = None
            self._changed.notify_all()

    def _bring_up(self, kept: KeptInput, last: Fence | None) -> None:
        size, buffer, slot = kept.like.nbytes, kept.buffer, kept.slot
        assert buffer is not None, "it has one to come to"
        assert slot is not None, "it has been there"
        if last is not None:
            last.synchronize()  # before the turn: while the compute still reads, the link is for others
        with self.up.turn(self._uses.number(kept.block, backward=True), _AFTER_DELTAS):
            start_s = time.monotonic()
            self._backend.copy_async(WorkStream.H2D, buffer[:size], slot[:size])
            fence = self._backend.record(WorkStream.H2D)
            self.up.pace(fence, size, start_s=start_s)
            fence.synchronize()
        with self._changed:
            self._note_copy(kept, WorkStream.H2D, start_s)
            kept.here = fence
            self._changed.notify_all()

    def _note_copy(self, kept: KeptInput, way: WorkStream, start_s: float) -> None:
        self._copies.append((kept.block, way, kept.like.nbytes, start_s, time.monotonic()))
        self._is_copying = False

    def delta_due(self, step: int, unit: int) -> int:
        """The number of the use that reads what a delta changes in a forward of `step`; on any thread."""
        with self._changed:
            return self._uses.delta_due(step, self._block_of_unit.get(unit, 0))
