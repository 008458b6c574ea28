"""Runs on two machines, each a raylet at an address of its own: the bits of one, whoever is lost."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import psutil
import pytest
import yaml

from lsp_ray.runtime.checkpoints.checkpoint import checkpoints
from lsp_ray.runtime.prepare.job import Job, resumed
from lsp_ray.trace_file import read_trace
from tests.machines import Machines, machines
from tests.tiny_jobs import assert_same_bits, run_on_threads, saved_weights, tiny_config, tiny_job

TIMEOUT_S = 280.0
pytestmark = pytest.mark.timeout(900)  # each starts a dozen processes, which a busy machine takes minutes for
REFITS = {"check_every": 6, "max_bias": 0.0, "calibration_batches": 2, "delta": "apart"}


@pytest.fixture(scope="module")
def two() -> Iterator[tuple[Machines, list[psutil.Process]]]:
    with machines(2) as started:
        yield started


class Run:
    """A run on the command line; use as a context, which ends it if nothing else has.

    Args:
        folder: With model and data, see `tiny_config`.
        cluster: Where it computes.
        module: That is run.
    """

    def __init__(self, folder: Path, cluster: Machines, module: str = "lsp_ray.run", **changes: Any) -> None:
        self.out = folder / "out"
        runtime = {"num_gpus": 2, "address": cluster.address, **changes.pop("runtime", {})}
        given = asdict(tiny_config(folder, runtime=runtime, **changes))
        options = folder / "options.yaml"
        options.write_text(yaml.safe_dump(_without_nulls(given)))
        self._log = folder / "log.txt"
        with self._log.open("wb") as log:
            command = [sys.executable, "-m", module, "--config", str(options)]
            self._process = subprocess.Popen(command, env=cluster.environment, stdout=log, stderr=subprocess.STDOUT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def wait_for(self, num_steps: int) -> None:
        """Until so many steps are closed."""
        deadline_s = time.monotonic() + TIMEOUT_S
        while len(self.steps()) < num_steps:
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline_s, self._log.read_text()
            time.sleep(0.02)

    def wait_for_checkpoint(self, step: int) -> None:
        """Until the one of this step is whole."""
        deadline_s = time.monotonic() + TIMEOUT_S
        while step not in checkpoints(self.out):
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline_s, self._log.read_text()
            time.sleep(0.02)

    def lose(self, losses: dict[int, Callable[[], list[psutil.Process]]]) -> str:
        """Kill who is named once so many steps are closed; what was said up to the end."""
        for num_steps, lost in losses.items():
            self.wait_for(num_steps)
            for process in lost():
                os.kill(process.pid, signal.SIGKILL)
        return self.end()

    def steps(self) -> list[dict[str, Any]]:
        """The steps that are closed."""
        path = self.out / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def end(self, code: int = 0) -> str:
        """Wait for its end, which is to be with this code; what it has said."""
        assert self._process.wait(TIMEOUT_S) == code, self._log.read_text()
        return self._log.read_text()


def _without_nulls(options: dict[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in options.items() if value is not None}
    return {name: _without_nulls(value) if isinstance(value, dict) else value for name, value in given.items()}


def alone(folder: Path, **changes: Any) -> Job:
    """The same run on threads, in the folder's `alone`."""
    job = tiny_job(folder, **changes)
    run_on_threads(job, folder / "alone")
    return job


def files_of_weights(raylet: psutil.Process) -> list[int]:
    """The shared files of frozen weights that each GPU's actor on a machine has open, by number."""
    actors = [child for child in raylet.children(recursive=True) if "ray::GpuActor" in " ".join(child.cmdline())]
    files = [list(Path(f"/proc/{actor.pid}/fd").iterdir()) for actor in actors]
    shared = [{file.stat().st_ino for file in own if "lsp_ray-weights" in str(file.readlink())} for own in files]
    return [number for own in shared for number in own]


