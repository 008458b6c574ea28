"""Persistence: a run that loses its GPU actor starts again from its last checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from lsp_ray.errors import RayLostError, StoppedError, WorkerLostError
from lsp_ray.runtime.checkpoints.checkpoint import checkpoints, way_on
from lsp_ray.runtime.cluster.malloc_arenas import give_back_free
from lsp_ray.runtime.cluster.own_raylet import GONE, when_raylet_ends
from lsp_ray.runtime.fine_tune import Summary, fine_tune
from lsp_ray.runtime.prepare.job import Job, resumed
from lsp_ray.runtime.training import FineTuneWorkers, Listener, Stop
from lsp_ray.trace import StepMetrics

MAX_LOSSES_IN_A_ROW = 3


class ClosableWorkers(FineTuneWorkers, Protocol):
    """Workers that hold processes."""

    def close(self) -> None:
        """End them; what they held is lost."""
        ...


def fine_tune_persistently(
    job: Job,
    new_workers: Callable[[Job], ClosableWorkers],
    output_dir: Path,
    listener: Listener,
    decode: Callable[[Sequence[float]], str],
    stop: Stop,
    laid_out: Callable[[Job], Job] = lambda job: job,
) -> Summary:
    """See `fine_tune`. `laid_out` fits the job to what is left where an actor was lost.

    Steps depend on the job and on nothing else, so those that are made again give the same bits.

    Raises:
        WorkerLostError: Workers were lost several times in a row, without a step further than before.
        RayLostError: Ray itself was, on this machine.
        StoppedError: Someone asked for it.
    """
    told: list[str] = []

    def tell() -> None:
        told.append(f"{GONE}; {way_on(output_dir)}")
        listener.note(f"failed: {told[0]}")

    with when_raylet_ends(tell):
        try:
            return _persistently(job, new_workers, output_dir, listener, decode, stop, laid_out)
        except RayLostError as error:
            lost = RayLostError(f"{error}; {way_on(output_dir)}")
            lost.told = "".join(told)
            raise lost from error


def _persistently(
    job: Job,
    new_workers: Callable[[Job], ClosableWorkers],
    output_dir: Path,
    listener: Listener,
    decode: Callable[[Sequence[float]], str],
    stop: Stop,
    laid_out: Callable[[Job], Job],
) -> Summary:
    watched = _Watched(listener)
    num_losses = furthest = 0
    while True:
        try:
            return _attempt(job, new_workers, output_dir, watched, decode, stop)
        except WorkerLostError as error:
            num_losses = 1 if watched.furthest > furthest else num_losses + 1
            furthest = watched.furthest
            if num_losses >= MAX_LOSSES_IN_A_ROW:
                raise WorkerLostError(f"{error}, {num_losses} times in a row; {way_on(output_dir)}") from error
            if stop.requested():
                raise StoppedError(f"as {error}; {way_on(output_dir)}") from error
            saved = list(checkpoints(output_dir).values())
            whence = "" if saved or job.saved is not None else " from the beginning, as there is no checkpoint yet"
            listener.note(f"{error}; starting again{whence}")
        job = laid_out(resumed(replace(job, saved=None), saved[-1]) if saved else job)


def _attempt(
    job: Job,
    new_workers: Callable[[Job], ClosableWorkers],
    output_dir: Path,
    listener: Listener,
    decode: Callable[[Sequence[float]], str],
    stop: Stop,
) -> Summary:
    workers = new_workers(job)
    try:
        return fine_tune(job, workers, output_dir, listener, decode, stop)
    except KeyboardInterrupt:
        raise StoppedError(f"at once; {way_on(output_dir)}") from None
    finally:
        workers.close()
        give_back_free()


class _Watched:
    """A listener that passes everything on and remembers the furthest step."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self.furthest = 0

    def note(self, text: str) -> None:
        self._listener.note(text)

    def phase(self, text: str) -> None:
        self._listener.phase(text)

    def step(self, metrics: StepMetrics) -> None:
        self.furthest = max(self.furthest, metrics.step)
        self._listener.step(metrics)

    def saved(self, checkpoint: Path) -> None:
        self._listener.saved(checkpoint)

    def has_enough(self) -> bool:
        return self._listener.has_enough()
