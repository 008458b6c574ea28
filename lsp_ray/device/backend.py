"""What the device side needs of the hardware: work on streams that names its buffers, and fences between streams.

The contract, which a checking backend in the tests proves for whole training runs:

- A stream does its work in order, later than it is submitted, and side by side with the other streams and the host.
- Buffers that cross streams are made by `empty` or are host slots. Work names those that it reads and writes: `launch`
  for torch's operators, `copy_async` for copies. All other tensors belong to the compute stream.
- Two accesses to a buffer, one of them a write, are ordered: on one stream; by `wait` on a fence recorded behind the
  first; or by a host thread that returned from `Fence.synchronize` before it submits the second or tells another.
- A buffer of `empty` is let go when every stream's access is ordered before later work of the stream it was made for,
  or after `hand_over` to the stream.
- A host slot is taken and released by `Slot` (runtime/transport/slots.py): `to_write` once its last reader is done,
  `publish` once the write is done (a copy is, when its fence was synchronized), `to_read` after that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch

from lsp_ray.trace import WorkStream


class Fence(Protocol):
    """A point in a stream's work; passed once everything submitted before it is done."""

    def synchronize(self) -> None:
        """Block the calling thread until the fence is passed."""
        ...


class Stamp(Protocol):
    """A moment of the compute stream; readable once the stream has passed it and the later one."""

    def seconds_until(self, later: Any) -> float:
        """Seconds of the stream's time from here to `later`."""
        ...


class Backend(Protocol):
    """Explicit operations on streams. Compute (WorkStream.GPU) is the stream on which torch operators run."""

    device: torch.device

    def record(self, stream: WorkStream) -> Fence:
        """Return a fence behind everything submitted to `stream` so far."""
        ...

    def stamp(self) -> Stamp:
        """Return the moment at which everything submitted to the compute stream so far is done; blocks nobody."""
        ...

    def wait(self, stream: WorkStream, fence: Fence) -> None:
        """Let later work of `stream` start only once `fence` is passed; does not block the caller."""
        ...

    def launch(
        self, stream: WorkStream, *, reads: Sequence[torch.Tensor] = (), writes: Sequence[torch.Tensor] = ()
    ) -> AbstractContextManager[None]:
        """Within the context torch's operators go to `stream`; of the buffers that cross streams they use these."""
        ...

    def copy_async(self, stream: WorkStream, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Submit a copy; both tensors must live until a fence recorded behind it is passed."""
        ...

    def empty(self, stream: WorkStream, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Return an uninitialised flat device buffer that `stream` may write at once."""
        ...

    def hand_over(self, tensor: torch.Tensor, stream: WorkStream) -> None:
        """Say that `stream` uses a buffer made by `empty` for another one, so that it is not reused too early."""
        ...

    def when_passed(self, fence: Fence, then: Callable[[], None]) -> Future[None]:
        """Call `then` once the fence is passed, in the order of these calls; does not block the caller.

        The future is done when `then` is, and holds what it or the fence raised.
        """
        ...

    @property
    def has_graphs(self) -> bool:
        """Whether `record_graph` works."""
        ...

    def record_graph(self, run: Callable[[], None], *, apart: bool) -> Callable[[], None]:
        """Record what `run` launches on the compute stream, without doing it; return what launches all of it again.

        Args:
            run: Its operators must not depend on values; tensors that it makes and that live on keep their places.
            apart: Whether its memory is its own; else graphs share a pool, and are launched as they were recorded.

        Raises:
            RuntimeError: It cannot be recorded.
        """
        ...

    def page_lock(self, slot: torch.Tensor) -> bool:
        """Lock a host buffer's pages so that copies run at the link's full rate; False where that is impossible."""
        ...


class CpuBackend:
    """Model and slots share one memory: a copy is a memory copy, done when the call returns."""

    device = torch.device("cpu")
    has_graphs = False

    def record(self, stream: WorkStream) -> Fence:
        """See `Backend`."""
        return _PassedFence()

    def stamp(self) -> Stamp:
        """See `Backend`. Operators are done when their call returns."""
        return HostStamp(at_s=time.monotonic())

    def wait(self, stream: WorkStream, fence: Fence) -> None:
        """See `Backend`."""

    def launch(
        self, stream: WorkStream, *, reads: Sequence[torch.Tensor] = (), writes: Sequence[torch.Tensor] = ()
    ) -> AbstractContextManager[None]:
        """See `Backend`."""
        return nullcontext()

    def copy_async(self, stream: WorkStream, destination: torch.Tensor, source: torch.Tensor) -> None:
        """See `Backend`."""
        destination.copy_(source)

    def empty(self, stream: WorkStream, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """See `Backend`."""
        return torch.empty(numel, dtype=dtype)

    def hand_over(self, tensor: torch.Tensor, stream: WorkStream) -> None:
        """See `Backend`."""

    def when_passed(self, fence: Fence, then: Callable[[], None]) -> Future[None]:
        """See `Backend`."""
        then()
        told: Future[None] = Future()
        told.set_result(None)
        return told

    def record_graph(self, run: Callable[[], None], *, apart: bool) -> Callable[[], None]:
        """See `Backend`."""
        raise NotImplementedError("a CPU launches nothing")

    def page_lock(self, slot: torch.Tensor) -> bool:
        """See `Backend`. Nothing to gain on a CPU."""
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class HostStamp:
    """See `Stamp`; seconds of the host's monotonic clock."""

    at_s: float

    def seconds_until(self, later: Self) -> float:
        """See `Stamp`."""
        return later.at_s - self.at_s


class _PassedFence:
    def synchronize(self) -> None:
        """Everything before is done already."""
