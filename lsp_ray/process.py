"""How Python and OpenMP behave in the processes of lsp_ray's programs and actors.

OpenMP's threads are to sleep while they have nothing to do. As they come they spin, each on a core of its own, until
the last of them is done. Beside any other busy process that costs 10 to 30 times as much as the work itself: the one
that is waited for is not running.

Python's garbage collector is to leave alone what stays until the end. Torch and transformers bring a million objects,
which it goes through again and again while they are imported, for a quarter of that time, and when the process ends,
for longer than a second.
"""

import atexit
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

PASSIVE_WAITING = {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}  # the second is Intel's and LLVM's own


def prepare_process() -> None:
    """Do so in this program and those that it starts; call it before torch is imported. A person's own value wins."""
    for name, value in PASSIVE_WAITING.items():
        os.environ.setdefault(name, value)
    atexit.register(gc.freeze)


@contextmanager
def uncollected(*, is_own: bool) -> Iterator[None]:
    """Import here: nothing is collected meanwhile, and of a process that is ours alone never what there is then."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if is_own:
            gc.freeze()
        if was_enabled:
            gc.enable()


def keep_loaded() -> None:
    """The end of `uncollected` in a process whose imports are not ours to make: an actor's."""
    gc.freeze()
    gc.enable()
