"""What the device side needs of the hardware: copies on streams of their own, and fences between streams."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from lsp_ray.trace import WorkStream


class Fence(Protocol):
    """A point in a stream's work; passed once everything submitted before it is done."""

    def synchronize(self) -> None:
        """Block the calling thread until the fence is passed."""
        ...


class Backend(Protocol):
    """Explicit operations on streams. Compute (WorkStream.GPU) is the stream on which torch operators run.

    A buffer is written or read by another stream only after `wait` on a fence recorded behind its last use.
    """

    device: torch.device

    def record(self, stream: WorkStream) -> Fence:
        """Return a fence behind everything submitted to `stream` so far."""
        ...

    def wait(self, stream: WorkStream, fence: Fence) -> None:
        """Let later work of `stream` start only once `fence` is passed; does not block the caller."""
        ...

    def copy_async(self, stream: WorkStream, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Submit a copy; both tensors must live until a fence recorded behind it is passed."""
        ...

    def empty(self, stream: WorkStream, numel: int) -> torch.Tensor:
        """Return an uninitialised flat float32 device buffer that `stream` may write at once."""
        ...

    def hand_over(self, tensor: torch.Tensor, stream: WorkStream) -> None:
        """Say that `stream` uses a buffer made by `empty` for another one, so that it is not reused too early."""
        ...

    def when_passed(self, fence: Fence, then: Callable[[], None]) -> None:
        """Call `then` once the fence is passed, in the order of these calls; does not block the caller."""
        ...

    def page_lock(self, slot: torch.Tensor) -> bool:
        """Lock a host buffer's pages so that copies run at the link's full rate; False where that is impossible."""
        ...


class CpuBackend:
    """Model and slots share one memory: a copy is a memory copy, done when the call returns."""

    device = torch.device("cpu")

    def record(self, stream: WorkStream) -> Fence:
        """See `Backend`."""
        return _PassedFence()

    def wait(self, stream: WorkStream, fence: Fence) -> None:
        """See `Backend`."""

    def copy_async(self, stream: WorkStream, destination: torch.Tensor, source: torch.Tensor) -> None:
        """See `Backend`."""
        destination.copy_(source)

    def empty(self, stream: WorkStream, numel: int) -> torch.Tensor:
        """See `Backend`."""
        return torch.empty(numel)

    def hand_over(self, tensor: torch.Tensor, stream: WorkStream) -> None:
        """See `Backend`."""

    def when_passed(self, fence: Fence, then: Callable[[], None]) -> None:
        """See `Backend`."""
        then()

    def page_lock(self, slot: torch.Tensor) -> bool:
        """See `Backend`. Nothing to gain on a CPU."""
        return False


class _PassedFence:
    def synchronize(self) -> None:
        """Everything before is done already."""
