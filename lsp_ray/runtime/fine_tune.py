"""fine_tune: one run from job to result, on the workers given."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Protocol

from lsp_ray.runtime.device_side import SetupReport
from lsp_ray.runtime.driver import Driver, Workers
from lsp_ray.runtime.event_log import EventLog
from lsp_ray.runtime.job import Job
from lsp_ray.runtime.ledger import ClosedStep
from lsp_ray.runtime.throttle import Throttle, slower_by_themselves
from lsp_ray.schedule.policy import POLICIES
from lsp_ray.trace import StepMetrics
from lsp_ray.trace_file import trace_file


class FineTuneWorkers(Workers, Protocol):
    """Workers with the long calls around training."""

    def setup(self, on_progress: Callable[[str], None]) -> SetupReport:
        """See `DeviceSide.setup`."""
        ...

    def evaluate(self) -> float:
        """See `DeviceSide.evaluate`."""
        ...

    def sample(self) -> list[int]:
        """See `DeviceSide.sample`."""
        ...

    def save(self, folder: Path) -> None:
        """See `DeviceSide.save`."""
        ...


class Listener(Protocol):
    """Who follows a run: the progress display."""

    def note(self, text: str) -> None:
        """Something a person would want to know."""
        ...

    def phase(self, text: str) -> None:
        """What begins now."""
        ...

    def step(self, metrics: StepMetrics) -> None:
        """A step is closed."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What summary.json holds. Times are seconds, sizes bytes, without the step whose memory was measured.

    The samples are the model's answers to a held-out prompt, and what the data says.
    `overlap_fraction` is 1 − exposed time / step time; `policy` is None where nothing leaves the device.
    """

    method: str
    policy: str | None
    device: str
    num_shards: int
    eval_loss_before: float
    eval_loss_after: float
    step_time_s_median: float
    tokens_per_second: float
    overlap_fraction: float
    peak_device_bytes: int | None
    bytes_d2h_per_step: int
    bytes_h2d_per_step: int
    sample_before: str
    sample_after: str
    sample_expected: str
    trainable_subspace_dims: dict[str, int]


def fine_tune(
    job: Job, workers: FineTuneWorkers, output_dir: Path, listener: Listener, decode: Callable[[Sequence[int]], str]
) -> Summary:
    """Set up, evaluate, train, evaluate again, and write everything into `output_dir`.

    Args:
        job: The run.
        workers: Who acts; stay the caller's.
        output_dir: Exists and is writable.
        listener: Told what happens.
        decode: Turns a sample's numbers into text.
    """
    setup = workers.setup(listener.phase)
    _note_setup(job, setup, listener)
    listener.phase("evaluating before training")
    loss_before = workers.evaluate()
    listener.note(f"eval loss before: {loss_before:.4f}")
    sample_before = decode(workers.sample())
    listener.note(f"sample before: {sample_before}")
    steps, peak_bytes = _train(job, workers, setup.throttle, output_dir, listener)
    listener.phase("evaluating after training")
    loss_after = workers.evaluate()
    change = (loss_after - loss_before) / loss_before
    listener.note(f"eval loss after: {loss_after:.4f} ({change:+.1%})")
    sample_after = decode(workers.sample())
    listener.note(f"sample after: {sample_after}")
    listener.note(f"sample in the data: {job.sample_expected}")
    listener.phase("saving the checkpoint")
    workers.save(output_dir)
    summary = _summary(job, steps, (loss_before, loss_after), (sample_before, sample_after), peak_bytes)
    _write_json(output_dir / "summary.json", asdict(summary))
    return summary


def _note_setup(job: Job, setup: SetupReport, listener: Listener) -> None:
    if setup.num_pageable:
        listener.note(
            f"{setup.num_pageable} slots could not be page-locked (ulimit -l, or WSL2): copies to and from the GPU run "
            "slower and overlap less"
        )
    unfitted = setup.unfitted
    if unfitted:
        listener.note(
            f"{len(unfitted)} of {len(job.subspace_dims)} projectors stay random, as calibration gave their layers "
            f"no gradient: {', '.join(unfitted[:3])}{' …' if len(unfitted) > 3 else ''}"
        )
    if job.staleness:
        listener.note(
            f"policy {job.config.policy}: every update is added {job.staleness} step late, which changes losses"
        )
    throttle = setup.throttle
    if throttle.compute_s is not None and throttle.link_gbps is not None and throttle.updates_per_s is not None:
        listener.note(
            f"emulating {job.config.runtime.emulate}: a step computes {throttle.compute_s:.3g} s, so the link passes "
            f"{throttle.link_gbps:.3g} GB/s each way and the shards update {throttle.updates_per_s:.3g} elements/s"
        )


def _train(
    job: Job, workers: Workers, throttle: Throttle, output_dir: Path, listener: Listener
) -> tuple[list[StepMetrics], int | None]:
    """Run all steps, a line of metrics.jsonl each, some traced; returns their metrics and the peak of device memory."""
    policy = POLICIES[job.config.policy](job.layout.shard_of_unit)
    steps: list[StepMetrics] = []
    listener.phase(f"training: {job.num_steps} steps")
    with (
        (output_dir / "metrics.jsonl").open("w", encoding="utf-8", buffering=1) as metrics_file,
        (output_dir / "events.jsonl").open("w", encoding="utf-8") as events_file,
        trace_file(output_dir / "trace.json", job.layout.shard_of_unit, num_steps=job.num_steps) as trace,
    ):

        def on_step(closed: ClosedStep) -> None:
            steps.append(closed.metrics)
            metrics_file.write(json.dumps(asdict(closed.metrics)) + "\n")
            trace.write(closed.timeline)
            listener.step(closed.metrics)

        event_log = EventLog(events_file, job.config.policy, job.layout.shard_of_unit)
        driver = Driver(workers, policy, job.learning_rates, on_step=on_step, event_log=event_log)
        driver.train()
    if job.payload_sizes:
        layers = driver.times.medians()
        for line in slower_by_themselves(throttle, layers, job.payload_sizes, job.layout.num_shards):
            listener.note(line)
    return steps, driver.ledger.peak_device_bytes


def _summary(
    job: Job,
    steps: Sequence[StepMetrics],
    losses: tuple[float, float],
    samples: tuple[str, str],
    peak_bytes: int | None,
) -> Summary:
    """Of a run whose eval losses and sample answers were these, before and after."""
    # the step whose memory was measured is slower for it
    timed = [metrics for metrics in steps if metrics.step != job.measured_step + 1] or steps
    total_s = sum(metrics.step_time_s for metrics in timed)
    return Summary(
        method=job.config.method,
        policy=job.config.policy if job.payload_sizes else None,
        device=job.device,
        num_shards=job.layout.num_shards,
        eval_loss_before=losses[0],
        eval_loss_after=losses[1],
        step_time_s_median=median(metrics.step_time_s for metrics in timed),
        tokens_per_second=sum(metrics.num_tokens for metrics in timed) / total_s,
        overlap_fraction=1.0 - sum(metrics.exposed_s for metrics in timed) / total_s,
        peak_device_bytes=peak_bytes,
        bytes_d2h_per_step=round(median(metrics.bytes_d2h for metrics in steps)),
        bytes_h2d_per_step=round(median(metrics.bytes_h2d for metrics in steps)),
        sample_before=samples[0],
        sample_after=samples[1],
        sample_expected=job.sample_expected,
        trainable_subspace_dims=job.subspace_dims,
    )


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
