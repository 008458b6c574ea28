"""FrozenBlock: the weights of a block that never change, in one piece of main memory.

While the block computes they are a device buffer's; at rest, the host's: whoever reads them then finds them there, and
a kernel on a GPU that is given them fails.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import accumulate

import torch
from torch import nn

from lsp_ray.device.shared_weights import SharedWeights

_ALIGNED = 256  # bytes: what kernels ask of a tensor's place


class FrozenBlock:
    """Takes the tensors over: from now on their data are views of `host_bytes`.

    Args:
        module: The block.
        unit: Its number among what is trained.
        tensors: Its weights, on the host; each of them in this block alone.
        shared: Where to put them, or where they are already; None: into memory of this process.

    Attributes:
        host_bytes: A flat uint8 tensor.
    """

    def __init__(
        self, module: nn.Module, unit: int, tensors: Sequence[torch.Tensor], shared: SharedWeights | None = None
    ) -> None:
        self.module, self.unit = module, unit
        self._tensors = tensors
        sizes = [-(-tensor.nbytes // _ALIGNED) * _ALIGNED for tensor in tensors]
        self._starts = [0, *accumulate(sizes)][:-1]
        self.host_bytes = host_bytes(sum(sizes), shared)
        for tensor, view in zip(tensors, self._views(self.host_bytes), strict=True):
            if shared is None or not shared.is_filled:
                view.copy_(tensor)
            tensor.data = view

    def point_to(self, buffer: torch.Tensor) -> None:
        """Let the weights be what is in a flat uint8 buffer, laid out as `host_bytes` is."""
        for tensor, view in zip(self._tensors, self._views(buffer), strict=True):
            tensor.data = view

    def put_back(self) -> None:
        """Let them be the host's."""
        self.point_to(self.host_bytes)

    def _views(self, flat: torch.Tensor) -> Iterator[torch.Tensor]:
        for tensor, start in zip(self._tensors, self._starts, strict=True):
            yield flat[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)


def host_bytes(size: int, shared: SharedWeights | None) -> torch.Tensor:
    """Main memory of so many bytes, flat uint8: the next piece of what is shared, or this process's."""
    return torch.empty(size, dtype=torch.uint8) if shared is None else shared.take(size)


def move_rest(model: nn.Module, stays: Collection[int], device: torch.device) -> None:
    """Bring a model's parameters and buffers to a device, but for those whose id is in `stays`."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for key, tensor in tensors.items():
        if key not in stays:
            tensor.data = tensor.data.to(device)
