"""Runs of lsp_ray itself, each a process of its own through the command line that people use."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from scripts.method_bench.tasks import METHOD_OPTIONS

_COMMON = {
    "--bf16": "true",
    "--runtime.device": "cpu",
    "--runtime.device_threads": "1",
    "--runtime.num_shards": "1",
    "--runtime.shard_threads": "1",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A point of the matrix; `task` is a name."""

    task: str
    method: str
    seed: int = 42
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
    """What a run was: the time and the training loss of every step, and its scores after the last."""

    step_s: tuple[float, ...]
    losses: tuple[float, ...]
    scores: Mapping[str, float]
    peak_bytes: int | None


def run(setting: Setting, options: Mapping[str, str], *, num_steps: int) -> Outcome:
    """Run once.

    Args:
        setting: What runs.
        options: The task's, and any others of the command line.
        num_steps: Optimizer updates.
    """
    asked = {**_COMMON, **METHOD_OPTIONS[setting.method], **options}
    asked |= {"--method": setting.method, "--seed": str(setting.seed), "--max_steps": str(num_steps)}
    own = {"policy": setting.policy, "link_gbps": setting.link_gbps, "emulate": setting.emulate}
    asked |= {f"--runtime.{name}": str(value) for name, value in own.items() if value is not None}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        words = [word for pair in asked.items() for word in pair]
        command = [sys.executable, "-m", "lsp_ray.run", *words, "--output_dir", str(out)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    return Outcome(
        step_s=tuple(line["step_time_s"] for line in lines),
        losses=tuple(line["loss"] for line in lines),
        scores=summary["eval_after"],
        peak_bytes=summary["peak_device_bytes"],
    )
