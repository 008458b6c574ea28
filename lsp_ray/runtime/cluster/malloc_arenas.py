"""What glibc's allocator keeps: few heaps, and given back where much has been freed.

It gives every thread that allocates a heap of its own, and what is free in one serves no other. A run has dozens of
threads, most of them Ray's, so that a process's memory would creep up for thousands of steps while what it uses stays
the same.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress

SETTINGS = {"MALLOC_ARENA_MAX": "2"}  # of actors, whose threads allocate at once; read when a process starts
_M_ARENA_MAX = -8  # of glibc's malloc.h


def limit_arenas() -> None:
    """Let this process, which runs already, have no more than one from now on: its threads mostly wait."""
    with suppress(OSError, AttributeError):  # another C library, which has no arenas
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def give_back_free() -> None:
    """Let the system have what is free in this process's heaps; takes less than a millisecond.

    A checkpoint, and an actor in a dead one's place, take megabytes for a while, between others that stay.
    """
    with suppress(OSError, AttributeError):  # as above
        ctypes.CDLL(None).malloc_trim(0)
