#!/usr/bin/env python3
"""Kill actors at random while a tiny model trains, and compare with the same run left alone.

    python scripts/soak.py [--steps 4000] [--kills 60] [--seed 0] [--quick] [--json PATH]

The kills are in the first half of the steps; --quick: 20 kills over 60 steps, and 540 steps left alone after them.
One kill in four is the GPU actor's, the others are shards'. Recovery is the longest pause between two steps after a
kill. Slopes are those of straight lines through what is in use between one kill and the next, each stretch at a level
of its own and without its first steps: a new process fills its caches.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from bisect import bisect
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
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
READ_EVERY = 5
GPU_SHARE = 0.25
SETTLING_STEPS = 150  # refits, checkpoints and allocators have been through all they do
STEPS_UNTIL_A_PAUSE = 3  # after a kill: so many steps may have all they need by then


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Megabytes in use after so many steps and kills.

    `rss_mb` is of all processes of the run together, without what they share; `shm_mb` are the segments of /dev/shm
    that they have mapped, `store_mb` the objects in Ray's store, which has its segment from the start on.
    """

    num_steps: int
    num_kills: int
    rss_mb: float
    shm_mb: float
    store_mb: float


class Watcher(Killer):
    """A killer that also notes when steps close and how much memory there is in use."""

    def __init__(self, actor_after: Mapping[int, str], seed: int) -> None:
        super().__init__(actor_after, seed)
        self._closed_s: list[float] = []
        self.readings: list[Memory] = []

    def step(self, metrics: StepMetrics) -> None:
        """See `Killer`."""
        self._closed_s.append(time.monotonic())
        super().step(metrics)
        if len(self.steps) % READ_EVERY == 0:
            self.readings.append(
                Memory(
                    num_steps=len(self.steps),
                    num_kills=len(self.killed),
                    rss_mb=_resident_mb(),
                    shm_mb=_shared_mb(),
                    store_mb=_stored_mb(),
                )
            )

    def recoveries_s(self, actor: str) -> list[float]:
        """The pause after each kill of an actor; where another kill fell into it, until that is overcome too."""
        gpu_s = [at for at, name in zip(self.killed_s, self.killed, strict=True) if name == "GpuActor"]
        pauses_s = []
        for killed_s, name in zip(self.killed_s, self.killed, strict=True):
            first = bisect(self._closed_s, killed_s)
            after = range(first, min(first + STEPS_UNTIL_A_PAUSE, len(self._closed_s)))
            waits_s = [self._closed_s[at] - max(killed_s, self._closed_s[at - 1]) for at in after]
            end_s = self._closed_s[after[-1]] if after else killed_s
            lost_gpu_too = name != "GpuActor" and any(killed_s < at < end_s for at in gpu_s)
            if name == actor and waits_s and not lost_gpu_too:  # else the pause is that one's
                pauses_s.append(max(waits_s))
        return pauses_s


def main(argv: Sequence[str] | None = None) -> int:
    """Soak, print the figures; 0 if nothing was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000, help="optimizer updates")
    parser.add_argument("--kills", type=int, default=60, help="actors killed in the first half of them")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the victims")
    parser.add_argument("--quick", action="store_true", help="600 steps, 20 kills in the first 60")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(argv)
    steps, kills, until = (600, 20, 60) if options.quick else (options.steps, options.kills, options.steps // 2)
    if not 0 <= kills < until:
        parser.error(f"argument --kills: must be below {until}, half of --steps, got {kills}")
    with tempfile.TemporaryDirectory() as folder:
        figures = _soak(Path(folder), steps, kills, until, options.seed)
    print(json.dumps(figures, indent=2))
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0 if figures["identical"] and not figures["lost"] else 1


def _soak(folder: Path, steps: int, kills: int, until: int, seed: int) -> dict[str, Any]:
    start_s = time.monotonic()
    job = tiny_job(folder, max_steps=steps, save_steps=SAVE_STEPS, lsp=REFITS, runtime={"num_shards": 2}, bf16=True)
    run_on_threads(job, folder / "undisturbed")
    chance = random.Random(seed)
    moments = chance.sample(range(1, until), kills)
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
        "max_recovery_s": round(max(watcher.recoveries_s("ShardActor"), default=0.0), 2),
        "max_gpu_recovery_s": round(max(watcher.recoveries_s("GpuActor"), default=0.0), 2),
        "rss_slope_mb_per_1000_steps": _slope(watcher.readings, "rss_mb"),
        "shm_slope_mb_per_1000_steps": _slope(watcher.readings, "shm_mb"),
        "store_slope_mb_per_1000_steps": _slope(watcher.readings, "store_mb"),
        "identical": _same_weights(job, folder) and ours == theirs,
        "total_s": round(time.monotonic() - start_s),
    }


def _losses(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {line["step"]: line["loss"] for line in lines}


def _same_weights(job: Job, folder: Path) -> bool:
    ours, theirs = (saved_weights(job, folder / name) for name in ("killed", "undisturbed"))
    return all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def _slope(readings: Sequence[Memory], name: str) -> float | None:
    """Least squares, with a level for each stretch between two kills; None where no stretch is long enough."""
    squares = products = 0.0
    for _, group in groupby(readings, key=lambda reading: reading.num_kills):
        stretch = list(group)
        settled = [reading for reading in stretch if reading.num_steps >= stretch[0].num_steps + SETTLING_STEPS]
        if len(settled) > 2:
            steps = np.array([reading.num_steps for reading in settled], dtype=float)
            values = np.array([getattr(reading, name) for reading in settled])
            steps -= steps.mean()
            squares += float(steps @ steps)
            products += float(steps @ (values - values.mean()))
    return round(1000 * products / squares, 3) if squares else None


def _resident_mb() -> float:
    total = 0
    for process in _processes():
        with suppress(psutil.NoSuchProcess):
            memory = process.memory_info()
            total += memory.rss - memory.shared
    return total / 1e6


def _shared_mb() -> float:
    """Each segment once, by its name, though it has none in /dev/shm any more: who has it mapped keeps it."""
    segments: dict[str, int] = {}
    for process in _processes():
        with suppress(psutil.NoSuchProcess, OSError):
            for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines():
                if "/dev/shm/" in line:
                    start, end = (int(address, 16) for address in line.split()[0].split("-"))
                    name = line.split(maxsplit=5)[5]
                    segments[name] = max(end - start, segments.get(name, 0))
    return sum(segments.values()) / 1e6


def _stored_mb() -> float:
    total, free = ray.cluster_resources(), ray.available_resources()  # type: ignore[no-untyped-call]
    return float(total["object_store_memory"] - free["object_store_memory"]) / 1e6


def _processes() -> list[psutil.Process]:
    return [psutil.Process(), *psutil.Process().children(recursive=True)]


if __name__ == "__main__":
    sys.exit(main())
