"""Peak of live tensor memory on the device: torch's own figure on CUDA, counted storage by storage on the CPU."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


class LiveStorage:
    """Counts the bytes of storages that are alive, from any thread, and remembers the largest sum.

    Args:
        ignored: Tensors whose storage is not the device's: host slots.
        limit_bytes: What may be alive at one time; default: any number.
    """

    def __init__(self, ignored: Sequence[torch.Tensor] = (), limit_bytes: int | None = None) -> None:
        self._limit_bytes = limit_bytes
        self._lock = threading.RLock()  # re-entrant: a finalizer may run while this thread counts
        self._ignored = {_address(tensor) for tensor in ignored}
        self._alive: dict[int, int] = {}
        self.live_bytes = 0
        self.peak_bytes = 0

    def watch(self, tensor: torch.Tensor) -> None:
        """Count the tensor's storage until nothing holds it any more.

        Raises:
            torch.OutOfMemoryError: That is more than may be alive.
        """
        self._count(tensor)
        self._check()

    def _check(self) -> None:
        if self._limit_bytes is not None and self.live_bytes > self._limit_bytes:
            raise torch.OutOfMemoryError(
                f"{self.live_bytes / 1e9:.3f} GB of tensors are alive, {self._limit_bytes / 1e9:.3f} GB may be"
            )

    def _count(self, tensor: torch.Tensor) -> None:
        if tensor.device.type != "cpu":
            return
        storage = tensor.untyped_storage()
        key, size_bytes = storage._cdata, storage.nbytes()
        with self._lock:
            if key in self._alive or _address(tensor) in self._ignored:
                return
            self._alive[key] = size_bytes
            self.live_bytes += size_bytes
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._forget, key).atexit = False

    def watch_all(self) -> None:
        """Count every tensor that Python can reach: weights, projectors, optimizer state, buffers."""
        for candidate in gc.get_objects():
            # what torch.compile leaves behind is of its own kinds, without memory
            kind = type(candidate)
            if (kind is torch.Tensor or issubclass(kind, nn.Parameter)) and candidate.layout is torch.strided:
                with suppress(RuntimeError):  # nor has one that it made of a real one
                    self._count(candidate)
        self._check()

    def _forget(self, key: int) -> None:
        with self._lock:
            self.live_bytes -= self._alive.pop(key, 0)


class _Watching(TorchDispatchMode):
    """Shows every operator's result to a LiveStorage; a mode acts on the thread that enters it."""

    def __init__(self, live: LiveStorage) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._live = live

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, tuple | list) else (result,):
            if isinstance(part, torch.Tensor):
                self._live.watch(part)
        return result


@contextmanager
def peak_of(
    device: torch.device, ignored: Sequence[torch.Tensor] = (), limit_bytes: int | None = None
) -> Iterator[LiveStorage]:
    """Measure the peak of live bytes on `device` while the context is open; read `peak_bytes` after it.

    Other threads add what they allocate with `watch`. On CUDA the figure is the allocator's peak, which knows a limit
    of its own.

    Raises:
        torch.OutOfMemoryError: On a CPU, more than `limit_bytes` are alive.
    """
    live = LiveStorage(ignored, limit_bytes)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield live
        live.peak_bytes = torch.cuda.max_memory_allocated(device)
        return
    live.watch_all()
    with _Watching(live):
        yield live


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
