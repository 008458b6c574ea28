"""Runs of lsp_ray itself: the live policy, driver and streams, the shards as threads of this process or on Ray."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lsp_ray.config import LspConfig, RunConfig, RuntimeConfig
from lsp_ray.runtime.actors.thread_workers import ThreadWorkers
from lsp_ray.runtime.drive.driver import Driver, Workers
from lsp_ray.runtime.drive.ledger import ClosedStep
from lsp_ray.runtime.prepare.job import Job, prepare_job
from lsp_ray.schedule.policy import POLICIES
from scripts.gpu_bench_parts.phases import Phase, Ran, reset_peak, synchronize
from scripts.gpu_bench_parts.random_model import made_on, random_rows
from scripts.gpu_bench_parts.settings import OURS, Setting, Size

MAX_STEPS = 10_000  # of which few are made: a run records the times of layers in its first steps and in its middle


def run_ours(
    setting: Setting, size: Size, folder: Path, device: torch.device, phases: Sequence[Phase], **options: Any
) -> Ran:
    """Run the phases one after the other; the first only warms up. Options are a RunConfig's.

    On Ray nobody looks at the phases, as the device is another process's.
    """
    with made_on(device):
        job = prepare_job(_config(setting, size, folder, device, options), _ignore, random_rows(size))
    if setting.on_ray:
        from scripts.gpu_bench_parts.on_ray import ray_workers

        with ray_workers(job) as actors:
            actors.setup(_ignore)
            return _ran(actors, job, phases, lambda _action: None)
    workers = ThreadWorkers(job)
    try:
        with made_on(device):
            workers.setup(_ignore)
        _spread_shards(workers, job)
        ran = _ran(workers, job, phases, lambda action: workers._compute.submit(action).result())
    finally:
        workers.close()
    if device.type == "cuda":
        return replace(ran, note=f"{torch.cuda.max_memory_reserved(device) / 1e9:.1f} GB reserved")
    return ran


def _ran(
    workers: Workers, job: Job, phases: Sequence[Phase], on_compute_thread: Callable[[Callable[[], object]], object]
) -> Ran:
    device = torch.device(job.device)
    closed: list[ClosedStep] = []
    decides = POLICIES[job.config.policy](job.layout.shard_of_unit, room=job.delta_room)
    driver = Driver(workers, decides, job.learning_rates, on_step=closed.append)
    end, ends = 0, []
    for phase in phases:
        end += phase.num_steps
        ends.append(end)
        on_compute_thread(partial(synchronize, device))
        on_compute_thread(phase.watch.start)
        driver.train(end)
        on_compute_thread(partial(synchronize, device))
        on_compute_thread(phase.watch.stop)
        if phase is phases[0]:
            on_compute_thread(partial(reset_peak, device))
    steps = [step.metrics for step in closed]
    spans = [slice(end - phase.num_steps, end) for phase, end in zip(phases, ends, strict=True)]
    return Ran(
        step_s=[[step.step_time_s for step in steps[span]] for span in spans],
        exposed_s=[[step.exposed_s for step in steps[span]] for span in spans] if job.config.offloads else None,
        peak_bytes=driver.ledger.peak_device_bytes or 0,  # torch does not count what graphs hold inside
        last_loss=steps[-1].loss,
    )


def _spread_shards(workers: ThreadWorkers, job: Job) -> None:
    """Give every shard the threads that it would have as an actor; torch keeps a number for each thread."""
    for lane in workers._cpu:
        lane.submit(torch.set_num_threads, job.layout.shard_threads).result()


def _config(setting: Setting, size: Size, folder: Path, device: torch.device, options: Mapping[str, Any]) -> RunConfig:
    on_gpu = device.type == "cuda"
    return RunConfig(
        model_name_or_path=str(folder),
        dataset="random tokens",
        method=OURS[setting.name],
        max_steps=MAX_STEPS,
        per_device_train_batch_size=size.batch_size,
        max_seq_length=size.seq_length,
        learning_rate=1e-5,
        gradient_checkpointing=size.gradient_checkpointing,
        lsp=LspConfig(subspace_dim=setting.dim or 256, fit="random"),
        runtime=RuntimeConfig(device="cuda")
        if on_gpu
        else RuntimeConfig(device="cpu", device_threads=1, shard_threads=1),
        **{"bf16": True, **options},
    )


def _ignore(_line: str) -> None:
    pass
