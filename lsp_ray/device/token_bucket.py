"""TokenBucket: makes a part of this machine as slow as another machine's."""

from __future__ import annotations

import time
from collections.abc import Callable

BURST_S = 2e-3  # of tokens saved while idle: makes up for a sleep that lasted too long, gives no head start


class TokenBucket:
    """Work passes at a rate, in units of the caller's (bytes, elements); what is slower by itself is not held up.

    For one thread: one direction of the link, one shard.

    Args:
        rate_per_s: Units that pass in a second; above 0.
        clock: Seconds, monotonic.
        sleep: Blocks for so many seconds of `clock`.
    """

    def __init__(
        self,
        rate_per_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        assert rate_per_s > 0, rate_per_s
        self._rate_per_s = rate_per_s
        self._clock = clock
        self._sleep = sleep
        self._free_s = float("-inf")  # when the units before have passed

    def take(self, amount: float, *, start_s: float) -> None:
        """Return once `amount` units that set out at `start_s` may have passed, behind those before them."""
        self._free_s = max(self._free_s, start_s - BURST_S) + amount / self._rate_per_s
        left_s = self._free_s - self._clock()
        if left_s > 0:
            self._sleep(left_s)
