"""Training: the steps of a run, and what is written while they go by."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Protocol

from lsp_ray.errors import StoppedError
from lsp_ray.output_folder import INTERNALS
from lsp_ray.runtime.actors.decided import SetupReport
from lsp_ray.runtime.actors.throttle import Throttle, slower_by_themselves
from lsp_ray.runtime.checkpoints.checkpoint import Checkpoints, way_on
from lsp_ray.runtime.checkpoints.saved_run import SavedRun
from lsp_ray.runtime.checkpoints.trainer_state import write_trainer_state
from lsp_ray.runtime.cluster.malloc_arenas import give_back_free
from lsp_ray.runtime.drive.driver import Driver, Workers
from lsp_ray.runtime.drive.event_log import EventLog
from lsp_ray.runtime.drive.ledger import ClosedStep
from lsp_ray.runtime.drive.step_judge import StepJudge
from lsp_ray.runtime.prepare.job import Job
from lsp_ray.runtime.watch.loss_watch import LossWatch
from lsp_ray.runtime.watch.metrics_file import METRICS, Sink, read_metrics
from lsp_ray.runtime.watch.sinks import open_sinks
from lsp_ray.runtime.watch.step_totals import StepTotals
from lsp_ray.schedule.policy import POLICIES
from lsp_ray.trace import StepMetrics
from lsp_ray.trace_file import TraceFile, trace_file


class FineTuneWorkers(Workers, Protocol):
    """Workers with the long calls around training."""

    def setup(self, on_progress: Callable[[str], None]) -> SetupReport:
        """See `DeviceSide.setup`."""
        ...

    def evaluate(self) -> dict[str, float]:
        """See `DeviceSide.evaluate`."""
        ...

    def eval_loss(self) -> float:
        """See `DeviceSide.eval_loss`."""
        ...

    def sample(self) -> Sequence[float]:
        """See `DeviceSide.sample`."""
        ...

    def save(self, folder: Path) -> None:
        """See `DeviceSide.save`."""
        ...

    def save_state(self, folder: Path) -> None:
        """See `DeviceSide.save_state`; the shards' part as well."""
        ...

    def take_weights(self, checkpoint: Path) -> None:
        """See `DeviceSide.take_weights`."""
        ...


class Stop(Protocol):
    """Who may ask a run to end early."""

    def deferred(self, on_request: Callable[[], None]) -> AbstractContextManager[None]:
        """Within the context asking interrupts nothing at first; `on_request` is called then, on any thread."""
        ...

    def requested(self) -> bool:
        """Whether someone has asked."""
        ...


class NeverStop:
    """See `Stop`."""

    def deferred(self, on_request: Callable[[], None]) -> AbstractContextManager[None]:
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

    def saved(self, checkpoint: Path) -> None:
        """This checkpoint is being finished beside the next steps."""
        ...

    def has_enough(self) -> bool:
        """Whether the run is to end after the steps under way, as a finished one."""
        ...


class StepLog:
    """Writes every closed step down and tells the listener.

    Args:
        sinks: Where metrics go.
        trace: trace.json, open.
        listener: Told of every step.
        totals: Given every step.
    """

    def __init__(self, sinks: Sequence[Sink], trace: TraceFile, listener: Listener, totals: StepTotals) -> None:
        self._sinks, self._trace, self._listener = sinks, trace, listener
        self.totals = totals
        self._watch = LossWatch()

    def write(self, closed: ClosedStep, eval_loss: float | None = None) -> None:
        """Write one, with the eval loss that was measured after it."""
        metrics = replace(closed.metrics, eval_loss=eval_loss)
        self.totals.add(metrics)
        for sink in self._sinks:
            sink(metrics)
        self._trace.write(closed.timeline)
        self._listener.step(metrics)
        if metrics.grad_scale == 0.0:
            self._listener.note(f"step {metrics.step} is skipped: its loss or gradient is not finite")
        for line in closed.notes:
            self._listener.note(line)
        warning = self._watch.warning(metrics.loss, metrics.learning_rate)
        if warning is not None:
            self._listener.note(warning)


