"""Axis: from values to places on paper, with ticks at round numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """Maps `low` … `high` to `start` … `end` (SVG units; upwards if end < start)."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """Place of a value."""
        share = (value - self.low) / ((self.high - self.low) or 1.0)
        return self.start + share * (self.end - self.start)

    def ticks(self, about: int = 5) -> list[float]:
        """Round values within the axis, about so many: steps are 1, 2 or 5 times a power of ten."""
        spacing = _spacing(self.high - self.low, about)
        first = math.ceil(self.low / spacing - 1e-9)
        last = math.floor(self.high / spacing + 1e-9)
        return [number * spacing for number in range(first, last + 1)]

    def label(self, value: float) -> str:
        """A tick's text, with the decimals that the spacing needs."""
        decimals = max(0, -math.floor(math.log10(_spacing(self.high - self.low, 5)) + 1e-9))
        return f"{value:.{decimals}f}"


def _spacing(extent: float, about: int) -> float:
    rough = (extent or 1.0) / about
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
