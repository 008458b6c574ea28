"""KeptInput: what a block was given in a forward, in a buffer on the device or in main memory until its backward."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lsp_ray.device.backend import Fence


@dataclass(slots=True, eq=False, kw_only=True)
class KeptInput:
    """Of a block, in one micro-batch.

    Attributes:
        block: Whose it is.
        like: Its shape and dtype, on no device.
        slot: Its place in main memory, flat uint8; None: it stays in its buffer.
        buffer: Its place on the device, flat uint8; None while it is in main memory alone.
        here: Behind what wrote the buffer, once that is submitted by the compute or done by the thread that copies.
    """

    block: int
    like: torch.Tensor
    slot: torch.Tensor | None
    buffer: torch.Tensor | None
    here: Fence | None

    def on_device(self) -> tuple[torch.Tensor, Fence]:
        """Its buffer, and the fence behind what wrote it."""
        assert self.buffer is not None, "it is in a buffer"
        assert self.here is not None, "it has come there"
        return self.buffer, self.here


def view_as(like: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """What is in a flat uint8 buffer, in the shape and dtype of another tensor."""
    return buffer[: like.nbytes].view(like.dtype).view(like.shape)
