"""SharedWeights: frozen weights that stay in main memory, once for all processes of a machine that stream them.

They lie in a file without a name, which goes with the last process that has it open, however that ends. One process
packs its model's weights into it and leaves the model itself behind them, by `leave`; the others open the file by way
of any that has it, and get the model with its weights where they are. So no kind of weights needs code of its own.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import pickle
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lsp_ray.errors import WorkerLostError

if TYPE_CHECKING:  # who passes payloads on has no need of models and what they import
    from transformers import PreTrainedModel

CAN_SHARE = hasattr(os, "memfd_create")  # Linux


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsPlace:
    """A process that has the file open, and what is in it: pieces of so many bytes, then the pickled model.

    Valid on the machine of that process, for as long as it lives.
    """

    pid: int
    fd: int
    sizes: tuple[int, ...]


class SharedWeights:
    """See the module's text.

    Args:
        place: Where the file is; None: make one.

    Attributes:
        is_filled: Whether the pieces hold weights already.

    Raises:
        WorkerLostError: The process that has the file is gone.
    """

    def __init__(self, place: WeightsPlace | None = None) -> None:
        self.is_filled = place is not None
        self._pieces: list[torch.Tensor] = []
        self._num_taken = 0
        if place is None:
            self._fd, self._sizes = os.memfd_create("lsp_ray-weights"), []
            return
        try:
            self._fd = os.open(f"/proc/{place.pid}/fd/{place.fd}", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise WorkerLostError(f"process {place.pid}, which has the frozen weights, is gone") from error
        self._sizes = list(place.sizes)
        for piece in range(len(self._sizes)):
            self._map(piece)

    def __del__(self) -> None:
        """Close the file; its pieces live for as long as their tensors."""
        if hasattr(self, "_fd"):
            os.close(self._fd)

    @property
    def place(self) -> WeightsPlace:
        """Where other processes of this machine find it."""
        return WeightsPlace(pid=os.getpid(), fd=self._fd, sizes=tuple(self._sizes))

    def take(self, num_bytes: int) -> torch.Tensor:
        """The next piece, a flat uint8 tensor that begins with a page; to be taken in the same order by all."""
        if not self.is_filled:
            self._sizes.append(num_bytes)
            os.ftruncate(self._fd, _end(self._sizes))
            self._map(len(self._sizes) - 1)
        piece = self._pieces[self._num_taken]
        self._num_taken += 1
        assert piece.numel() == num_bytes, "all pack the same weights"
        return piece

    def leave(self, model: PreTrainedModel) -> None:
        """Let others have the model, whose tensors in pieces stay there; all else by value."""
        with os.fdopen(os.dup(self._fd), "wb") as file:
            file.seek(_end(self._sizes))
            _Pickler(file, self._pieces).dump(model)
        self.is_filled = True

    def model(self) -> PreTrainedModel:
        """The model that was left; nothing of the pieces is read."""
        with os.fdopen(os.dup(self._fd), "rb") as file:
            file.seek(_end(self._sizes))
            model: PreTrainedModel = _Unpickler(file, self._pieces).load()
        return model

    def protect(self) -> None:
        """From now on this process ends, with SIGSEGV, where it writes to a piece."""
        libc = ctypes.CDLL(None, use_errno=True)
        for piece in self._pieces:
            if libc.mprotect(ctypes.c_void_p(piece.data_ptr()), ctypes.c_size_t(piece.numel()), mmap.PROT_READ):
                raise OSError(ctypes.get_errno(), "mprotect of frozen weights")

    def _map(self, piece: int) -> None:
        pages = mmap.mmap(self._fd, self._sizes[piece], offset=_end(self._sizes[:piece]))
        self._pieces.append(torch.frombuffer(pages, dtype=torch.uint8))


def _end(sizes: list[int]) -> int:
    return sum(-(-size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY for size in sizes)


class _Pickler(pickle.Pickler):
    def __init__(self, file: Any, pieces: list[torch.Tensor]) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._numbers = {piece.data_ptr(): number for number, piece in enumerate(pieces)}

    def persistent_id(self, value: Any) -> tuple[int, torch.dtype | None] | None:
        if isinstance(value, torch.storage.TypedStorage):
            number = self._numbers.get(value._untyped_storage.data_ptr())
            return None if number is None else (number, value.dtype)
        if isinstance(value, torch.UntypedStorage):
            number = self._numbers.get(value.data_ptr())
            return None if number is None else (number, None)
        return None

    def reducer_override(self, value: Any) -> Any:
        """Torch would make plain parameters of quantisers' own, which know how they compute."""
        if not isinstance(value, nn.Parameter) or type(value) is nn.Parameter:
            return NotImplemented
        plain = value.detach().as_subclass(torch.Tensor)
        return _parameter, (type(value), plain, value.requires_grad), value.__dict__, None, None, _set_fields


def _parameter(kind: type[nn.Parameter], plain: torch.Tensor, requires_grad: bool) -> nn.Parameter:
    made: nn.Parameter = torch.Tensor._make_subclass(kind, plain, requires_grad)
    return made


def _set_fields(parameter: nn.Parameter, fields: dict[str, Any]) -> None:
    parameter.__dict__.update(fields)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, pieces: list[torch.Tensor]) -> None:
        super().__init__(file)
        self._pieces = pieces

    def persistent_load(self, pid: tuple[int, torch.dtype | None]) -> Any:
        number, dtype = pid
        untyped = self._pieces[number].untyped_storage()
        return (
            untyped if dtype is None else torch.storage.TypedStorage(wrap_storage=untyped, dtype=dtype, _internal=True)
        )
