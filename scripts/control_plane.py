#!/usr/bin/env python3
"""Measures what control costs a step: a real run on Ray, 32 layers whose tensors are so small that little else costs.

    python scripts/control_plane.py [--policies layerwise,sequential,delayed] [--layers 32] [--steps 40]
        [--threads | --paced | --gpus 4]

For each policy, medians over the steps after the first: the step, how long it waited for deltas, how much of that while
no copy and no update was under way (which is what control costs the step), processor time of the driver, of the GPU
actors and of the shards (of actors the mean); and, of an operation, from when it could begin until it began. The driver
writes its event log as a run does, of a run's first 100 steps: the first line says how many of these. With
--threads everybody is a thread of this process, with --paced the GPU actors only sleep as long as a GPU would compute.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TextIO

import psutil
import torch

from lsp_ray.config import LspConfig, RunConfig, RuntimeConfig
from lsp_ray.runtime.actors.ray_workers import RayWorkers
from lsp_ray.runtime.actors.thread_workers import ThreadWorkers
from lsp_ray.runtime.cluster.private_cluster import ray_cluster
from lsp_ray.runtime.drive.driver import Driver
from lsp_ray.runtime.drive.event_log import MAX_STEPS, EventLog
from lsp_ray.runtime.drive.ledger import ClosedStep
from lsp_ray.runtime.drive.step_judge import StepJudge
from lsp_ray.runtime.prepare.job import Job, prepare_job
from lsp_ray.schedule.policy import POLICIES
from lsp_ray.trace import Phase, Span, Timeline, WorkStream
from scripts.gpu_bench_parts.random_model import random_model, random_rows, write_folder
from scripts.gpu_bench_parts.settings import SIZES, Size
from scripts.paced_gpu import PacedWorkers

WARM_UP = 3
ACTORS = {"gpus": ("ray::GpuActor", "ray::PacedGpu"), "shards": ("ray::ShardActor",)}
HEADER = (
    f"{'policy':<18} {'step ms':>8} {'waits ms':>9} {'control ms':>11} {'driver cpu':>11} {'gpus cpu':>8} "
    f"{'shards cpu':>11} {'ready→d2h':>10} {'d2h→cpu':>8} {'cpu→h2d':>8} ms"
)


@dataclass(slots=True)
class Processes:
    """Processor seconds of this process's actors."""

    actors: dict[str, list[psutil.Process]] = field(default_factory=dict)

    def find(self) -> None:
        """Look for the actors."""
        for process in psutil.Process().children(recursive=True):
            words = " ".join(process.cmdline())
            for name, titles in ACTORS.items():
                if any(title in words for title in titles):
                    self.actors.setdefault(name, []).append(process)

    def seconds(self) -> dict[str, float]:
        """Until now."""
        spent = {}
        for name, processes in self.actors.items():
            times = [process.cpu_times() for process in processes]
            spent[name] = sum(each.user + each.system for each in times)
        return spent


def measure(job: Job, num_steps: int, workers: RayWorkers | ThreadWorkers) -> str:
    """Run the steps and end the workers; returns what they showed, on one line."""
    closed: list[ClosedStep] = []
    driver_s: list[float] = []

    def on_step(step: ClosedStep) -> None:
        closed.append(step)
        driver_s.append(time.process_time())

    try:
        workers.setup(lambda _line: None)
        with Path(os.devnull).open("w", encoding="utf-8") as log:
            driver = _driver(job, workers, on_step, log)
            driver.train(WARM_UP)
            processes = Processes()
            processes.find()
            before = processes.seconds()
            driver.train(num_steps)
            spent = {name: (end_s - before[name]) for name, end_s in processes.seconds().items()}
    finally:
        workers.close()
    # the first step after a pause finds every delta there
    timelines = [step.timeline for step in closed]
    steps = closed[WARM_UP + 1 :]
    control_s = [_idle_waits_s(timelines[max(0, step.timeline.step - 2) : step.timeline.step + 1]) for step in steps]
    each_s = [after_s - before_s for before_s, after_s in pairwise(driver_s[WARM_UP:])]
    gaps = [median(gap) * 1e3 if gap else math.nan for gap in _gaps(step.timeline for step in steps)]
    if job.layout.num_gpus > 1:  # lanes of several links are no one lane
        gaps = [math.nan] * len(gaps)
    num_steps -= WARM_UP
    actors = [1e3 * spent.get(name, math.nan) / num_steps for name in ACTORS]
    cpu = [1e3 * median(each_s), *actors]
    return (
        f"{job.config.policy:<18} {1e3 * median(step.metrics.step_time_s for step in steps):8.1f} "
        f"{1e3 * median(step.metrics.exposed_s for step in steps):9.2f} {1e3 * median(control_s):11.2f} "
        f"{cpu[0]:11.1f} {cpu[1]:8.1f} {cpu[2]:11.1f} {gaps[0]:10.2f} {gaps[1]:8.2f} {gaps[2]:8.2f}"
    )


