"""This machine's raylet: whether it is there. Without it no call of Ray's comes to an end by itself."""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray
from ray._private import worker

from lsp_ray.errors import RayLostError

GONE = "Ray has ended on this machine, and what the run held there with it"


def check_raylet() -> None:
    """Nothing to do where this process has no Ray.

    Raises:
        RayLostError: It has ended, and no actor can be started any more.
    """
    if ray.is_initialized() and not listens(_address()):
        raise RayLostError(GONE)


@contextmanager
def when_raylet_ends(tell: Callable[[], None]) -> Iterator[None]:
    """Within the context `tell` is called, on a thread of its own, as soon as the raylet has ended.

    A tenth of a second later Ray's core may end this process: as the owner of slots it writes to a store that is gone.
    """
    raylet = _opened(_address()) if ray.is_initialized() else None
    if raylet is None:
        yield
        return
    ours, theirs = os.pipe()
    watching = threading.Thread(target=_watch, args=(raylet, ours, tell), name="raylet", daemon=True)
    watching.start()
    try:
        yield
    finally:
        os.close(theirs)
        watching.join()
        for number in (raylet, ours):
            os.close(number)


def _watch(raylet: int, stop: int, tell: Callable[[], None]) -> None:
    waiting = select.poll()
    for number in (raylet, stop):
        waiting.register(number, select.POLLIN | select.POLLHUP)
    if raylet in dict(waiting.poll()):
        tell()


def listens(path: str) -> bool:
    """Whether somebody listens at this Unix socket, who may be too busy to answer."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except BlockingIOError:  # others are to be answered first
            return True
        except OSError:
            return False
        return True


def _address() -> str:
    node = worker.global_worker.node
    assert node is not None, "Ray is initialized"
    path: str = node.raylet_socket_name
    return path


def _opened(path: str) -> int | None:
    """A file that tells when who listens at a Unix socket has ended; None where the system has no such thing."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
            pid, _, _ = struct.unpack("3i", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            return os.pidfd_open(pid)
        except (AttributeError, OSError):  # not Linux, an old one, or another namespace's process
            return None
