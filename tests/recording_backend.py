"""A CPU that records graphs: what was run is run again, operator by operator, on the very memory of the recording.

As on a GPU, recording leaves no trace in memory that was there before: what the operators changed of it is put back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from lsp_ray.device.backend import CpuBackend


class RecordingBackend(CpuBackend):
    """Counts what it launched.

    Attributes:
        num_recorded: Graphs.
        num_launched: Launches of graphs.
    """

    has_graphs = True

    def __init__(self) -> None:
        self.num_recorded = self.num_launched = 0

    def record_graph(self, run: Callable[[], None], *, apart: bool) -> Callable[[], None]:
        recording = _Recording()
        with recording:
            run()
        recording.put_back()
        self.num_recorded += 1

        def launch() -> None:
            self.num_launched += 1
            with torch.no_grad():
                recording.replay()

        return launch


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._made: set[int] = set()  # addresses of storages that the recording made
        self._before: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._ops: list[tuple[Any, tuple[Any, ...], Mapping[str, Any], list[Any]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for argument, value in (*zip(func._schema.arguments, args, strict=False), *_named(func, kwargs)):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for part in tree_flatten(value)[0]:
                    if part.untyped_storage()._cdata not in self._made:
                        self._before.append((part, part.clone()))
        result = func(*args, **kwargs)
        parts = tree_flatten(result)[0]
        for part, returned in zip(parts, _returned(func, parts), strict=True):
            if isinstance(part, torch.Tensor) and returned is None:
                self._made.add(part.untyped_storage()._cdata)
        self._ops.append((func, *tree_map_only(torch.Tensor, _uncounted, (args, kwargs, parts))))
        return result

    def put_back(self) -> None:
        for tensor, content in reversed(self._before):
            tensor.data.copy_(content)
        self._before.clear()

    def replay(self) -> None:
        for func, args, kwargs, parts in self._ops:
            again = tree_flatten(func(*args, **kwargs))[0]
            for part, new in zip(parts, again, strict=True):
                if isinstance(part, torch.Tensor) and part.data_ptr() != new.data_ptr():
                    part.copy_(new)


def _uncounted(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory, without autograd's count of changes: a graph's launch does not count either."""
    return tensor.data


def _named(func: Any, kwargs: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    return [(argument, kwargs[argument.name]) for argument in func._schema.arguments if argument.name in kwargs]


def _returned(func: Any, parts: Sequence[Any]) -> list[Any]:
    """Of each part whether it aliases an argument; lists of tensors are new or views as a whole."""
    returns = func._schema.returns
    if len(returns) == len(parts):
        return [value.alias_info for value in returns]
    return [returns[0].alias_info if returns else None] * len(parts)
