"""EventQueue: what happens next; ties are broken by priority and then by order of entry, so runs repeat exactly."""

from __future__ import annotations

import heapq
from typing import Generic, TypeVar

T = TypeVar("T")


class EventQueue(Generic[T]):
    """A heap with the key (time, priority, id)."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, int, T]] = []
        self._num_pushed = 0

    def push(self, time_s: float, item: T, *, priority: int = 0) -> None:
        """Let `item` happen at `time_s`; of two at one time the smaller priority goes first."""
        heapq.heappush(self._heap, (time_s, priority, self._num_pushed, item))
        self._num_pushed += 1

    def pop(self) -> tuple[float, T]:
        """Remove what happens first and return it with its time."""
        time_s, _, _, item = heapq.heappop(self._heap)
        return time_s, item

    def __len__(self) -> int:
        return len(self._heap)
