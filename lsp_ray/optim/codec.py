"""Codec: what a unit's values are while they cross the link.

    float32     as they are
    bfloat16    rounded to nearest
    int8        each block of 64 in whole multiples, −127 … 127, of its own bfloat16 scale; the scales stand behind all
                blocks, so that the wire is 66 bytes for every 64 values

The least scale is taken of which 127 reach the block's largest value: nothing overflows, and no value is off by as much
as a scale. A value that is NaN or infinite makes the whole of its block NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn.functional import pad

from lsp_ray.config import PayloadDtype

_BLOCK = 64
_SCALE_BYTES = 2
_LARGEST = 127
_PART = 1 << 20  # values at a time: encoding them makes float32 copies


class Bits(Protocol):
    """Random integers, uniform in 0 … 2¹⁶ − 1, one for each value."""

    def part(self, first: int, numel: int) -> torch.Tensor:
        """Those of at most 2²⁰ values from `first` on, flat; any type of integers."""
        ...


@dataclass(frozen=True, slots=True)
class Codec:
    """Encodes and decodes payloads; the bits depend on the values and the noise alone. Stateless."""

    payload_dtype: PayloadDtype = "float32"

    @property
    def dtype(self) -> torch.dtype:
        """Type of the wire's elements."""
        dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
        return dtypes[self.payload_dtype]

    @property
    def is_coarse(self) -> bool:
        """Whether so much is lost that it has to be made up for: by noise on the way down, by feedback up."""
        return self.payload_dtype == "int8"

    def wire_numel(self, numel: int) -> int:
        """Elements of the wire of `numel` values."""
        return (_BLOCK + _SCALE_BYTES) * -(-numel // _BLOCK) if self.is_coarse else numel

    def encode_(self, wire: torch.Tensor, values: torch.Tensor, bits: Bits | None = None, first: int = 0) -> None:
        """Write values into their wire.

        Args:
            wire: Flat, `wire_numel` elements of `dtype`, where the values are.
            values: Flat float32 or bfloat16.
            bits: int8 is rounded up with a probability equal to the remainder; default: to nearest.
            first: Of the values, where they are a part of the wire's: a multiple of 64, as their number is but at the
                end.
        """
        if not self.is_coarse:
            wire[first : first + values.numel()].copy_(values)
            return
        number_GB, scale_G = _split(wire)
        for at in range(0, values.numel(), _PART):
            part = values[at : at + _PART].float()
            part_GB = pad(part, (0, -part.numel() % _BLOCK)).view(-1, _BLOCK)
            groups = _groups(first + at, part_GB.numel())
            drawn = None if bits is None else bits.part(first + at, part_GB.numel()).view_as(part_GB)
            scale_G[groups] = _scales(part_GB)
            number_GB[groups] = _multiples(part_GB, scale_G[groups], drawn)

    def decode(self, wire: torch.Tensor, numel: int, first: int = 0) -> torch.Tensor:
        """Return `numel` values of a wire from `first` on, flat: of int8 as float32, else a view."""
        if not self.is_coarse:
            return wire[first : first + numel]
        number_GB, scale_G = _split(wire)
        groups = _groups(first, numel)
        return number_GB[groups].float().mul_(scale_G[groups].float()[:, None]).view(-1)[:numel]


def _groups(first: int, numel: int) -> slice:
    """The blocks of these values."""
    return slice(first // _BLOCK, -(-(first + numel) // _BLOCK))


def _split(wire: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The numbers and the scales of an int8 wire: G blocks of B."""
    num_blocks = wire.numel() // (_BLOCK + _SCALE_BYTES)
    numbers, scales = wire.split([_BLOCK * num_blocks, _SCALE_BYTES * num_blocks])
    return numbers.view(num_blocks, _BLOCK), scales.view(torch.bfloat16)


def _scales(part_GB: torch.Tensor) -> torch.Tensor:
    """bfloat16 (G,), rounded up; NaN for a block that is not finite."""
    least_G = part_GB.abs().amax(dim=1) / _LARGEST
    up_G = ((least_G.view(torch.int32) + 0xFFFF) & -(1 << 16)).view(torch.float32)
    return torch.where(least_G.isfinite(), up_G, torch.nan).bfloat16()


def _multiples(part_GB: torch.Tensor, scale_G: torch.Tensor, drawn_GB: torch.Tensor | None) -> torch.Tensor:
    """float32 whole numbers (G, B): how often the scale is in each value; 0 where there is none."""
    scale_G1 = scale_G.float()[:, None]
    exact_GB = part_GB / torch.where(scale_G1 > 0, scale_G1, torch.inf)
    if drawn_GB is None:
        exact_GB.round_()
    else:
        exact_GB.add_((drawn_GB.float() + 0.5) / (1 << 16)).floor_()
    return exact_GB.nan_to_num_(0.0).clamp_(-_LARGEST, _LARGEST)