def actor_of(raylet: psutil.Process, kind: str) -> psutil.Process:
    """A live actor of this class on a machine."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline_s:
        for child in raylet.children(recursive=True):
            try:
                if child.status() != psutil.STATUS_ZOMBIE and f"ray::{kind}" in " ".join(child.cmdline()):
                    return child
            except psutil.NoSuchProcess:
                continue
        time.sleep(0.02)
    raise AssertionError(f"no {kind}")


@pytest.mark.parametrize(
    ("shard_nodes", "changes"),
    [
        ("driver", {"num_replicas": 3, "lsp": REFITS}),
        # two actors a machine, with one copy of the weights, whose parts are added up there; shards on both
        (
            "all",
            {
                "num_replicas": 4,
                "bf16": False,
                "lsp": {"delta": "apart", "check_every": 0},
                "runtime": {"num_gpus": 4, "payload_dtype": "float32", "weights": "host"},
            },
        ),
    ],
)
def test_two_machines_train_to_the_bits_of_one(
    tmp_path: Path, two: tuple[Machines, list[psutil.Process]], shard_nodes: str, changes: dict[str, Any]
) -> None:
    runtime = {"shard_nodes": shard_nodes, "network_gbps": 0.01, **changes.pop("runtime", {})}
    changes |= {"max_steps": 10, "max_grad_norm": 1.8}
    job = alone(tmp_path, **changes, runtime={"payload_dtype": runtime.get("payload_dtype", "bfloat16")})
    with Run(tmp_path, two[0], **changes, runtime=runtime) as run:
        run.wait_for(1)
        shared = [files_of_weights(raylet) for raylet in two[1]]
        said = run.end()
    # of each actor the same file of its machine's
    expected = [] if shard_nodes == "driver" else [1, 1]
    assert [len(set(files)) for files in shared if files] == expected
    assert [len(files) for files in shared if files] == [2 * one for one in expected]
    assert_same_bits(saved_weights(job, run.out), saved_weights(job, tmp_path / "alone"))
    assert "cluster: 2 machine(s)" in said
    assert yaml.safe_load((run.out / "config.yaml").read_text())["runtime"]["num_gpus"] == runtime.get("num_gpus", 2)
    steps = run.steps()
    assert len(steps) == 10
    assert any(step["num_refitted"] for step in steps) == (shard_nodes == "driver")
    assert all(step["gpu_busy_s"] >= 0.0 for step in steps)
    rows = read_trace(run.out / "internals" / "trace.json").rows
    assert {"GPU 0", "GPU 1"} <= set(rows)
    assert sum(row.startswith("down-link 0") for row in rows) == (2 if shard_nodes == "all" else 1)
    assert sum(row.startswith("CPU shard") for row in rows) == (2 if shard_nodes == "all" else 1)
    assert not list(run.out.glob("lsp_ray-*"))
    assert not list(run.out.glob(".seen-*"))


def test_whoever_is_lost_no_step_is_and_without_a_place_for_a_gpu_the_others_go_on(
    tmp_path: Path, two: tuple[Machines, list[psutil.Process]]
) -> None:
    cluster, raylets = two
    changes: dict[str, Any] = {"num_replicas": 2, "max_steps": 120, "save_steps": 40}
    job = alone(tmp_path, **changes)
    losses: dict[int, Callable[[], list[psutil.Process]]] = {  # after so many steps
        3: lambda: [actor_of(raylets[1], "InPlaceOfGpu")],
        8: lambda: [actor_of(raylets[0], "NodeKeeper")],
        13: lambda: [actor_of(raylets[0], "ShardActor")],
        42: lambda: [raylets[1], *raylets[1].children(recursive=True)],  # the machine, with all that ran on it
    }
    with Run(tmp_path, cluster, "tests.gpu_places", **changes) as run:
        said = run.lose(losses)
    raylets[1] = cluster.start()
    assert "(raylet)" not in said, said  # Ray's own paragraphs on it
    assert said.count("no step is lost") == 2, said
    assert said.count("nothing is lost") == 1, said
    assert said.count("starting again") == 1, said
    assert "no machine is left that has a GPU for gpu-1" in said, said
    assert "going on from" in said, said
    places = re.findall(r"^(gpu[^@ ]*)\S* runs on the 8 cores of NUMA node (\d)$", said, re.MULTILINE)
    assert places == [("gpu-0", "0"), ("gpu-1", "1"), ("gpu", "0")]
    assert {step["step"] for step in run.steps()} == set(range(1, 121))
    assert_same_bits(saved_weights(job, run.out), saved_weights(job, tmp_path / "alone"))


def test_where_all_machines_have_shards_one_that_is_lost_costs_the_steps_since_the_last_checkpoint(
    tmp_path: Path, two: tuple[Machines, list[psutil.Process]]
) -> None:
    cluster, raylets = two
    changes: dict[str, Any] = {"num_replicas": 2, "max_steps": 120, "save_steps": 20}
    job = alone(tmp_path, **changes)
    losses: dict[int, Callable[[], list[psutil.Process]]] = {  # after so many steps
        3: lambda: [actor_of(raylets[1], "ShardActor")],
        8: lambda: [actor_of(raylets[1], "GpuActor")],
        25: lambda: [actor_of(raylets[1], "NodeKeeper")],
        62: lambda: [raylets[1], *raylets[1].children(recursive=True)],
    }
    with Run(tmp_path, cluster, **changes, runtime={"shard_nodes": "all"}) as run:
        said = run.lose(losses)
    raylets[1] = cluster.start()
    assert said.count("nothing is lost") == 1, said
    assert said.count("no step is lost") == 1, said
    assert said.count("starting again") == 2, said
    assert {step["step"] for step in run.steps()} == set(range(1, 121))
    assert_same_bits(saved_weights(job, run.out), saved_weights(job, tmp_path / "alone"))


def test_a_machine_that_freezes_is_done_without_and_where_the_first_one_ends_the_run_does(
    tmp_path: Path, two: tuple[Machines, list[psutil.Process]]
) -> None:
    """The last one: it leaves no cluster."""
    cluster, raylets = two
    changes: dict[str, Any] = {"num_replicas": 2, "max_steps": 120, "save_steps": 10}
    job = alone(tmp_path, **changes)
    with Run(tmp_path, cluster, **changes) as run:
        run.wait_for(5)
        for process in (raylets[1], *raylets[1].children(recursive=True)):
            process.suspend()
        run.wait_for_checkpoint(20)
        for process in (*raylets[0].children(recursive=True), raylets[0]):  # its workers outlive it by a second
            process.kill()
        said = run.end(1)
    last = max(checkpoints(run.out).items())[1]
    assert re.search(r"gpu-1\S* is replaced by one on \S+, as \S+ does not answer, .* no step is lost", said), said
    assert said.count("no step is lost") == 1, said
    assert "starting again" not in said, said
    assert "Traceback" not in said, said
    ours = [line for line in said.splitlines() if not re.match(r"\[\d{4}-", line)]  # threads of Ray's may say more
    assert ours[-1].startswith(
        f"failed: Ray has ended on this machine, and what the run held there with it; the last checkpoint is {last}; "
    )
    run_on_threads(resumed(job, last), run.out)
    assert_same_bits(saved_weights(job, run.out), saved_weights(job, tmp_path / "alone"))
