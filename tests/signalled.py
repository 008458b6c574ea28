"""Runs in processes of their own, and signals to them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from lsp_ray.runtime.checkpoints.checkpoint import checkpoints
from lsp_ray.runtime.checkpoints.saved_run import read_saved_run
from tests.tiny import write_tiny_jsonl, write_tiny_model

DEADLINE_S = 180.0

To = Literal["driver", "group", "tree"]
_TARGETS: tuple[To, ...] = ("driver", "group", "tree")
WAYS = [(to, number) for to in _TARGETS for number in (signal.SIGTERM, signal.SIGHUP)]
"""Six ways to stop a run: whom the signal goes to, and which it is."""


def wait_until(happened: Callable[[], bool], what: str, timeout_s: float = DEADLINE_S) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline_s, f"within {timeout_s:.0f} s: {what}"
        time.sleep(0.002)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run in a process group of its own, as a terminal would start it; what it prints goes into a file."""

    process: subprocess.Popen[bytes]
    out: Path
    log: Path

    @classmethod
    def start(cls, folder: Path, *options: str, sigint: str = "default", terminal: int | None = None) -> Run:
        """In a new folder, or in that of a run that goes on.

        With a terminal, a descriptor, it is in a session that this controls, and prints there alone.
        """
        # whatever this suite was started with: where signals are ignored, children have them ignored too
        signals = ["--default-signal=HUP", f"--{sigint}-signal=INT"]
        command = ["env", *signals, sys.executable, "-P", "-m", "lsp_ray.run", *options]
        if terminal is not None:
            command = ["setsid", "--ctty", *command]
        folder.mkdir(exist_ok=True)
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [*command, "--output_dir", str(folder / "out")],
                stdin=terminal,
                stdout=log if terminal is None else terminal,
                stderr=subprocess.STDOUT,
                start_new_session=terminal is None,
            )
        return cls(process=process, out=folder / "out", log=folder / "log")

    def said(self) -> str:
        return self.log.read_text()

    def num_lines(self) -> int:
        """Of metrics: steps made."""
        metrics = self.out / "metrics.jsonl"
        return metrics.read_text().count("\n") if metrics.exists() else 0

    def wait_for_step(self) -> None:
        start = self.num_lines()
        wait_until(lambda: self.num_lines() > start or self.process.poll() is not None, "a step")
        assert self.process.poll() is None, self.said()

    def send(self, number: signal.Signals, to: To = "group") -> None:
        """To the group as a terminal does, unless to the driver alone or to all, see `send_to_all`."""
        match to:
            case "driver":
                self.process.send_signal(number)
            case "group":
                os.killpg(self.process.pid, number)
            case "tree":
                self.send_to_all(number)

    def send_to_all(self, number: signal.Signals) -> None:
        """As systemd's KillMode=control-group does: to Ray's processes too, and these first."""
        driver = psutil.Process(self.process.pid)
        for process in (*driver.children(recursive=True), driver):
            with suppress(psutil.NoSuchProcess):  # an idle process of Ray's may just have ended
                process.send_signal(number)

    def ends(self, timeout_s: float = DEADLINE_S) -> int:
        return self.process.wait(timeout_s)

    def end_at_once(self) -> None:
        self.process.kill()
        self.process.wait()


def tiny_options(folder: Path, *more: str) -> list[str]:
    """Write a tiny model and data into a new folder; return the options of a run on them."""
    write_tiny_model(folder / "model", "llama")
    write_tiny_jsonl(folder / "data.jsonl", "prompt_completion", 400)
    options = ["--model_name_or_path", str(folder / "model"), "--dataset", str(folder / "data.jsonl")]
    options += ["--runtime.num_shards", "1", "--lsp.subspace_dim", "16", "--lsp.nnz_per_row", "2"]
    options += ["--bf16", "false"]  # else it is measured, and may come out otherwise in a reference
    return [*options, "--max_eval_samples", "8", *more]


def assert_saved(run: Run) -> None:
    """All that was done is in the run's newest checkpoint, and that is whole: the run can go on."""
    done, folder = list(checkpoints(run.out).items())[-1]
    assert read_saved_run(folder).step == done == run.num_lines()


def assert_same_end(out: Path, reference: Path) -> None:
    """Two runs ended with the same weights, byte for byte, after the same losses."""
    assert (out / "model.safetensors").read_bytes() == (reference / "model.safetensors").read_bytes()
    ours, theirs = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (out, reference)
    )
    assert [(line["step"], line["loss"]) for line in ours] == [(line["step"], line["loss"]) for line in theirs]
