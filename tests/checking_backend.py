"""CheckingBackend: streams that lag behind, and a proof by happens-before that nothing depends on their haste.

Copies wait in their stream's queue until they are told to advance, or somebody waits for them. Compute is done when it
is submitted; what it touches is checked like everything else. One host thread runs at a time and says which it is, so
that whoever schedules them determines every interleaving.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from lsp_ray.device.backend import CpuBackend, Fence
from lsp_ray.runtime.transport.slots import Slot, new_slot_buffer
from lsp_ray.trace import WorkStream
from tests.happens_before import Clock, HappensBefore, RaceError, address

Work = Callable[[], object]
_GARBAGE = 0xFF  # bytes that are NaN in every type that has one


@dataclass(slots=True)
class _Block:
    """Memory of a buffer made by `empty`; the tensor given out shares it, so this does not keep that one alive."""

    owner: WorkStream
    memory: torch.Tensor
    handed_to: set[str] = field(default_factory=set)


@dataclass(slots=True)
class _Lane:
    queued: deque[Work] = field(default_factory=deque)
    num_submitted: int = 0

    @property
    def num_done(self) -> int:
        return self.num_submitted - len(self.queued)


@dataclass(frozen=True, slots=True)
class LateFence:
    """A place in a stream's queue, and what is known to be over once it is passed."""

    backend: CheckingBackend
    stream: WorkStream
    position: int
    clock: Clock

    def synchronize(self) -> None:
        self.backend.about_to_wait()
        self.backend.catch_up(self.stream, self.position)
        self.backend.order.learn(self.backend.thread, self.clock)


class CheckingBackend(CpuBackend):
    """See the module's text.

    Attributes:
        thread: The host thread that calls.
        about_to_submit: Called before every operation; others may run meanwhile.
        about_to_wait: Called before a host thread waits for a fence; others may run meanwhile.
    """

    def __init__(self) -> None:
        self.order = HappensBefore()
        self.thread = "the main thread"
        self.about_to_submit: Work = lambda: None
        self.about_to_wait: Work = lambda: None
        self._lanes = {stream: _Lane() for stream in WorkStream}
        self._blocks: dict[int, _Block] = {}
        self._fault: RaceError | None = None

    def check(self) -> None:
        """Raise what was found where nothing could be raised: in a finalizer."""
        if self._fault is not None:
            raise self._fault

    # the seam

    def record(self, stream: WorkStream) -> Fence:
        self._submit(stream)
        return LateFence(self, stream, self._lanes[stream].num_submitted, self.order.tell(_agent(stream)))

    def wait(self, stream: WorkStream, fence: Fence) -> None:
        assert isinstance(fence, LateFence)
        self._submit(stream, lambda: self.catch_up(fence.stream, fence.position))
        self.order.learn(_agent(stream), fence.clock)

    @contextmanager
    def launch(
        self, stream: WorkStream, *, reads: Sequence[torch.Tensor] = (), writes: Sequence[torch.Tensor] = ()
    ) -> Iterator[None]:
        assert stream is WorkStream.GPU, f"torch's operators do not run on {stream}"
        self._submit(stream)
        self._note(stream, reads, writes)
        yield

    def copy_async(self, stream: WorkStream, destination: torch.Tensor, source: torch.Tensor) -> None:
        to, of = self._memory(destination), self._memory(source)
        self._submit(stream, lambda: to.copy_(of))
        self._note(stream, [source], [destination])

    def empty(self, stream: WorkStream, numel: int, dtype: torch.dtype) -> torch.Tensor:
        array = np.full(numel * dtype.itemsize, _GARBAGE, dtype=np.uint8)
        buffer = torch.from_numpy(array).view(dtype)
        self._blocks[address(buffer)] = _Block(stream, torch.from_numpy(array).view(dtype))
        weakref.finalize(buffer.untyped_storage(), self._let_go, address(buffer)).atexit = False
        return buffer

    def hand_over(self, tensor: torch.Tensor, stream: WorkStream) -> None:
        self._blocks[address(tensor)].handed_to.add(_agent(stream))

    def when_passed(self, fence: Fence, then: Callable[[], None]) -> Future[None]:
        then()  # it tells that something is there, and orders nothing: so the fence need not be waited for
        told: Future[None] = Future()
        told.set_result(None)
        return told

    # time

    def lagging(self) -> list[WorkStream]:
        """Streams that have not done all that they were given."""
        return [stream for stream, lane in self._lanes.items() if lane.queued]

    def advance(self, stream: WorkStream) -> None:
        """Do one piece of a stream's work."""
        self._lanes[stream].queued.popleft()()

    def catch_up(self, stream: WorkStream, position: int) -> None:
        """Let a stream work up to a place in its queue."""
        while self._lanes[stream].num_done < position:
            self.advance(stream)

    def _submit(self, stream: WorkStream, work: Work | None = None) -> None:
        """The stream begins no work before the host has submitted it."""
        self.about_to_submit()
        self.check()
        self.order.learn(_agent(stream), self.order.tell(self.thread))
        if work is not None:
            lane = self._lanes[stream]
            lane.queued.append(work)
            lane.num_submitted += 1
            if stream is WorkStream.GPU:
                self.catch_up(stream, lane.num_submitted)

    # buffers

    def _note(self, stream: WorkStream, reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor]) -> None:
        for buffer in reads:
            self.order.access(_agent(stream), buffer, "a read", is_write=False)
        for buffer in writes:
            self.order.access(_agent(stream), buffer, "a write", is_write=True)

    def _memory(self, buffer: torch.Tensor) -> torch.Tensor:
        block = self._blocks.get(address(buffer))
        start = buffer.storage_offset()
        return buffer if block is None else block.memory[start : start + buffer.numel()]

    def _let_go(self, key: int) -> None:
        block = self._blocks.pop(key)
        block.memory.view(torch.uint8).fill_(_GARBAGE)  # as another owner of the memory would
        try:
            self.order.forget(key, known_to=(_agent(block.owner), self.thread), handed_to=block.handed_to)
        except RaceError as error:
            self._fault = self._fault or error


def _agent(stream: WorkStream) -> str:
    return f"the {stream} stream"


class CheckedSlot(Slot):
    """Tells the backend when a host thread takes a slot and when it lets it go."""

    def __init__(self, backend: CheckingBackend, numel: int, name: str, dtype: torch.dtype) -> None:
        super().__init__(new_slot_buffer(dtype.itemsize * numel), numel, name, dtype)
        self._backend = backend
        self._what = f"slot {name}"

    def to_write(self) -> torch.Tensor:
        self._note(f"taking {self._what} to write", is_write=True)
        return super().to_write()

    def publish(self, step: int) -> None:
        self._note(f"publishing {self._what}", is_write=True)
        super().publish(step)

    def to_read(self, step: int) -> torch.Tensor:
        self._note(f"taking {self._what} to read", is_write=False)
        return super().to_read(step)

    def _note(self, what: str, *, is_write: bool) -> None:
        self._backend.order.access(self._backend.thread, self.payload, what, is_write=is_write)
