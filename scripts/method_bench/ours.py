"""Runs of lsp_ray itself, each a process of its own through the command line that people use."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from pathlib import Path

from lsp_ray.report.run_folder import read_run

_COMMON = {"--bf16": "true", "--save_steps": "0", "--save_minutes": "0"}
_CPU = {
    "--runtime.device": "cpu",
    "--runtime.device_threads": "1",
    "--runtime.num_shards": "1",
    "--runtime.shard_threads": "1",
}


@cache
def gpu_name() -> str:
    """The GPU's name; nothing where torch finds none."""
    import torch

    return str(torch.cuda.get_device_name()) if torch.cuda.is_available() else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A point of the matrix; `task` is a name, `rate_factor` multiplies the method's learning rate."""

    task: str
    method: str
    num_steps: int
    seed: int = 42
    rate_factor: float = 1.0
    policy: str | None = None
    link_gbps: float | None = None
    emulate: str | None = None

    @property
    def name(self) -> str:
        """What tables and plots call it."""
        link = None if self.link_gbps is None else f"{self.link_gbps:g} GB/s"
        emulated = None if self.emulate is None else f"as {self.emulate}"
        return ", ".join(part for part in (self.method, self.policy, link, emulated) if part is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a run was: the time and the training loss of every step, and its scores after the last.

    `eval_losses` were measured before, between and after the steps: each with how many there had been.
    `note` says what a reader of the figures should know.
    """

    step_s: tuple[float, ...]
    losses: tuple[float, ...]
    scores: Mapping[str, float]
    peak_bytes: int | None = None
    eval_losses: tuple[tuple[int, float], ...] = field(default=())
    note: str = ""

    @property
    def eval_curve(self) -> list[tuple[int, float, float]]:
        """Steps, seconds of training and eval loss."""
        ends_s = [0.0, *accumulate(self.step_s)]
        return [(step, ends_s[step], loss) for step, loss in self.eval_losses]


def run(setting: Setting, options: Mapping[str, str]) -> Outcome:
    """Run once with the task's and the method's options; on the GPU if there is one, and then with all cores."""
    asked = {**_COMMON, **({} if gpu_name() else _CPU), **options, "--method": setting.method}
    asked |= {"--seed": str(setting.seed), "--max_steps": str(setting.num_steps)}
    own = {"policy": setting.policy, "link_gbps": setting.link_gbps, "emulate": setting.emulate}
    asked |= {f"--runtime.{name}": str(value) for name, value in own.items() if value is not None}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        words = [word for pair in asked.items() for word in pair]
        command = [sys.executable, "-m", "lsp_ray.run", *words, "--output_dir", str(out)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        ran = read_run(out)
    return Outcome(
        step_s=tuple(round(step.step_time_s, 4) for step in ran.steps),
        losses=tuple(round(step.loss, 5) for step in ran.steps),
        scores=ran.summary["eval_after"],
        peak_bytes=ran.summary["peak_device_bytes"],
        eval_losses=tuple((point.step, point.loss) for point in ran.eval_losses),
    )
