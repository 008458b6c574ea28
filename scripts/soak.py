#!/usr/bin/env python3
"""Kill actors at random while a tiny model trains, and compare with the same run left alone.

    python scripts/soak.py [--steps 2000] [--kills 60] [--seed 0] [--quick] [--json PATH]

--quick: 60 steps, 20 kills. One kill in four is the GPU actor's, the others are shards'.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from lsp_ray.runtime.cluster import ray_cluster
from lsp_ray.runtime.job import Job
from lsp_ray.runtime.persistence import fine_tune_persistently
from lsp_ray.runtime.ray_workers import RayWorkers
from lsp_ray.runtime.training import NeverStop
from lsp_ray.trace import StepMetrics
from tests.killers import Killer
from tests.tiny_jobs import run_on_threads, saved_weights, tiny_job

REFITS = {"check_every": 12, "max_bias": 0.0, "calibration_batches": 2}
SAVE_STEPS = 10
GPU_SHARE = 0.25


class Watcher(Killer):
    """A killer that also notes when steps close and how much memory there is in use."""

    def __init__(self, actor_after: Mapping[int, str], seed: int) -> None:
        super().__init__(actor_after, seed)
        self._closed_s = time.monotonic()
        self._num_killed = 0
        self.recovery_s: dict[str, list[float]] = {"GpuActor": [], "ShardActor": []}
        self.readings: list[tuple[int, float, float]] = []  # step, megabytes of all processes, of shared memory

    def step(self, metrics: StepMetrics) -> None:
        """See `Killer`."""
        now_s = time.monotonic()
        lost, self._num_killed = self.killed[self._num_killed :], len(self.killed)
        if lost:  # the steps that stood still for it
            self.recovery_s["GpuActor" if "GpuActor" in lost else "ShardActor"].append(now_s - self._closed_s)
        self._closed_s = now_s
        super().step(metrics)
        if len(self.steps) % SAVE_STEPS == 0:
            shared_mb = psutil.disk_usage("/dev/shm").used / 1e6
            self.readings.append((metrics.step, _resident_mb(), shared_mb))


def main(argv: Sequence[str] | None = None) -> int:
    """Soak, print the figures; 0 if nothing was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="optimizer updates")
    parser.add_argument("--kills", type=int, default=60, help="actors killed on the way")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the victims")
    parser.add_argument("--quick", action="store_true", help="60 steps, 20 kills")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(argv)
    steps, kills = (60, 20) if options.quick else (options.steps, options.kills)
    with tempfile.TemporaryDirectory() as folder:
        figures = _soak(Path(folder), steps, kills, options.seed)
    print(json.dumps(figures, indent=2))
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0 if figures["identical"] else 1


def _soak(folder: Path, steps: int, kills: int, seed: int) -> dict[str, Any]:
    job = tiny_job(folder, max_steps=steps, save_steps=SAVE_STEPS, lsp=REFITS, runtime={"num_shards": 2}, bf16=True)
    run_on_threads(job, folder / "undisturbed")
    chance = random.Random(seed)
    moments = chance.sample(range(1, steps), kills)
    victims = {moment: "GpuActor" if chance.random() < GPU_SHARE else "ShardActor" for moment in moments}
    watcher = Watcher(victims, seed)
    (folder / "killed").mkdir()
    with ray_cluster(num_actors=3, store_bytes=2 * job.store_bytes):
        fine_tune_persistently(job, RayWorkers, folder / "killed", watcher, str, NeverStop())
    ours, theirs = (_losses(folder / name) for name in ("killed", "undisturbed"))
    return {
        "steps": steps,
        "kills": len(watcher.killed),
        "gpu_kills": watcher.killed.count("GpuActor"),
        "lost": sum(ours.get(step) != loss for step, loss in theirs.items()),
        "max_recovery_s": round(max(watcher.recovery_s["ShardActor"], default=0.0), 2),
        "max_gpu_recovery_s": round(max(watcher.recovery_s["GpuActor"], default=0.0), 2),
        "rss_slope_mb_per_1000_steps": _slope(watcher.readings, 1),
        "shm_slope_mb_per_1000_steps": _slope(watcher.readings, 2),
        "identical": _same_weights(job, folder) and ours == theirs,
    }


def _losses(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {line["step"]: line["loss"] for line in lines}


def _same_weights(job: Job, folder: Path) -> bool:
    ours, theirs = (saved_weights(job, folder / name) for name in ("killed", "undisturbed"))
    return all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def _slope(readings: Sequence[tuple[int, float, float]], column: int) -> float | None:
    """Of a straight line through the second half of the readings: the first has caches that fill."""
    settled = readings[len(readings) // 2 :]
    if len(settled) < 3:
        return None
    slope, _ = np.polyfit([reading[0] for reading in settled], [reading[column] for reading in settled], 1)
    return round(1000 * float(slope), 3)


def _resident_mb() -> float:
    total = 0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        try:
            memory = process.memory_info()
        except psutil.NoSuchProcess:
            continue
        total += memory.rss - memory.shared
    return total / 1e6


if __name__ == "__main__":
    sys.exit(main())
