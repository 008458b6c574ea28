"""Training: the steps of a run, and what is written while they go by."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from lsp_ray.errors import StoppedError
from lsp_ray.runtime.checkpoint import Checkpoints, way_on
from lsp_ray.runtime.device_side import SetupReport
from lsp_ray.runtime.driver import Driver, Workers
from lsp_ray.runtime.event_log import EventLog
from lsp_ray.runtime.job import Job
from lsp_ray.runtime.ledger import ClosedStep
from lsp_ray.runtime.metrics_file import METRICS, metrics_file
from lsp_ray.runtime.saved_run import SavedRun
from lsp_ray.runtime.throttle import Throttle, slower_by_themselves
from lsp_ray.schedule.policy import POLICIES
from lsp_ray.trace import StepMetrics
from lsp_ray.trace_file import trace_file


class FineTuneWorkers(Workers, Protocol):
    """Workers with the long calls around training."""

    def setup(self, on_progress: Callable[[str], None]) -> SetupReport:
        """See `DeviceSide.setup`."""
        ...

    def evaluate(self) -> dict[str, float]:
        """See `DeviceSide.evaluate`."""
        ...

    def sample(self) -> list[int]:
        """See `DeviceSide.sample`."""
        ...

    def save(self, folder: Path) -> None:
        """See `DeviceSide.save`."""
        ...

    def save_state(self, folder: Path) -> None:
        """See `DeviceSide.save_state`; the shards' part as well."""
        ...


class Stop(Protocol):
    """Who may ask a run to end early."""

    def deferred(self) -> AbstractContextManager[None]:
        """Within the context asking interrupts nothing at first."""
        ...

    def requested(self) -> bool:
        """Whether someone has asked."""
        ...


class NeverStop:
    """See `Stop`."""

    def deferred(self) -> AbstractContextManager[None]:
        """See `Stop`."""
        return nullcontext()

    def requested(self) -> bool:
        """See `Stop`."""
        return False


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


class Training:
    """All steps, with a line of metrics.jsonl each, some traced, and the checkpoints between them.

    Args:
        job: The run.
        workers: Who acts.
        output_dir: Where everything goes.
        listener: Told what happens.
        before: Eval scores and sample answer before training, for checkpoints to keep.
    """

    def __init__(
        self,
        job: Job,
        workers: FineTuneWorkers,
        output_dir: Path,
        listener: Listener,
        before: tuple[dict[str, float], str],
    ) -> None:
        self._job, self._workers, self._output_dir, self._listener = job, workers, output_dir, listener
        self._eval_before, self._sample_before = before
        self._steps: list[StepMetrics] = []

    def run(self, throttle: Throttle, stop: Stop) -> tuple[list[StepMetrics], int | None]:
        """Return all steps' metrics and the peak of device memory."""
        job, listener = self._job, self._listener
        listener.phase(f"training: {job.num_steps - job.first_step} steps")
        keep = job.config.save_total_limit
        with self._driver() as driver, Checkpoints(self._output_dir, keep=keep) as checkpoints:
            for end in _pauses(job):
                driver.train(end, stop.requested)
                done, is_stopped = driver.ledger.num_closed, stop.requested()
                if done > job.first_step and (is_stopped or _is_due(job, done)):
                    self._save(checkpoints, done, self._peak_bytes(driver))
                if is_stopped:
                    checkpoints.wait()
                    raise StoppedError(f"after {done} of {job.num_steps} steps; {way_on(self._output_dir)}")
            if job.payload_sizes and done > job.first_step:
                layers = driver.times.medians()
                for line in slower_by_themselves(throttle, layers, job.payload_sizes, job.layout.num_shards):
                    listener.note(line)
            return self._steps, self._peak_bytes(driver)

    @contextmanager
    def _driver(self) -> Iterator[Driver]:
        job, folder = self._job, self._output_dir
        shard_of_unit = job.layout.shard_of_unit
        source = job.saved.folder.parent / METRICS if job.saved else None
        with (
            metrics_file(folder / METRICS, source=source, num_steps=job.first_step) as (earlier, metrics),
            (folder / "events.jsonl").open("w", encoding="utf-8") as events,
            trace_file(folder / "trace.json", shard_of_unit, num_steps=job.num_steps) as trace,
        ):
            self._steps = earlier

            def on_step(closed: ClosedStep) -> None:
                self._steps.append(closed.metrics)
                metrics.write(json.dumps(asdict(closed.metrics)) + "\n")
                trace.write(closed.timeline)
                self._listener.step(closed.metrics)
                if closed.metrics.grad_scale == 0.0:
                    self._listener.note(f"step {closed.metrics.step} is skipped: its loss or gradient is not finite")

            yield Driver(
                self._workers,
                POLICIES[job.config.policy](shard_of_unit, speculates=job.speculates, room=job.delta_room),
                job.learning_rates,
                on_step=on_step,
                first_step=job.first_step,
                event_log=EventLog(
                    events, job.config.policy, shard_of_unit, speculates=job.speculates, room=job.delta_room
                ),
            )

    def _peak_bytes(self, driver: Driver) -> int | None:
        return driver.ledger.peak_device_bytes or (self._job.saved.peak_device_bytes if self._job.saved else None)

    def _save(self, checkpoints: Checkpoints, done: int, peak_bytes: int | None) -> None:
        job = self._job
        start_s = time.monotonic()
        saved = SavedRun(
            folder=self._output_dir / f"checkpoint-{done}",
            step=done,
            config=asdict(job.resolved_config),
            device=job.device,
            staleness=job.staleness,
            data_digest=job.data_digest,
            eval_before=self._eval_before,
            sample_before=self._sample_before,
            peak_device_bytes=peak_bytes,
        )
        history = [
            {"step": step.step, "loss": step.loss, "grad_norm": step.grad_norm, "learning_rate": step.learning_rate}
            for step in self._steps
        ]
        trainer = {  # fields of transformers.TrainerState
            "global_step": done,
            "max_steps": job.num_steps,
            "save_steps": job.config.save_steps,
            "train_batch_size": job.config.per_device_train_batch_size,
            "log_history": history,
        }
        checkpoints.save(done, self._workers.save_state, trainer, saved.facts())
        self._listener.note(f"{saved.folder.name}: training paused for {time.monotonic() - start_s:.2f} s")


def _is_due(job: Job, done: int) -> bool:
    return job.config.save_steps > 0 and done % job.config.save_steps == 0


def _pauses(job: Job) -> list[int]:
    """The numbers of steps after which training pauses for a checkpoint, or for good."""
    due = [done for done in range(job.first_step + 1, job.num_steps) if _is_due(job, done)]
    return [*due, job.num_steps]
