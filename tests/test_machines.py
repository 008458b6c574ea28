"""Runs on two machines, each a raylet at an address of its own: the bits of one, whoever is lost."""

from __future__ import annotations

import json
import os
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

from lsp_ray.runtime.prepare.job import Job
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
    """

    def __init__(self, folder: Path, cluster: Machines, **changes: Any) -> None:
        self.out = folder / "out"
        runtime = {"num_gpus": 2, "address": cluster.address, **changes.pop("runtime", {})}
        given = asdict(tiny_config(folder, runtime=runtime, **changes))
        options = folder / "options.yaml"
        options.write_text(yaml.safe_dump(_without_nulls(given)))
        self._log = folder / "log.txt"
        with self._log.open("wb") as log:
            command = [sys.executable, "-m", "lsp_ray.run", "--config", str(options)]
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

    def steps(self) -> list[dict[str, Any]]:
        """The steps that are closed."""
        path = self.out / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def end(self) -> str:
        """Wait for its end; what it has said."""
        assert self._process.wait(TIMEOUT_S) == 0, self._log.read_text()
        return self._log.read_text()


def _without_nulls(options: dict[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in options.items() if value is not None}
    return {name: _without_nulls(value) if isinstance(value, dict) else value for name, value in given.items()}


def alone(folder: Path, **changes: Any) -> Job:
    """The same run on threads, in the folder's `alone`."""
    job = tiny_job(folder, **changes)
    run_on_threads(job, folder / "alone")
    return job


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


def test_two_machines_train_to_the_bits_of_one(tmp_path: Path, two: tuple[Machines, list[psutil.Process]]) -> None:
    changes: dict[str, Any] = {"num_replicas": 3, "max_steps": 10, "max_grad_norm": 1.8, "lsp": REFITS}
    job = alone(tmp_path, **changes)
    with Run(tmp_path, two[0], **changes, runtime={"network_gbps": 0.01}) as run:
        said = run.end()
    assert_same_bits(saved_weights(job, run.out), saved_weights(job, tmp_path / "alone"))
    assert "cluster: 2 machine(s)" in said
    steps = run.steps()
    assert len(steps) == 10
    assert any(step["num_refitted"] for step in steps)
    assert all(step["gpu_busy_s"] >= 0.0 for step in steps)
    rows = read_trace(run.out / "internals" / "trace.json").rows
    assert {"GPU 0", "GPU 1", "down-link 0", "down-link 1"} <= set(rows)
    assert not list(run.out.glob("lsp_ray-*"))
    assert not list(run.out.glob(".seen-*"))


def test_whoever_is_lost_no_step_is(tmp_path: Path, two: tuple[Machines, list[psutil.Process]]) -> None:
    cluster, raylets = two
    changes: dict[str, Any] = {"num_replicas": 2, "max_steps": 60, "save_steps": 0}
    job = alone(tmp_path, **changes)
    losses: list[Callable[[], list[psutil.Process]]] = [
        lambda: [actor_of(raylets[1], "GpuActor")],
        lambda: [actor_of(raylets[0], "GpuRelay")],
        lambda: [actor_of(raylets[0], "ShardActor")],
        lambda: [raylets[1], *raylets[1].children(recursive=True)],  # the machine, with all that ran on it
    ]
    with Run(tmp_path, cluster, **changes) as run:
        for number, lost in enumerate(losses):
            run.wait_for(3 + 10 * number)
            for process in lost():
                os.kill(process.pid, signal.SIGKILL)
        said = run.end()
    raylets[1] = cluster.start()
    assert "starting again" not in said, said
    assert "(raylet)" not in said, said  # Ray's own paragraphs on it
    assert said.count("no step is lost") == 3
    assert [step["step"] for step in run.steps()] == list(range(1, 61))
    assert_same_bits(saved_weights(job, run.out), saved_weights(job, tmp_path / "alone"))


def test_a_machine_that_freezes_is_done_without(tmp_path: Path, two: tuple[Machines, list[psutil.Process]]) -> None:
    cluster, raylets = two
    changes: dict[str, Any] = {"num_replicas": 2, "max_steps": 30, "save_steps": 0}
    job = alone(tmp_path, **changes)
    with Run(tmp_path, cluster, **changes) as run:
        run.wait_for(5)
        for process in (raylets[1], *raylets[1].children(recursive=True)):
            process.suspend()
        said = run.end()
    assert said.count("no step is lost") == 1, said
    assert_same_bits(saved_weights(job, run.out), saved_weights(job, tmp_path / "alone"))
