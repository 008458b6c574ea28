"""Passive waiting: OpenMP's threads sleep while they have nothing to do.

As they come they spin, each on a core of its own, until the last of them is done. Beside any other busy process that
costs 10 to 30 times as much as the work itself: the one that is waited for is not running.
"""

import os

SETTINGS = {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}  # the second is Intel's and LLVM's own


def wait_passively() -> None:
    """Set it for this process and those that it starts; call it before torch is imported. A person's own value wins."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
