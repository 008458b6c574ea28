"""CudaBackend: one CUDA stream for each direction of the link, beside the default stream that computes.

Each choice follows PyTorch's "CUDA semantics" notes; the reason stands beside it. That training asks for every fence it
needs is proven without a GPU (tests/test_checking_backend.py); scripts/gpu_check.py runs all of it on one.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Self

import torch

from lsp_ray.device.backend import Fence, Stamp
from lsp_ray.trace import WorkStream


class CudaBackend:
    """See `Backend`. Compute is the device's default stream, the one that autograd's threads use as well.

    Args:
        index: Of the GPU.
        limit_bytes: Of its memory that tensors may take; default: all there is.
    """

    has_graphs = True

    def __init__(self, index: int = 0, limit_bytes: int | None = None) -> None:
        self.device = torch.device("cuda", index)
        if limit_bytes is not None:
            there_bytes = torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / there_bytes), self.device)
        # cuDNN's attention, which torch prefers on large cards, plans anew for every length of a batch: some tenths of
        # a second, and our batches are as long as their examples
        torch.backends.cuda.enable_cudnn_sdp(False)
        self._recorder = torch.cuda.Stream(self.device)
        self._pool = torch.cuda.graph_pool_handle()
        self._has_recorded = False
        self._announcer = ThreadPoolExecutor(1, thread_name_prefix="announce")
        self._streams = {
            WorkStream.GPU: torch.cuda.default_stream(self.device),
            WorkStream.D2H: torch.cuda.Stream(self.device),
            WorkStream.H2D: torch.cuda.Stream(self.device),
        }

    def record(self, stream: WorkStream) -> Fence:
        """See `Backend`."""
        # blocking: a helper thread that waits must sleep, not spin on a core that a shard could use
        event = torch.cuda.Event(blocking=True)
        event.record(self._streams[stream])
        return event

    def stamp(self) -> Stamp:
        """See `Backend`. An event with a time of its own: the host does not wait for it."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._streams[WorkStream.GPU])
        return CudaStamp(event=event)

    def wait(self, stream: WorkStream, fence: Fence) -> None:
        """See `Backend`."""
        assert isinstance(fence, torch.cuda.Event)
        self._streams[stream].wait_event(fence)

    def launch(
        self, stream: WorkStream, *, reads: Sequence[torch.Tensor] = (), writes: Sequence[torch.Tensor] = ()
    ) -> AbstractContextManager[None]:
        """See `Backend`."""
        # said, not assumed: autograd's threads run a hook on the stream of the forward that it belongs to
        context: AbstractContextManager[None] = torch.cuda.stream(self._streams[stream])
        return context

    def copy_async(self, stream: WorkStream, destination: torch.Tensor, source: torch.Tensor) -> None:
        """See `Backend`. With pageable host memory CUDA stages the copy: slower, same order, same result."""
        with torch.cuda.stream(self._streams[stream]):
            destination.copy_(source, non_blocking=True)

    def empty(self, stream: WorkStream, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """See `Backend`."""
        # a block of the allocator's pool belongs to the stream current at allocation: that stream may write at once
        with torch.cuda.stream(self._streams[stream]):
            return torch.empty(numel, dtype=dtype, device=self.device)

    def hand_over(self, tensor: torch.Tensor, stream: WorkStream) -> None:
        """See `Backend`."""
        tensor.record_stream(self._streams[stream])

    def when_passed(self, fence: Fence, then: Callable[[], None]) -> Future[None]:
        """See `Backend`."""
        # the host runs far ahead of the device: what it has submitted is not there yet
        return self._announcer.submit(_wait_then, fence, then)

    def record_graph(self, run: Callable[[], None], *, apart: bool) -> Callable[[], None]:
        """See `Backend`."""
        if not self._has_recorded:
            # graphs have memory of their own: let go what the steps before them left in the allocator's
            torch.cuda.empty_cache()
            self._has_recorded = True
        graph, compute = torch.cuda.CUDAGraph(), self._streams[WorkStream.GPU]
        self._recorder.wait_stream(compute)
        # the default stream cannot be recorded; other threads go on copying meanwhile, which only this mode allows
        with torch.cuda.stream(self._recorder):
            graph.capture_begin(pool=None if apart else self._pool, capture_error_mode="thread_local")
            try:
                run()
            finally:
                graph.capture_end()
        compute.wait_stream(self._recorder)
        return graph.replay

    def page_lock(self, slot: torch.Tensor) -> bool:
        """See `Backend`."""
        # slots are shared memory that torch did not allocate, so pin_memory() would copy them: register in place
        cudart, address = torch.cuda.cudart(), slot.data_ptr()
        if int(cudart.cudaHostRegister(address, slot.nbytes, 0)) == 0:
            # CUDA would go on copying from and to the old pages after the address has been given to other memory
            weakref.finalize(slot.untyped_storage(), cudart.cudaHostUnregister, address).atexit = False
            return True
        # the failure stays behind as the runtime's last error, and the next kernel's launch check would raise it: let
        # it be a kernel that nobody needs
        with suppress(RuntimeError):
            torch.zeros(1, device=self.device)
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaStamp:
    """See `Stamp`."""

    event: torch.cuda.Event

    def seconds_until(self, later: Self) -> float:
        """See `Stamp`."""
        return float(self.event.elapsed_time(later.event)) / 1e3


def _wait_then(fence: Fence, then: Callable[[], None]) -> None:
    fence.synchronize()
    then()
