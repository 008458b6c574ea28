"""What glibc's allocator keeps: few heaps, and given back where much has been freed.

It gives every thread that allocates a heap of its own, and what is free in one serves no other. A run has dozens of
threads, most of them Ray's, so that a process's memory would creep up for thousands of steps while what it uses stays
the same.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress

NUM_ARENAS = 2
SETTINGS = {"MALLOC_ARENA_MAX": str(NUM_ARENAS)}  # read when a process starts
_M_ARENA_MAX = -8  # of glibc's malloc.h


def limit_arenas() -> None:
    """Do what SETTINGS does for a process that runs already: no more arenas from now on than these."""
    with suppress(OSError, AttributeError):  # another C library, which has no arenas
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, NUM_ARENAS)


def give_back_free() -> None:
    """Let the system have what is free in this process's heaps.

    A new actor in a dead one's place takes megabytes for a while, between others that stay, so that the rest would
    lie in holes.
    """
    with suppress(OSError, AttributeError):  # as above
        ctypes.CDLL(None).malloc_trim(0)
