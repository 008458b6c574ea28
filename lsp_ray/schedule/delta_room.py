"""DeltaRoom: how many bytes of deltas may wait on the device until the forward adds them.

Deltas are added in one order: step by step, and in a step from shallow to deep. What may come up is a window of that
order: from the delta that the device has come to, as far as everything in between fits. So the delta that is needed
next always may come up, whatever came before it, and what waits is never more than the room.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SMALLEST_BYTES = 64 << 20  # no device is so small that less would help; small models then need no bound


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaRoom:
    """Bytes of each layer's delta, shallowest first, and bytes of all that may wait together."""

    sizes: tuple[int, ...]
    num_bytes: int

    def __post_init__(self) -> None:
        assert 2 * max(self.sizes) <= self.num_bytes, "one delta is added while the next one comes up"

    def holds(self, first: tuple[int, int], last: tuple[int, int]) -> bool:
        """Whether all deltas from one (step, layer) to another fit together; both count."""
        return self._bytes_before(last) + self.sizes[last[1]] - self._bytes_before(first) <= self.num_bytes

    def _bytes_before(self, delta: tuple[int, int]) -> int:
        step, layer = delta
        return step * sum(self.sizes) + sum(self.sizes[:layer])


def delta_room(sizes: Sequence[int], full_sizes: Sequence[int]) -> DeltaRoom | None:
    """Return the room of a run: two of its largest layers' uncompressed deltas, 64 MiB at least.

    Of uncompressed ones, so that there is room for compressed ones of many layers.

    Args:
        sizes: Bytes of each layer's delta as it comes up.
        full_sizes: The same without compression.

    Returns:
        The room, or None where a step's deltas fit all together.
    """
    num_bytes = max(SMALLEST_BYTES, 2 * max(full_sizes, default=0))
    return DeltaRoom(sizes=tuple(sizes), num_bytes=num_bytes) if sum(sizes) > num_bytes else None