class Training:
    """All steps, with their metrics, some traced, and the checkpoints between them.

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
        self._held: ClosedStep | None = None  # is written with the eval loss after it
        self._num_saved, self._saved_s = job.first_step, 0.0

    def run(self, throttle: Throttle, stop: Stop) -> tuple[StepTotals, int | None]:
        """Return what all steps add up to and the peak of device memory."""
        job, listener = self._job, self._listener
        listener.phase(f"training: {job.num_steps - job.first_step} steps")
        keep = job.config.save_total_limit
        with self._driver() as (driver, log), Checkpoints(self._output_dir, keep=keep) as checkpoints:
            done = job.first_step
            self._saved(done)
            while done < job.num_steps:
                driver.train(
                    _next_pause(job, done),
                    lambda: stop.requested() or listener.has_enough() or self._is_overdue(driver.ledger.num_closed),
                )
                start_s = time.monotonic()
                done, is_stopped = driver.ledger.num_closed, stop.requested()
                if self._held is not None:
                    self._evaluate(self._held, log)
                is_due = self._is_best(log.totals, checkpoints) or _is_due(job.config.save_steps, done)
                if done > job.first_step and (is_stopped or is_due or self._is_overdue(done)):
                    self._save(checkpoints, done, self._peak_bytes(driver))
                    self._saved(done)
                if is_stopped:
                    checkpoints.wait()
                    raise StoppedError(f"after {done} of {job.num_steps} steps; {way_on(self._output_dir)}")
                driver.ledger.add_pause(start_s, time.monotonic())
                if self._ends_early(log.totals):
                    break
            if job.payload_sizes and done > job.first_step:
                slower = slower_by_themselves(
                    throttle,
                    driver.times.medians(),
                    numel=sum(job.payload_sizes),
                    num_bytes=job.bytes_each_way,
                    num_shards=job.layout.num_shards,
                )
                for line in slower:
                    listener.note(line)
            return log.totals, self._peak_bytes(driver)

    def _is_best(self, totals: StepTotals, checkpoints: Checkpoints) -> bool:
        """Whether the weights of this moment are those to end with, as far as is known; their checkpoint is kept."""
        if not self._job.config.load_best_model_at_end or totals.best is None:
            return False
        checkpoints.protected = totals.best.step
        return totals.best.step == totals.last

    def _ends_early(self, totals: StepTotals) -> bool:
        patience = self._job.config.early_stopping_patience
        why = "a callback asked for it" if self._listener.has_enough() else ""
        if patience is not None and totals.num_without_gain >= patience:
            why = "eval loss has stopped falling"
        if why:
            self._listener.note(f"stopping early after {totals.last} steps: {why}")
        return bool(why)

    @contextmanager
    def _driver(self) -> Iterator[tuple[Driver, StepLog]]:
        job, folder = self._job, self._output_dir
        shard_of_unit = job.layout.shard_of_unit
        earlier = read_metrics(job.saved.folder.parent / METRICS, job.first_step) if job.saved else ()
        internals = folder / INTERNALS
        internals.mkdir(exist_ok=True)
        with (
            open_sinks(job.config, folder, earlier, first_step=job.first_step) as sinks,
            (internals / "events.jsonl").open("w", encoding="utf-8") as events,
            trace_file(
                internals / "trace.json",
                shard_of_unit,
                num_steps=job.num_steps,
                gpu_of_part=job.layout.gpu_of_part,
                has_link=job.inputs is not None,
                home_of_layer=job.layout.home_of_unit,
                homes=job.layout.homes,
            ) as trace,
        ):
            totals = StepTotals(measured=job.measured_step + 1)
            for metrics in read_metrics(folder / METRICS, job.first_step):
                totals.add(metrics)
            log = StepLog(sinks, trace, self._listener, totals)

            def on_step(closed: ClosedStep) -> None:
                if closed.metrics.step < job.num_steps and _is_due(job.config.eval_steps, closed.metrics.step):
                    self._held = closed
                else:
                    log.write(closed)

            layout = job.layout
            policy = POLICIES[job.config.policy](
                shard_of_unit,
                speculates=job.speculates,
                room=job.delta_room,
                gpu_of_part=layout.gpu_of_part,
                home_of_layer=layout.home_of_unit,
            )
            judge = StepJudge(
                len(job.payload_sizes),
                num_parts=len(layout.gpu_of_part),
                num_gpus=layout.num_gpus,
                max_grad_norm=job.config.max_grad_norm,
                skips=job.config.on_nonfinite == "skip",
                first_step=job.first_step,
            )
            driver = Driver(
                self._workers,
                policy,
                job.learning_rates,
                judge=judge,
                on_step=on_step,
                first_step=job.first_step,
                event_log=EventLog(events, job.config.policy, shard_of_unit, policy),
                gpus=[layout.name_of(gpu) for gpu in range(layout.num_gpus)],
            )
            yield driver, log

    def _saved(self, done: int) -> None:
        self._num_saved, self._saved_s = done, time.monotonic()

    def _is_overdue(self, done: int) -> bool:
        """Whether there are steps to save, and the last checkpoint was long ago."""
        minutes = self._job.config.save_minutes
        return 0 < minutes <= (time.monotonic() - self._saved_s) / 60 and done > self._num_saved

    def _peak_bytes(self, driver: Driver) -> int | None:
        return driver.ledger.peak_device_bytes or (self._job.saved.peak_device_bytes if self._job.saved else None)

    def _evaluate(self, closed: ClosedStep, log: StepLog) -> None:
        """In a pause: all deltas are up, so that nothing is in the way of the steps to come."""
        step = closed.metrics.step
        self._listener.phase(f"evaluating after {step} steps")
        loss = self._workers.eval_loss()
        self._held = None
        log.write(closed, loss)
        self._listener.note(f"eval loss after {step} steps: {loss:.4f}")

    def _save(self, checkpoints: Checkpoints, done: int, peak_bytes: int | None) -> None:
        job, start_s = self._job, time.monotonic()
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
        trainer = {  # fields of transformers.TrainerState
            "global_step": done,
            "max_steps": job.num_steps,
            "save_steps": job.config.save_steps,
            "train_batch_size": job.config.per_device_train_batch_size,
        }

        def write_log(staging: Path) -> None:
            write_trainer_state(staging, trainer, read_metrics(self._output_dir / METRICS, done))

        checkpoints.save(done, self._workers.save_state, write_log, saved.facts())
        give_back_free()
        self._listener.note(f"{saved.folder.name}: training paused for {time.monotonic() - start_s:.2f} s")
        self._listener.saved(saved.folder)


def _is_due(every: int, done: int) -> bool:
    return every > 0 and done % every == 0


def _next_pause(job: Job, done: int) -> int:
    """The number of steps after which training pauses next for a checkpoint or an evaluation, or for good."""
    reasons = (job.config.save_steps, job.config.eval_steps)
    return min([job.num_steps, *(done + every - done % every for every in reasons if every > 0)])
