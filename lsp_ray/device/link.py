"""Link: one direction between host and device, one copy at a time, that of the earliest deadline first.

Up come deltas, streamed weights and the inputs of blocks that are run again; down go those inputs and payloads. Each
kind has its thread, which asks for a turn.
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from lsp_ray.device.backend import Fence
from lsp_ray.device.token_bucket import TokenBucket


class Link:
    """See the module's text.

    Args:
        changed: What waiting threads sleep on.

    Attributes:
        bucket: Slows copies down, in bytes; None does not.
    """

    def __init__(self, changed: threading.Condition | None = None) -> None:
        self.bucket: TokenBucket | None = None
        self._changed = changed or threading.Condition()
        self._asking: list[tuple[int, int, int]] = []  # a heap of deadlines, what comes first at one, and when asked
        self._num_asked = 0
        self._is_taken = False

    @contextmanager
    def turn(self, due: int, order: int = 0) -> Iterator[None]:
        """Within the context nobody else copies.

        Args:
            due: Number of the use that needs what is to be copied; the lowest goes first.
            order: Of those that one use needs, the lowest goes first.
        """
        with self._changed:
            ticket = due, order, self._num_asked
            self._num_asked += 1
            heapq.heappush(self._asking, ticket)
            try:
                self._changed.wait_for(lambda: not self._is_taken and self._asking[0] == ticket)
            finally:
                self._asking.remove(ticket)
                heapq.heapify(self._asking)
            self._is_taken = True
        try:
            yield
        finally:
            with self._changed:
                self._is_taken = False
                self._changed.notify_all()

    def pace(self, fence: Fence, num_bytes: int, *, start_s: float) -> None:
        """Return once a copy that ends at `fence` may have ended on a link as slow as this one is to be."""
        if self.bucket is not None:
            fence.synchronize()
            self.bucket.take(num_bytes, start_s=start_s)
