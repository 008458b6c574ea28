"""This machine's raylet: whether it is there. Without it no call of Ray's comes to an end by itself."""

from __future__ import annotations

import socket

import ray
from ray._private import worker

from lsp_ray.errors import RayLostError


def check_raylet() -> None:
    """Nothing to do where this process has no Ray.

    Raises:
        RayLostError: It has ended, and no actor can be started any more.
    """
    if not ray.is_initialized():
        return
    node = worker.global_worker.node
    assert node is not None, "Ray is initialized"
    if not listens(node.raylet_socket_name):
        raise RayLostError("Ray has ended on this machine, and what the run held there with it")


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
