"""Backends, and a policy, that leave out one of the seam's operations, as a CUDA path that forgot it would."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from lsp_ray.device.backend import Fence
from lsp_ray.schedule.ops import Op
from lsp_ray.schedule.policy import Delayed
from lsp_ray.trace import WorkStream
from tests.checking_backend import CheckingBackend, LateFence
from tests.happens_before import address


class _Promise:
    """A fence that says it is passed when it is not."""

    def __init__(self, fence: Fence) -> None:
        assert isinstance(fence, LateFence)
        self.fence = fence

    def synchronize(self) -> None:
        pass


class Hasty(CheckingBackend):
    """Its host does not wait for the fences of one stream; other streams do."""

    def __init__(self, stream: WorkStream) -> None:
        super().__init__()
        self._hasty = stream

    def record(self, stream: WorkStream) -> Fence:
        fence = super().record(stream)
        return _Promise(fence) if stream is self._hasty else fence

    def wait(self, stream: WorkStream, fence: Fence) -> None:
        super().wait(stream, fence.fence if isinstance(fence, _Promise) else fence)


class Early(CheckingBackend):
    """Its host does not wait for what reads a piece of the output embedding: that has more bytes than any block."""

    def __init__(self, block_bytes: int) -> None:
        super().__init__()
        self._block_bytes = block_bytes
        self._with_pieces: set[int] = set()
        self._is_piece = False

    def copy_async(self, stream: WorkStream, destination: torch.Tensor, source: torch.Tensor) -> None:
        is_piece = source.nbytes > self._block_bytes
        (self._with_pieces.add if is_piece else self._with_pieces.discard)(address(destination))
        super().copy_async(stream, destination, source)

    @contextmanager
    def launch(
        self, stream: WorkStream, *, reads: Sequence[torch.Tensor] = (), writes: Sequence[torch.Tensor] = ()
    ) -> Iterator[None]:
        self._is_piece = any(address(buffer) in self._with_pieces for buffer in reads)
        with super().launch(stream, reads=reads, writes=writes):
            yield

    def record(self, stream: WorkStream) -> Fence:
        is_piece, fence = self._is_piece, super().record(stream)
        return _Promise(fence) if stream is WorkStream.GPU and is_piece else fence


class Unordered(CheckingBackend):
    """One of its streams does not wait for others, and nobody waits for the compute stream."""

    def __init__(self, stream: WorkStream) -> None:
        super().__init__()
        self._unordered = stream

    def record(self, stream: WorkStream) -> Fence:
        fence = super().record(stream)
        return _Promise(fence) if stream is WorkStream.GPU else fence

    def wait(self, stream: WorkStream, fence: Fence) -> None:
        if stream is not self._unordered:
            super().wait(stream, fence.fence if isinstance(fence, _Promise) else fence)


class Keeping(CheckingBackend):
    """Does not tell the allocator that another stream uses a buffer."""

    def hand_over(self, tensor: torch.Tensor, stream: WorkStream) -> None:
        pass


class Careless(Delayed):
    """Launches what writes a slot though the step before has not been read from it."""

    def _finds_slot(self, op: Op) -> bool:
        return True