def _driver(
    job: Job, workers: RayWorkers | ThreadWorkers, on_step: Callable[[ClosedStep], None], log: TextIO
) -> Driver:
    """As a run has it, with the log of its first steps."""
    layout = job.layout
    policy = POLICIES[job.config.policy](
        layout.shard_of_unit, gpu_of_part=layout.gpu_of_part, home_of_layer=layout.home_of_unit
    )
    return Driver(
        workers,
        policy,
        job.learning_rates,
        judge=StepJudge(len(job.payload_sizes), num_parts=len(layout.gpu_of_part), num_gpus=layout.num_gpus),
        on_step=on_step,
        event_log=EventLog(log, job.config.policy, layout.shard_of_unit, policy),
    )


def _idle_waits_s(timelines: Sequence[Timeline]) -> float:
    """Of the last step's waits: in which no lane was at work."""
    spans = sorted((span.start_s, span.end_s) for timeline in timelines for span in timeline.ops)
    idle_s = 0.0
    for wait in timelines[-1].waits:
        covered_until = wait.start_s
        for start_s, end_s in spans:
            if end_s > covered_until and start_s < wait.end_s:
                idle_s += max(0.0, start_s - covered_until)
                covered_until = end_s
        idle_s += max(0.0, wait.end_s - covered_until)
    return idle_s


def _gaps(timelines: Iterator[Timeline]) -> list[list[float]]:
    """From when an operation could begin, its lane free and its input there, until it began; of each stream."""
    gaps: list[list[float]] = [[], [], []]
    for timeline in timelines:
        ready = {span.layer: span.end_s for span in timeline.compute if span.phase is Phase.BACKWARD}
        for gap, stream in zip(gaps, (WorkStream.D2H, WorkStream.CPU, WorkStream.H2D), strict=True):
            ops = sorted((op for op in timeline.ops if op.stream is stream), key=lambda op: op.start_s)
            gap += _late_starts(ops, ready)
            ready = {op.layer: op.end_s for op in ops}
    return gaps


def _late_starts(ops: Sequence[Span], ready: dict[int, float]) -> Iterator[float]:
    free_s = 0.0
    for op in ops:
        if op.layer in ready:
            yield op.start_s - max(ready[op.layer], free_s)
        free_s = op.end_s


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    description = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python scripts/control_plane.py", description=description)
    parser.add_argument("--policies", default="layerwise,sequential,delayed", help="By commas.")
    parser.add_argument("--layers", type=int, default=32, help="Of the model (default: 32).")
    parser.add_argument("--steps", type=int, default=40, help="Of each policy (default: 40).")
    parser.add_argument("--gpus", type=int, default=1, help="Paced ones, a part of a step each (default: 1, real).")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--threads", action="store_true", help="Threads of this process in the place of Ray's actors.")
    how.add_argument("--paced", action="store_true", help="The GPU actor sleeps in the place of computing.")
    options = parser.parse_args(argv)
    if options.gpus > 1:
        if options.threads:
            parser.error("--threads are one GPU's")
        options.paced = True
    kind = PacedWorkers if options.paced else ThreadWorkers if options.threads else RayWorkers
    tiny = SIZES["tiny"]
    shape = {**tiny.shape, "num_hidden_layers": options.layers}
    size = replace(tiny, shape=shape, gradient_checkpointing=False)
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_folder(Path(scratch) / "model", size)
        random_model(folder, torch.float32, torch.device("cpu")).save_pretrained(folder)
        jobs = [_job(folder, size, policy, options.steps, options.gpus) for policy in options.policies.split(",")]
        num_units = len(jobs[0].payload_sizes)
        logged = f"event log of {min(options.steps, MAX_STEPS)} of {options.steps} steps"
        print(f"{num_units} units, {(1 + 2 * options.gpus) * num_units} operations a step, {logged}\n{HEADER}")
        with _cluster(jobs[0], on_ray=not options.threads):
            for job in jobs:
                print(measure(job, options.steps, kind(job)), flush=True)
    return 0


def _cluster(job: Job, *, on_ray: bool) -> AbstractContextManager[object]:
    if not on_ray:
        return nullcontext()
    return ray_cluster(num_actors=job.layout.num_gpus + job.layout.num_shards, store_bytes=job.store_bytes)


def _job(folder: Path, size: Size, policy: str, num_steps: int, num_gpus: int) -> Job:
    config = RunConfig(
        model_name_or_path=str(folder),
        dataset="random tokens",
        max_steps=num_steps,
        num_replicas=num_gpus,
        per_device_train_batch_size=size.batch_size,
        max_seq_length=size.seq_length,
        bf16=False,
        lsp=LspConfig(subspace_dim=16, nnz_per_row=2, fit="random", check_every=0),
        runtime=RuntimeConfig(device="cpu", policy=policy, num_gpus=num_gpus),  # type: ignore[arg-type]
    )
    return prepare_job(config, lambda _line: None, random_rows(size))


if __name__ == "__main__":
    sys.exit(main())
