"""Noise: the random bits with which the weights of one target are rounded in one step."""

from __future__ import annotations

from dataclasses import dataclass

import torch

NOISE_ELEMENTS = 1 << 21  # of the block of random bits that all share: fresh ones would cost 6 times as much
MAX_ELEMENTS = 1 << 20  # of a part of a target


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """A target's element i has the block's element (start + i) modulo NOISE_ELEMENTS.

    Attributes:
        block: Random bits, int16: NOISE_ELEMENTS, and the first MAX_ELEMENTS of them once more, so that a part lies in
            one piece.
        start: Where the target's first element is.
    """

    block: torch.Tensor
    start: int

    def part(self, first: int, numel: int) -> torch.Tensor:
        """The bits of a part of at most MAX_ELEMENTS elements, flat: int32, uniform in 0 … 2¹⁶ − 1."""
        assert numel <= MAX_ELEMENTS, f"{numel} elements at once, at most {MAX_ELEMENTS} are possible"
        at = (self.start + first) % NOISE_ELEMENTS
        return self.block[at : at + numel].int() & 0xFFFF


def noise_block(generator: torch.Generator, device: torch.device) -> torch.Tensor:
    """Draw `Noise.block` on the CPU."""
    drawn = torch.randint(0, 1 << 16, (NOISE_ELEMENTS,), dtype=torch.int32, generator=generator)
    return torch.cat([drawn, drawn[:MAX_ELEMENTS]]).to(torch.int16).to(device)
