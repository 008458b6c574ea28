"""A private Ray on this machine: 127.0.0.1, explicit sizes, a token of its own, gone at the end."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private import ray_constants
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]
from ray.exceptions import RayError

from lsp_ray.errors import WorkerLostError
from lsp_ray.process import PASSIVE_WAITING
from lsp_ray.runtime.cluster.leftovers import cleared_session, note_session, own_folder
from lsp_ray.runtime.cluster.malloc_arenas import SETTINGS as FEW_ARENAS
from lsp_ray.runtime.cluster.malloc_arenas import limit_arenas
from lsp_ray.runtime.cluster.ray_process import RayProcess, saying_nothing, starting_apart

END_TIMEOUT_S = 10.0  # a killed process is gone at once, unless the kernel is busy with what it held


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterInfo:
    """Where the dashboard is and what opens it; empty without a dashboard."""

    dashboard_url: str = ""
    token_path: str = ""


@contextmanager
def ray_cluster(
    *, num_actors: int, num_gpus: int = 0, store_bytes: int, dashboard: bool = False
) -> Iterator[ClusterInfo]:
    """Start Ray, stop it on leaving. A Ray that this process has already started is used and left running.

    Args:
        num_actors: Actors at once, each of which asks for one CPU.
        num_gpus: GPUs that compute.
        store_bytes: Size of the object store.
        dashboard: Serve the dashboard on 127.0.0.1.
    """
    if ray.is_initialized():
        yield ClusterInfo()
        return
    before = _environment()
    reaches_others = ray_constants.ENABLE_RAY_CLUSTER
    limit_arenas()  # before Ray's threads come
    with own_folder() as private, cleared_session(private), saying_nothing():
        try:
            _set_environment(private, dashboard=dashboard)
            context = _started(
                address="local",
                num_cpus=num_actors,  # a unit of Ray's, not a core: Ray starts that many processes, torch in each
                num_gpus=num_gpus,
                object_store_memory=store_bytes,
                include_dashboard=dashboard,
                # Ray writes to disk what no process has mapped yet once a store is full by four fifths, as ours are; a
                # copy that comes back from there is no slot, as it goes with its process
                _system_config={"automatic_object_spilling_enabled": False},
                dashboard_host="127.0.0.1",
                _node_ip_address="127.0.0.1",
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
            note_session(private, context.address_info["session_dir"])
            url = f"http://{context.dashboard_url}" if dashboard and context.dashboard_url else ""
            yield ClusterInfo(dashboard_url=url, token_path=os.environ["RAY_AUTH_TOKEN_PATH"] if url else "")
        finally:
            _end_ray()
            ray_constants.ENABLE_RAY_CLUSTER = reaches_others
            _restore_environment(before)


def _started(**options: Any) -> Any:
    """Return ray.init's answer; its many kinds of failure become one line."""
    # Ray answers "127.0.0.1" by looking for an address that others can reach, and listens on all interfaces; with this
    # setting of its own (from the environment, but read when it is imported) every port is on the loopback interface
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        with starting_apart():
            return ray.init(**options)
    except (RuntimeError, OSError, ValueError, RayError) as error:
        raise WorkerLostError(f"Ray did not start: {str(error).splitlines()[0]}") from error


def _end_ray() -> None:
    """Stop Ray; its raylet is killed, see `RayProcess`, and what that has started would outlive it a while."""
    started: list[psutil.Process] = []
    for pid in RayProcess.started:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            started += [process, *process.children(recursive=True)]
    ray.shutdown()
    for process in started:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(started, timeout=END_TIMEOUT_S)


def environment_of_ray(token_path: Path, *, dashboard: bool) -> dict[str, str]:
    """Return what Ray, its workers' OpenMP and C library read from the environment when they start."""
    # the dashboard's list of tasks: Ray's 100,000 take hundreds of MB, and nobody else reads it
    events = {"max_num_task_in_gcs": "1000"} if dashboard else {"report_interval_ms": "0"}
    return {
        **PASSIVE_WAITING,
        **FEW_ARENAS,
        "RAY_AUTH_TOKEN_PATH": str(token_path),  # Ray asks for a token by default; this one is this cluster's alone
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # the name is history: it keeps Ray's processes on the loopback
        "RAY_worker_niceness": "0",  # Ray's default of 15 starves the actors beside other programs
        "RAY_preallocate_plasma_memory": "1",  # no page faults in the first steps
        "RAY_preload_python_modules": "torch",  # workers have it imported before an actor asks for one
        # what Ray's runtime_env sets, for which another process would start: until an actor is there, see `keep_loaded`
        ray_constants.WORKER_PROCESS_SETUP_HOOK_ENV_VAR: "gc.disable",
        **{f"RAY_task_events_{name}": value for name, value in events.items()},
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Ray's coming default; silences its warning
    }


def _environment() -> dict[str, str | None]:
    either = {**environment_of_ray(Path(), dashboard=False), **environment_of_ray(Path(), dashboard=True)}
    names = (*either, "RAY_AUTH_MODE")  # Ray sets that one itself
    return {name: os.environ.get(name) for name in names}


def _set_environment(private: Path, *, dashboard: bool) -> None:
    """Set what is wanted; a person's own value of a variable wins."""
    token_path = private / "token"
    token_path.touch(mode=0o600)
    token_path.write_text(secrets.token_hex(32), encoding="utf-8")
    for name, value in environment_of_ray(token_path, dashboard=dashboard).items():
        os.environ.setdefault(name, value)
    AuthenticationTokenLoader.instance().reset_cache()  # it would keep the token of an earlier cluster


def _restore_environment(before: dict[str, str | None]) -> None:
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    AuthenticationTokenLoader.instance().reset_cache()
