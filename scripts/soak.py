#!/usr/bin/env python3
"""Kill actors at random while a tiny model trains, and compare with the same run left alone.

    python scripts/soak.py [--steps 4000] [--kills 60] [--gpus 1] [--seed 0] [--quick] [--json PATH]

The kills are in the first half of the steps; --quick: 20 kills over 60 steps, and 540 steps left alone after them.
With several GPUs (actors on the CPU in their place) a step has as many parts, and a lost one is replaced in its step.
One kill in four is the GPU actor's, the others are shards'. Recovery is the longest pause between two steps after a
kill. Growth is the slope of a straight line through what a process holds by itself, over all steps that it lives
through but its first ones: a new process fills its caches. The driver and Ray's own processes live through every kill,
so theirs has what a kill costs; of the actors that took each other's place each has a level of its own.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from array import array
from bisect import bisect
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
import torch

from lsp_ray.runtime.actors.ray_workers import RayWorkers
from lsp_ray.runtime.cluster.private_cluster import ray_cluster
from lsp_ray.runtime.persistence import fine_tune_persistently
from lsp_ray.runtime.prepare.job import Job
from lsp_ray.runtime.training import NeverStop
from lsp_ray.trace import StepMetrics
from tests.killers import Killer
from tests.tiny_jobs import run_on_threads, saved_weights, tiny_job

REFITS = {"check_every": 12, "max_bias": 0.0, "calibration_batches": 2}
SAVE_STEPS = 10
READ_EVERY = 20
NUM_SHARDS = 2
GPU_SHARE = 0.25
SETTLING_STEPS = 200  # refits, checkpoints and allocators have been through all they do
STEPS_UNTIL_A_PAUSE = 3  # after a kill: so many steps may have all they need by then
# what a command line has in it: whose process it is
NAMES = {
    "ray::GpuActor": "GPU actor",
    "ray::ShardActor": "shard actors",
    "gcs_server": "Ray: gcs_server",
    "raylet/raylet": "Ray: raylet",
    "ray::DashboardAgent": "Ray: dashboard agent",
    "ray::RuntimeEnvAgent": "Ray: runtime_env agent",
    "log_monitor.py": "Ray: log monitor",
    "/monitor.py": "Ray: autoscaler",
    "dashboard.py": "Ray: dashboard",
    "ray::IDLE": "Ray: idle workers",
}
DRIVER, SHARED, STORE = "driver", "shared memory", "Ray's store"
OURS = (DRIVER, "GPU actor", "shard actors")


@dataclass(frozen=True, slots=True)
class Curve:
    """Megabytes after so many steps."""

    name: str
    steps: array[int] = field(default_factory=lambda: array("q"))
    mb: array[float] = field(default_factory=lambda: array("d"))

    def add(self, step: int, mb: float) -> None:
        """Append a reading."""
        self.steps.append(step)
        self.mb.append(mb)

    def settled(self) -> tuple[Any, Any]:
        """Steps and megabytes without the first ones, each less its mean."""
        steps, mb = np.array(self.steps, dtype=float), np.array(self.mb)
        is_settled = steps >= steps[0] + SETTLING_STEPS
        return _centred(steps[is_settled]), _centred(mb[is_settled])


class Watcher(Killer):
    """A killer that also notes when steps close and how much memory there is in use, and keeps no step.

    Memory is that of each process by itself, without what it shares with others; the segments of /dev/shm that any has
    mapped; the objects in Ray's store, which has its segment from the start on.
    """

    def __init__(self, actor_after: Mapping[int, str], seed: int) -> None:
        super().__init__(actor_after, seed)
        self._closed_s = array("d")
        self.num_made_again = self._last = 0
        self.curves: dict[tuple[str, int], Curve] = {}  # by name and number of the process

    def step(self, metrics: StepMetrics) -> None:
        """See `Killer`."""
        self._closed_s.append(time.monotonic())
        super().step(metrics)
        self.num_made_again += metrics.step <= self._last
        self._last = max(self._last, metrics.step)
        self.steps.clear()
        if len(self._closed_s) % READ_EVERY == 0:
            self._read(len(self._closed_s))

    def _read(self, step: int) -> None:
        processes = _processes()
        readings = [(name, pid, _private_mb(pid)) for pid, name in processes.items()]
        readings += [(SHARED, 0, _shared_mb(processes)), (STORE, 0, _stored_mb())]
        for name, pid, mb in readings:
            if mb is not None:
                self.curves.setdefault((name, pid), Curve(name)).add(step, mb)

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
    parser.add_argument("--kills", type=int, default=60, help="actors killed in the first half of them; 0 for none")
    parser.add_argument("--gpus", type=int, default=1, help="actors that compute a step's parts")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the victims")
    parser.add_argument("--quick", action="store_true", help="600 steps, 20 kills in the first 60")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(argv)
    steps, kills, until = (600, 20, 60) if options.quick else (options.steps, options.kills, options.steps // 2)
    if not 0 <= kills < until:
        parser.error(f"argument --kills: must be below {until}, half of --steps, got {kills}")
    with tempfile.TemporaryDirectory() as folder:
        figures = _soak(Path(folder), steps, kills, until, options.seed, options.gpus)
    print(json.dumps(figures, indent=2))
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0 if figures["identical"] and not figures["lost"] else 1


def _soak(folder: Path, steps: int, kills: int, until: int, seed: int, num_gpus: int) -> dict[str, Any]:
    start_s = time.monotonic()
    alone, job = (
        tiny_job(
            folder,
            max_steps=steps,
            save_steps=SAVE_STEPS,
            lsp=REFITS,
            num_replicas=num_gpus,
            runtime={"num_shards": NUM_SHARDS, "num_gpus": own},
            bf16=True,
        )
        for own in (1, num_gpus)
    )
    run_on_threads(alone, folder / "undisturbed")
    chance = random.Random(seed)
    moments = chance.sample(range(1, until), kills)
    victims = {moment: "GpuActor" if chance.random() < GPU_SHARE else "ShardActor" for moment in moments}
    watcher = Watcher(victims, seed)
    (folder / "killed").mkdir()
    with ray_cluster(num_actors=num_gpus + NUM_SHARDS, store_bytes=2 * job.store_bytes):
        fine_tune_persistently(job, RayWorkers, folder / "killed", watcher, str, NeverStop())
    ours, theirs = (_losses(folder / name) for name in ("killed", "undisturbed"))
    return {
        "steps": steps,
        "kills": len(watcher.killed),
        "gpu_kills": watcher.killed.count("GpuActor"),
        "made_again": watcher.num_made_again,
        "lost": sum(ours.get(step) != loss for step, loss in theirs.items()),
        "max_recovery_s": round(max(watcher.recoveries_s("ShardActor"), default=0.0), 2),
        "max_gpu_recovery_s": round(max(watcher.recoveries_s("GpuActor"), default=0.0), 2),
        "growth_mb_per_1000_steps": _growth(watcher.curves.values()),
        "held_mb": _held(watcher.curves.values()),
        "identical": _same_weights(job, folder) and ours == theirs,
        "total_s": round(time.monotonic() - start_s),
    }


def _losses(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {line["step"]: line["loss"] for line in lines}


def _same_weights(job: Job, folder: Path) -> bool:
    ours, theirs = (saved_weights(job, folder / name) for name in ("killed", "undisturbed"))
    return all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def _growth(curves: Iterable[Curve]) -> dict[str, float | None]:
    """Of each process by name, and of ours together; least squares, each curve at a level of its own."""
    found: dict[str, float | None] = {}
    settled: dict[str, list[tuple[Any, Any]]] = {}
    for curve in curves:
        settled.setdefault(curve.name, []).append(curve.settled())
    for name, parts in settled.items():
        squares = sum(float(steps @ steps) for steps, _ in parts)
        products = sum(float(steps @ mb) for steps, mb in parts)
        found[name] = round(1000 * products / squares, 3) if squares else None
    ours = [(found.get(name) or 0.0) * (NUM_SHARDS if name == OURS[-1] else 1) for name in OURS]
    return {"ours together": round(sum(ours), 3)} | dict(sorted(found.items()))


def _held(curves: Iterable[Curve]) -> dict[str, list[float]]:
    """Megabytes at a name's first settled reading, each quarter and the last, of the process that lived longest."""
    longest: dict[str, Curve] = {}
    for curve in curves:
        if len(curve.mb) > len(longest.get(curve.name, Curve("")).mb):
            longest[curve.name] = curve
    settled = {
        name: [mb for at, mb in zip(c.steps, c.mb, strict=True) if at >= c.steps[0] + SETTLING_STEPS]
        for name, c in longest.items()
    }
    return {
        name: [round(mb[(len(mb) - 1) * at // 4], 1) for at in range(5)] for name, mb in sorted(settled.items()) if mb
    }


def _centred(values: Any) -> Any:
    return values - values.mean() if len(values) else values


def _private_mb(pid: int) -> float | None:
    try:
        memory = psutil.Process(pid).memory_info()
    except psutil.NoSuchProcess:
        return None
    return float(memory.rss - memory.shared) / 1e6


def _shared_mb(pids: Iterable[int]) -> float:
    """Each segment once, by its name, though it has none in /dev/shm any more: who has it mapped keeps it."""
    segments: dict[str, int] = {}
    for pid in pids:
        with suppress(OSError):
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                if "/dev/shm/" in line:
                    start, end = (int(address, 16) for address in line.split()[0].split("-"))
                    name = line.split(maxsplit=5)[5]
                    segments[name] = max(end - start, segments.get(name, 0))
    return sum(segments.values()) / 1e6


def _stored_mb() -> float:
    total, free = ray.cluster_resources(), ray.available_resources()  # type: ignore[no-untyped-call]
    return float(total["object_store_memory"] - free["object_store_memory"]) / 1e6


def _processes() -> dict[int, str]:
    """This process and its children, by number: whose they are."""
    found = {psutil.Process().pid: DRIVER}
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            command = " ".join(process.cmdline())
            found[process.pid] = next((name for part, name in NAMES.items() if part in command), process.name())
    return found


if __name__ == "__main__":
    sys.exit(main())
