"""Signals to a run in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.tiny import write_tiny_jsonl, write_tiny_model

DEADLINE_S = 90.0


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_model(folder / "model", "llama")
    write_tiny_jsonl(folder / "data.jsonl", "prompt_completion", 100)
    sizes = ["--lsp.subspace_dim", "16", "--lsp.nnz_per_row", "2", "--max_steps", "100000"]
    model, data = str(folder / "model"), str(folder / "data.jsonl")
    return ["--model_name_or_path", model, "--dataset", data, "--runtime.num_shards", "1", *sizes]


@contextmanager
def running(*options: str) -> Iterator[subprocess.Popen[str]]:
    """A run in a process group of its own, as a terminal would start it."""
    command = [sys.executable, "-P", "-m", "lsp_ray.run", *options]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdout, process.stderr):
            assert pipe is not None
            pipe.close()


def wait_until(happened: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not happened():
        assert time.monotonic() < deadline_s, f"within {DEADLINE_S:.0f} s: {what}"
        time.sleep(0.002)


def has_steps(folder: Path) -> Callable[[], bool]:
    metrics = folder / "metrics.jsonl"
    return lambda: metrics.exists() and metrics.stat().st_size > 0


def loads(process: subprocess.Popen[str]) -> bool:
    """Whether the program has begun to import what it needs: PyYAML's library is among the first that it maps."""
    return "_yaml" in Path(f"/proc/{process.pid}/maps").read_text()


@pytest.mark.parametrize("delay_s", [0.0, 0.05, 0.15, 0.4])
def test_ctrl_c_while_the_program_still_loads_shows_no_traceback(tmp_path: Path, delay_s: float) -> None:
    with running("--output_dir", str(tmp_path / "out")) as process:
        wait_until(lambda: loads(process), "the program starts")
        time.sleep(delay_s)  # any moment will do
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=DEADLINE_S)
    assert process.returncode in (-signal.SIGINT, 130)
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_ctrl_c_in_training_saves_and_a_second_one_is_not_needed(options: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with running(*options, "--output_dir", str(out)) as process:
        wait_until(has_steps(out), "the first step")
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to Ray's processes too
        _, said = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130
    assert "stopped after " in said
    assert "to go on: python -m lsp_ray.run --config " in said
    assert (next(out.glob("checkpoint-*")) / "lsp_state" / "state.json").exists()


def test_a_driver_that_is_killed_leaves_no_actor_and_no_shared_memory(options: list[str], tmp_path: Path) -> None:
    before = shared_memory()
    with running(*options, "--output_dir", str(tmp_path / "out")) as process:
        wait_until(has_steps(tmp_path / "out"), "the first step")
        children = psutil.Process(process.pid).children(recursive=True)
        names = [" ".join(child.cmdline()) for child in children]
        assert any("ray::GpuActor" in name for name in names)
        process.kill()
        process.wait()
        ours = [child for child, name in zip(children, names, strict=True) if "Agent" not in name]
        _, alive = psutil.wait_procs(ours, timeout=30)
        assert not alive  # two agents of Ray's, which hold nothing, take a minute more
        wait_until(lambda: shared_memory() <= before, "shared memory is given back")


def shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}
