"""Ray with its dashboard on, in an interpreter of its own: the suite's cluster has none."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from lsp_ray.runtime.cluster.malloc_arenas import SETTINGS
from lsp_ray.runtime.cluster.private_cluster import environment_of_ray

DASHBOARD_PORT = 8265

LOOK = """
import json, socket, subprocess, time, urllib.error, urllib.request
from pathlib import Path
import psutil, ray
from lsp_ray.runtime.cluster.private_cluster import ray_cluster

def answers(port):
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0

def status(url):
    try:
        return urllib.request.urlopen(url, timeout=10).status
    except urllib.error.HTTPError as error:
        return error.code

with ray_cluster(num_actors=1, store_bytes=96 << 20, dashboard=True) as cluster:
    metrics_port, deadline_s = ray.nodes()[0]["MetricsExportPort"], time.monotonic() + 60
    while not answers(metrics_port) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    ours = {psutil.Process().pid, *(child.pid for child in psutil.Process().children(recursive=True))}
    listening = [
        connection.laddr
        for connection in psutil.net_connections(kind="tcp")
        if connection.pid in ours and connection.status == psutil.CONN_LISTEN
    ]
    # parts of the dashboard write their title over their environment, where nothing of it can be read any more
    children = psutil.Process().children(recursive=True)
    environments = [environment for environment in (child.environ() for child in children) if environment]
    policies = {environment.get("OMP_WAIT_POLICY") for environment in environments}
    token = Path(cluster.token_path)
    users = subprocess.Popen(["sleep", "60"])
    found = {
        "url": cluster.dashboard_url,
        "addresses": sorted({address.ip for address in listening}),
        "ports": [address.port for address in listening],
        "metrics_port": metrics_port,
        "wait_policies": sorted(map(str, policies)),
        "arenas": sorted({str(environment.get("MALLOC_ARENA_MAX")) for environment in environments}),
        "token_mode": token.stat().st_mode & 0o777,
        "folder_mode": token.parent.stat().st_mode & 0o777,
        "status_without_token": status(cluster.dashboard_url + "/api/version"),
        "token": str(token),
        "spills": ray._private.worker._global_node._config.get("automatic_object_spilling_enabled"),
    }
print(json.dumps({**found, "users_process_lives": users.poll() is None}))
users.kill()
"""


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    """What a cluster with a dashboard looks like from outside, where the dashboard's usual port is taken."""
    with closing(socket.socket()) as taken:
        with suppress(OSError):  # taken by somebody else is taken as well
            taken.bind(("127.0.0.1", DASHBOARD_PORT))
            taken.listen()
        ended = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True, timeout=280, check=False)
    assert ended.returncode == 0, ended.stderr
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def test_dashboard_and_metrics_are_on_the_loopback_interface(seen: dict[str, Any]) -> None:
    assert set(seen["addresses"]) <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    assert int(seen["url"].rpartition(":")[2]) in seen["ports"]
    assert seen["metrics_port"] in seen["ports"]


def test_a_taken_port_is_no_obstacle_to_the_dashboard(seen: dict[str, Any]) -> None:
    assert seen["url"].startswith("http://127.0.0.1:")
    assert not seen["url"].endswith(f":{DASHBOARD_PORT}")


def test_the_dashboard_asks_for_the_token_which_is_private(seen: dict[str, Any]) -> None:
    assert seen["status_without_token"] == 401
    assert (seen["token_mode"], seen["folder_mode"]) == (0o600, 0o700)


def test_what_ray_starts_waits_passively_and_has_few_arenas(seen: dict[str, Any]) -> None:
    assert seen["wait_policies"] == ["passive"]
    assert seen["arenas"] == ["2"]


ALLOCATE = """
import ctypes, sys, threading
from lsp_ray.runtime.cluster.malloc_arenas import limit_arenas

libc = ctypes.CDLL(None)
libc.malloc.restype = libc.fopen.restype = ctypes.c_void_p
libc.malloc_info.argtypes, libc.fclose.argtypes = [ctypes.c_int, ctypes.c_void_p], [ctypes.c_void_p]
if sys.argv[1] == "limited":
    limit_arenas()
together = threading.Barrier(8)

def allocate():
    together.wait()  # one that ends gives its arena to the next
    libc.malloc(100)
    together.wait()

threads = [threading.Thread(target=allocate) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
file = libc.fopen(sys.argv[2].encode(), b"w")
libc.malloc_info(0, file)
libc.fclose(file)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="arenas are glibc's")
@pytest.mark.parametrize("kind", ["limited", "free"])
def test_the_driver_gets_no_more_than_two_arenas_however_many_threads_allocate(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "malloc.xml"
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    subprocess.run([sys.executable, "-c", ALLOCATE, kind, str(out)], env=environment, timeout=120, check=True)
    num_arenas = out.read_text().count("<heap nr=")
    assert num_arenas <= 2 if kind == "limited" else num_arenas > 2


def test_ray_keeps_a_list_of_past_tasks_for_the_dashboard_alone(tmp_path: Path) -> None:
    with_list, without = (environment_of_ray(tmp_path / "token", dashboard=shows) for shows in (True, False))
    assert with_list["RAY_task_events_max_num_task_in_gcs"] == "1000"
    assert "RAY_task_events_report_interval_ms" not in with_list
    assert without["RAY_task_events_report_interval_ms"] == "0"


def test_what_the_program_has_started_besides_lives_on_and_nothing_is_spilled(seen: dict[str, Any]) -> None:
    assert seen["users_process_lives"]
    assert seen["spills"] is False
