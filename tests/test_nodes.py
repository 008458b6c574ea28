"""What a run asks of a cluster's machines, and how their actors connect; `test_machines` has real ones."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st

from lsp_ray.config import RunConfig, RuntimeConfig
from lsp_ray.errors import ConfigError, WorkerLostError
from lsp_ray.runtime.actors.places import place_for, spare_gpus
from lsp_ray.runtime.cluster import joined_cluster, nodes, own_raylet
from lsp_ray.runtime.cluster.joined_cluster import _check_token, _found
from lsp_ray.runtime.cluster.nodes import Node, answering, check_nodes, check_stores
from lsp_ray.runtime.cluster.own_raylet import check_raylet, listens, when_raylet_ends
from lsp_ray.runtime.prepare.job import laid_out
from lsp_ray.runtime.prepare.machines import Machine, place
from lsp_ray.runtime.transport.lanes import connect
from lsp_ray.runtime.transport.messages import Ear, tell
from lsp_ray.runtime.transport.network import Clock, Door, dial
from tests.tiny_jobs import tiny_job

OWN = Node(id="1", name="a", ip="192.168.0.10", num_gpus=1, store_bytes=1000, is_own=True)
OTHER = Node(id="2", name="b", ip="192.168.0.11", num_gpus=2, store_bytes=0, is_own=False)
VERSIONS = {"Python": "3.11.7", "torch": "2.13.0"}


@pytest.mark.parametrize(
    ("runtime", "message"),
    [
        ({"address": "ray://head:10001"}, r"^runtime.address must be HOST:PORT or auto; Ray's client does not do"),
        ({"address": "head"}, r"^runtime.address must be HOST:PORT or auto, got 'head'$"),
        ({"network_gbps": 1.0}, r"^runtime.network_gbps must come with runtime.address"),
        ({"network_gbps": 0.0, "address": "auto"}, r"^runtime.network_gbps must be above 0, got 0.0$"),
        ({"dashboard": True, "address": "auto"}, r"^runtime.dashboard must be left out with runtime.address"),
    ],
)
def test_what_cannot_be_joined_is_refused_before_anything_starts(runtime: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RuntimeConfig(**runtime)


def test_methods_of_one_gpu_have_no_use_for_a_cluster() -> None:
    with pytest.raises(ConfigError, match=r"^runtime.address must be left out with method lora, which trains on one"):
        RunConfig(method="lora", runtime=RuntimeConfig(address="auto"))


def found(**changes: Any) -> nodes._Found:
    same = nodes._Found(cores=4, has_bf16=True, versions=VERSIONS, sizes=[{"config.json": 3}, {}])
    return replace(same, **changes)


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (
            found(versions={**VERSIONS, "torch": "2.12.0"}),
            r"^runtime.address must be .* have one version of torch \(2.13.0 on a\), got '2.12.0 on b'$",
        ),
        (found(sizes=[None, {}]), r"^model_name_or_path must be the same on all nodes; b has nothing in it, got"),
        (found(sizes=[{"config.json": 4}, {}]), r"b has another model in it, got"),
        (
            found(sizes=[{"config.json": 3}, None]),
            r"^output_dir must be in a folder that all nodes share; b does not see it, got .*; NFS is enough$",
        ),
    ],
)
def test_a_machine_that_would_fail_later_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, theirs: nodes._Found, message: str
) -> None:
    monkeypatch.setattr(nodes, "_look_at", lambda *_: [found(), theirs])
    with pytest.raises(ConfigError, match=message):
        check_nodes([OWN, OTHER], tmp_path, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_drivers_machine_is_there_however_busy() -> None:
    assert answering([OWN]) == [OWN]  # without Ray


def test_a_store_that_is_too_small_is_refused_with_the_size_it_needs() -> None:
    with pytest.raises(ConfigError, match=r"object store on a has 2.00 GB .*--object-store-memory=2000000000 there$"):
        check_stores([OWN, OTHER], [2_000_000_000, 0])


def test_a_cluster_that_asks_nobody_for_a_token_is_joined_where_only_this_machine_reaches_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setattr(joined_cluster, "_asks_for_token", lambda: False)
    with pytest.raises(ConfigError, match=r"^runtime.address must be a cluster that asks for a token"):
        _check_token([OWN, OTHER], "auto")
    _check_token([replace(OWN, ip="127.0.0.2"), replace(OTHER, ip="127.0.0.3")], "auto")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    _check_token([OWN, OTHER], "auto")


@given(sizes=st.lists(st.integers(0, 4), min_size=1, max_size=5), num_gpus=st.integers(1, 12))
def test_gpus_are_placed_in_order_and_never_more_than_there_are(sizes: list[int], num_gpus: int) -> None:
    there = [Machine(name=str(at), num_gpus=size, cores=1, has_bf16=True) for at, size in enumerate(sizes)]
    placed = [there.index(one) for one in place(num_gpus, there, on_gpu=True)]
    assert placed == sorted(placed)
    assert len(placed) == min(num_gpus, sum(sizes))
    assert all(placed.count(at) <= size for at, size in enumerate(sizes))
    shared = [there.index(one) for one in place(num_gpus, there, on_gpu=False)]
    assert len(shared) == num_gpus
    counts = [shared.count(at) for at in range(len(there))]
    assert max(counts) - min(counts) <= 1


def test_a_job_is_laid_out_anew_for_the_machines_that_are_left(tmp_path: Path) -> None:
    job = replace(tiny_job(tmp_path, num_replicas=4, runtime={"num_gpus": 4}), device="cuda")
    there = [Machine(name=name, num_gpus=size, cores=2, has_bf16=True) for name, size in (("a", 1), ("b", 2))]
    left = laid_out(job, there)
    assert left.layout.gpu_of_part == (0, 0, 1, 2)
    assert [left.layout.name_of(gpu) for gpu in range(3)] == ["gpu-0@a", "gpu-1@b", "gpu-2@b"]
    assert left.resolved_config == job.resolved_config
    assert laid_out(job, there[:1]).layout.gpu_of_part == (0, 0, 0, 0)


def test_only_who_knows_the_key_gets_in_and_who_says_nothing_keeps_nobody_out() -> None:
    with Door("127.0.0.1", timeout_s=30.0) as door:
        came: list[Any] = []

        def accept() -> None:
            connection = door.accept()
            came.append(Ear(connection).heard())
            tell(connection, "welcome")

        waiting = threading.Thread(target=accept)
        waiting.start()
        with socket.create_connection(("127.0.0.1", door.address.port)):  # says nothing
            with pytest.raises(WorkerLostError, match=r"does not reach the run at 127\.0\.0\.1:"):
                dial(replace(door.address, key=b"another run's"))
            connection = connect(door.address, "compute")
        assert Ear(connection).heard() == "welcome"
        waiting.join()
    assert came[0][0] == "compute"
    assert "key" not in repr(door.address)


def test_arrays_cross_whole_beside_what_they_come_with() -> None:
    with Door("127.0.0.1", timeout_s=30.0) as door:
        ours = threading.Thread(target=lambda: tell(door.accept(), ("payload", arrays)))
        arrays: list[Any] = [
            np.arange(5_000_000, dtype=np.uint8),
            np.zeros(0, np.uint8),
            np.array([[1.5], [2.5]], np.float32),
        ]
        ours.start()
        what, theirs = Ear(dial(door.address)).heard()
        ours.join()
    assert what == "payload"
    assert all(np.array_equal(one, other) for one, other in zip(arrays, theirs, strict=True))


@given(
    looks=st.lists(st.tuples(st.floats(0, 1e4), st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=20),
    apart_s=st.floats(-1e5, 1e5),
)
def test_another_clock_is_known_to_half_of_the_quickest_answer(
    looks: list[tuple[float, float, float]], apart_s: float
) -> None:
    clock = Clock()
    for asked_s, there_s, back_s in looks:
        clock.look(asked_s, asked_s + there_s - apart_s, asked_s + there_s + back_s)
    quickest = min(there_s + back_s for _, there_s, back_s in looks[-16:])
    assert abs(clock.offset_s - apart_s) <= quickest / 2 + 1e-6


def test_a_raylet_is_there_while_its_socket_is_listened_at_however_busy_it_is(tmp_path: Path) -> None:
    path = str(tmp_path / "raylet")
    assert not listens(path)
    with socket.socket(socket.AF_UNIX) as raylet:
        raylet.bind(path)
        raylet.listen(1)
        assert [listens(path) for _ in range(4)] == [True] * 4  # more than may wait
    assert not listens(path)
    check_raylet()  # this process has none


LISTENS = """
import socket, sys, time
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
print(1, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("is_killed", [True, False])
def test_the_end_of_a_raylet_is_told_at_once_and_nothing_of_one_that_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_killed: bool
) -> None:
    path, told = str(tmp_path / "raylet"), threading.Event()
    monkeypatch.setattr(own_raylet, "_address", lambda: path)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    with subprocess.Popen([sys.executable, "-c", LISTENS, path], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with when_raylet_ends(told.set):
            if is_killed:
                process.kill()
                assert told.wait(30.0)
        process.kill()
    assert told.is_set() == is_killed
    with when_raylet_ends(told.set):  # nobody listens there any more
        pass


def test_a_cluster_that_does_not_answer_is_refused_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    with pytest.raises(ConfigError, match=r"^runtime.address must be a cluster that answers \(.*refused\), got"):
        _found(address)


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        ([OWN, OTHER], "b"),  # where it was
        ([replace(OWN, num_gpus=2)], "a"),  # where one is free
        ([OWN], None),
    ],
)
def test_a_lost_gpu_comes_back_where_one_is_free_or_the_run_is_laid_out_anew(
    tmp_path: Path, there: list[Node], expected: str | None
) -> None:
    job = replace(tiny_job(tmp_path, num_replicas=2, runtime={"num_gpus": 2}), device="cuda")
    machines = [Machine(name=node.name, num_gpus=node.num_gpus, cores=2, has_bf16=True) for node in (OWN, OTHER)]
    job = laid_out(job, machines)
    assert spare_gpus(job, there[0]) == (expected == "a")
    if expected is not None:
        assert place_for(job, 1, [OWN, OTHER], there).name == expected
        return
    with pytest.raises(WorkerLostError, match="no machine is left that has a GPU for gpu-1@b"):
        place_for(job, 1, [OWN, OTHER], there)
    left = [machine for machine in machines if machine.name == "a"]
    assert laid_out(job, left).layout.gpu_of_part == (0, 0)
