"""This machine's raylet: whether it is there. Without it no call of Ray's comes to an end by itself."""

from __future__ import annotations

import socket

import ray
from ray._private import worker

from lsp_ray.errors import RayLostError


def check_raylet() -> None:
    """Nothing to do where this process has no Ray.

    Raises:
        RayLostError: It has ended, and so have the actors that it started and their shared memory.
    """
    if not ray.is_initialized():
        return
    node = worker.global_worker.node
    assert node is not None, "Ray is initialized"
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(node.raylet_socket_name)
        except (ConnectionRefusedError, FileNotFoundError) as error:
            raise RayLostError("Ray has ended on this machine, and what the run held there with it") from error
