"""A Ray cluster that is there already, joined by a driver on one of its machines."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ipaddress import ip_address

import ray
from ray._private import services
from ray._raylet import AuthenticationMode, get_authentication_mode  # type: ignore[attr-defined]
from ray.exceptions import RayError

from lsp_ray.errors import ConfigError
from lsp_ray.process import PASSIVE_WAITING
from lsp_ray.runtime.cluster.malloc_arenas import SETTINGS as FEW_ARENAS
from lsp_ray.runtime.cluster.malloc_arenas import limit_arenas
from lsp_ray.runtime.cluster.nodes import FIELD, Node, nodes
from lsp_ray.runtime.cluster.ray_process import saying_nothing

ANSWER_TIMEOUT_S = 5.0


@contextmanager
def joined_cluster(address: str) -> Iterator[Sequence[Node]]:
    """Join it, leave it at the end, and yield its machines, the driver's first.

    Where this process is a driver of Ray already, that stays so.

    Args:
        address: See `RuntimeConfig.address`.

    Raises:
        ConfigError: There is none, or anybody who reaches it may run programs on it.
    """
    if ray.is_initialized():
        yield nodes()
        return
    limit_arenas()
    with saying_nothing():
        yield from _joined(address)


def _found(address: str) -> str:
    """HOST:PORT of a cluster that answers; Ray would go on trying for minutes.

    Raises:
        ConfigError: There is none.
    """
    known: str | None = None
    try:
        known = services.canonicalize_bootstrap_address(address)
        host, _, port = (known or "").rpartition(":")
        if known is not None:
            socket.create_connection((host, int(port)), ANSWER_TIMEOUT_S).close()
            return known
        why = "no Ray was started on this machine"
    except (OSError, ValueError) as error:
        why = f"{known}: {error}; HOST:PORT names another one" if known and address == "auto" else str(error)
    raise ConfigError(
        FIELD, f"be a cluster that answers ({why})", address, hint="docs/cluster.md says how one is started"
    )


def _joined(address: str) -> Iterator[Sequence[Node]]:
    found = _found(address)
    try:
        ray.init(
            address=found,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={
                "env_vars": {**PASSIVE_WAITING, **FEW_ARENAS},
                "worker_process_setup_hook": "gc.disable",  # until an actor is there, see `keep_loaded`
            },
        )
    except (RuntimeError, OSError, ValueError, RayError) as error:
        line = " ".join(str(error).split())[:200]
        hint = "" if _asks_for_token() else "RAY_AUTH_MODE=token is wanted for one that asks for a token"
        raise ConfigError(FIELD, f"be a cluster that this machine is part of ({line})", address, hint=hint) from error
    try:
        there = nodes()
        _check_token(there, address)
        yield there
    finally:
        ray.shutdown()


def _check_token(there: Sequence[Node], address: str) -> None:
    is_private = all(ip_address(node.ip).is_loopback for node in there)
    if not _asks_for_token() and not is_private and os.environ.get("RAY_AUTH_MODE") != "disabled":
        bound = "be a cluster that asks for a token, as whoever reaches it may run programs there"
        hint = "RAY_AUTH_MODE=token where Ray and runs are started; RAY_AUTH_MODE=disabled for a run goes without"
        raise ConfigError(FIELD, bound, address, hint=hint)


def _asks_for_token() -> bool:
    """Whether this process's Ray does, and answers those that do."""
    return bool(get_authentication_mode() == AuthenticationMode.TOKEN)
