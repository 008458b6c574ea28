"""A private Ray on this machine: 127.0.0.1, explicit sizes, a token of its own, gone at the end."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]
from ray.exceptions import RayError

from lsp_ray.errors import WorkerLostError

SPARE_STORE_BYTES = 96 << 20  # the job's data and messages, beside the slots; Ray wants about 80 MB at least


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterInfo:
    """Where the dashboard is and what opens it; empty without a dashboard."""

    dashboard_url: str = ""
    token_path: str = ""


@contextmanager
def ray_cluster(
    *, num_actors: int, num_gpus: int = 0, slot_bytes: int = 0, dashboard: bool = False
) -> Iterator[ClusterInfo]:
    """Start Ray, stop it on leaving. A Ray that this process has already started is used and left running.

    Args:
        num_actors: Actors at once, each of which asks for one CPU.
        num_gpus: 1 if a GPU computes.
        slot_bytes: Object store that the slots need.
        dashboard: Serve the dashboard on 127.0.0.1.
    """
    if ray.is_initialized():
        yield ClusterInfo()
        return
    private = Path(tempfile.mkdtemp(prefix="lsp_ray-"))  # mode 0700
    changed = _set_environment(private)
    try:
        context = _started(
            address="local",
            num_cpus=num_actors,  # a unit of Ray's, not a core: Ray starts that many processes at once, torch in each
            num_gpus=num_gpus,
            object_store_memory=slot_bytes + SPARE_STORE_BYTES,
            include_dashboard=dashboard,
            dashboard_host="127.0.0.1",
            _node_ip_address="127.0.0.1",
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        url = f"http://{context.dashboard_url}" if dashboard and context.dashboard_url else ""
        yield ClusterInfo(dashboard_url=url, token_path=os.environ["RAY_AUTH_TOKEN_PATH"] if url else "")
    finally:
        ray.shutdown()
        _restore_environment(changed)
        shutil.rmtree(private, ignore_errors=True)


def _started(**options: Any) -> Any:
    """Return ray.init's answer; its many kinds of failure become one line."""
    # Ray answers "127.0.0.1" by looking for an address that others can reach, and listens on all interfaces; with this
    # setting of its own (from the environment, but read when it is imported) every port is on the loopback interface
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        return ray.init(**options)
    except (RuntimeError, OSError, ValueError, RayError) as error:
        raise WorkerLostError(f"Ray did not start: {str(error).splitlines()[0]}") from error


def _set_environment(private: Path) -> dict[str, str | None]:
    """Set what Ray reads from the environment when it starts; returns what stood there before.

    A person's own value of a variable wins.
    """
    token_path = private / "token"
    token_path.touch(mode=0o600)
    token_path.write_text(secrets.token_hex(32))
    wanted = {
        "RAY_AUTH_TOKEN_PATH": str(token_path),  # Ray asks for a token by default; this one is this cluster's alone
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # the name is history: it keeps Ray's processes on the loopback
        "RAY_worker_niceness": "0",  # Ray's default of 15 starves the actors beside other programs
        "RAY_preallocate_plasma_memory": "1",  # no page faults in the first steps
        "RAY_preload_python_modules": "torch",  # forked workers start in 0.2 s, not 1.7 s
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Ray's coming default; silences its warning
    }
    before = {name: os.environ.get(name) for name in (*wanted, "RAY_AUTH_MODE")}  # Ray sets that one itself
    for name, value in wanted.items():
        os.environ.setdefault(name, value)
    AuthenticationTokenLoader.instance().reset_cache()  # it would keep the token of an earlier cluster
    return before


def _restore_environment(before: dict[str, str | None]) -> None:
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
