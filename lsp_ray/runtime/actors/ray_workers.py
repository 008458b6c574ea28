"""RayWorkers: the GPUs and the shards as actors, and the slots and lanes to them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

from lsp_ray.device.switch import Takeover, takes_over
from lsp_ray.errors import DeadlineError, GpuLostError, WorkerLostError
from lsp_ray.optim.reproject import Reprojection
from lsp_ray.runtime.actors.decided import SetupReport
from lsp_ray.runtime.actors.gpu_actor import GpuActor
from lsp_ray.runtime.actors.gpu_pool import GpuPool
from lsp_ray.runtime.actors.keepers import Keepers
from lsp_ray.runtime.actors.places import Places
from lsp_ray.runtime.actors.shard_pool import ShardPool
from lsp_ray.runtime.actors.throttle import Throttle
from lsp_ray.runtime.drive.driver import Completion
from lsp_ray.runtime.drive.ledger import OpReport
from lsp_ray.runtime.prepare.job import Job
from lsp_ray.runtime.transport.lanes import NEWS, POLL_S, UPDATES, Lane, Watch
from lsp_ray.schedule.ops import Op
from lsp_ray.trace import WorkStream

COMPLETION_TIMEOUT_S = 900.0  # only a hang lasts so long: a dead actor shows at once


class RayWorkers:
    """See `Workers`. Ray must be running; leave by `close`.

    Args:
        job: The run.
        completion_timeout_s: How long nothing at all may happen.
        note: Told, in a line, of a shard that died and is replaced.
        shared: A folder that all machines see; None: there is one.

    Attributes:
        gpu_actor: Of whose kind the GPU actor is.
    """

    gpu_actor: ClassVar[type[GpuActor]] = GpuActor

    def __init__(
        self,
        job: Job,
        *,
        completion_timeout_s: float = COMPLETION_TIMEOUT_S,
        note: Callable[[str], None] = lambda _line: None,
        shared: Path | None = None,
    ) -> None:
        self._job = job
        self._completion_timeout_s = completion_timeout_s
        self._note = note
        self._watch = Watch()
        self._untold: WorkerLostError | None = None
        self._reprojections: dict[int, Sequence[Reprojection]] = {}  # unit -> those of its last payload
        self._places = places = Places(job)
        self._keepers = Keepers(job, places)
        self._gpus = GpuPool(job, self.gpu_actor, places, self._keepers, shared)
        self._shards: ShardPool | None = None
        try:
            self._shards = ShardPool(job, places, self._keepers, note) if job.payload_sizes else None
            self._gpus.open()
            self._look_around()
        except BaseException:
            self.close()
            raise

    # long calls, one at a time

    def setup(self, on_progress: Callable[[str], None]) -> SetupReport:
        """See `DeviceSide.setup`."""
        report = self._gpus.setup(on_progress)
        self._job = self._job.with_parts(report.gpu_of_part)
        self._keepers.keep_to(report.throttle)
        if self._shards is not None:
            self._shards.set_up(report.throttle)
        return report

    def keep_to(self, throttle: Throttle) -> None:
        """Between two steps: slow links and shards down to this from now on."""
        self._gpus.keep_to(throttle)
        self._keepers.keep_to(throttle)
        if self._shards is not None:
            self._shards.keep_to(throttle)

    def evaluate(self) -> dict[str, float]:
        """See `DeviceSide.evaluate`."""
        scores: dict[str, float] = self._gpus.first("evaluation", "evaluate")
        return scores

    def eval_loss(self) -> float:
        """See `DeviceSide.eval_loss`."""
        loss: float = self._gpus.first("evaluation", "eval_loss")
        return loss

    def sample(self) -> Sequence[float]:
        """See `DeviceSide.sample`."""
        numbers: Sequence[float] = self._gpus.first("sample answer", "sample")
        return numbers

    def save(self, folder: Path) -> None:
        """See `DeviceSide.save`."""
        # absolute: an actor's working directory need not be this process's
        self._gpus.first("save", "save", str(folder.absolute()))

    def save_state(self, folder: Path) -> None:
        """See `DeviceSide.save_state`. All actors write at once."""
        self._gpus.check_alike()
        path = str(folder.absolute())
        if self._shards is not None:
            self._shards.save(path)
        self._gpus.first("save", "save_state", path)
        if self._shards is not None:
            self._shards.wait()

    def take_weights(self, checkpoint: Path) -> None:
        """See `DeviceSide.take_weights`."""
        self._gpus.first("weights of a checkpoint", "take_weights", str(checkpoint.absolute()))

    # the driver's seam

    def start_step(self, step: int) -> None:
        """See `Workers`."""
        self._gpus.start_step(step)

    def drain(self) -> None:
        """See `Workers`."""
        self._gpus.drain()

    def launch(self, op: Op, grad_scale: float = 1.0) -> None:
        """See `Workers`."""
        match op.stream:
            case WorkStream.D2H:
                self._gpus.send(self._job.layout.gpu_of_part[op.part], op.step, op.layer, op.part)
            case WorkStream.H2D:
                self._gpus.prefetch(op.part, op.step, op.layer, is_void=grad_scale == 0.0)
            case _:
                self._shard_pool.update(op, self._reprojections[op.layer], grad_scale)

    def forget(self, gpu: int) -> list[Completion]:
        """See `Workers`."""
        lanes = self._gpus.forget(gpu)
        self._look_around()
        return [completion for lane in lanes for completion in self._left_in(lane)]

    def can_replace(self, gpu: int, step: int) -> bool:
        """See `Workers`. What is learned of projectors is on the first GPU alone; who takes over is told once."""
        every = self._job.config.lsp.check_every if self._job.config.method == "lsp" else 0
        is_learning = bool(every) and step >= every and step % every <= every // 2
        is_told = bool(every) and any(takes_over(at, every) for at in (step, step + 1))
        return not self._job.staleness and not is_told and not (gpu == 0 and is_learning)

    def is_idle(self) -> bool:
        """See `Workers`."""
        lanes = [*self._gpus.copying, *(self._shards.lanes if self._shards is not None else ())]
        return not any(lane.owed for lane in lanes)

    def replace(self, gpu: int, step: int) -> None:
        """See `Workers`."""
        before = self._places.gpus[gpu]
        self._gpus.replace(gpu, step)
        self._look_around()
        after = self._places.gpus[gpu]
        where = "" if after == before else f" by one on {after.name}, as {before.name} does not answer,"
        self._note(f"{self._job.layout.name_of(gpu)} is replaced{where} in step {step + 1}, and no step is lost")

    def start_again(self, gpu: int, steps: range, *, drains: bool) -> None:
        """See `Workers`."""
        self._gpus.start_again(gpu, steps, drains=drains)

    def next_completions(self) -> list[Completion]:
        """See `Workers`."""
        if self._untold is not None:
            untold, self._untold = self._untold, None
            raise untold
        deadline_s = time.monotonic() + self._completion_timeout_s
        while True:
            ready = self._watch.wait(min(POLL_S, self._completion_timeout_s))
            completions = self._received(ready or [lane for lane in self._watch.lanes if lane.has_ended()])
            if completions:
                return completions
            if time.monotonic() >= deadline_s:
                pending = ", ".join(sorted(owed for lane in self._watch.lanes for owed in lane.owes()))
                raise DeadlineError(f"nothing happened for {self._completion_timeout_s:.0f} s; waiting for {pending}")

    def _look_around(self) -> None:
        """Wait for the lanes that there are now."""
        self._watch.turn_to([*self._gpus.lanes, *(self._shards.lanes if self._shards is not None else ())])

    def _received(self, lanes: Sequence[Lane]) -> list[Completion]:
        completions: list[Completion] = []
        for lane in lanes:
            try:
                completions += self._told(lane)
                while lane.holds_more and lane in self._watch.lanes:  # what is revived says all of it again
                    completions += self._told(lane)
            except WorkerLostError as error:
                loss = self._loss(lane, error)
                if not completions:
                    raise loss  # noqa: B904 - it names its cause
                self._untold = loss  # what has come is not lost with it, which is told the next time
                break
        return completions

    def _loss(self, lane: Lane, error: WorkerLostError) -> WorkerLostError:
        """What is to be told of a lane whose actor, or one that it needs, is lost."""
        gpu = self._gpus.gpu_of(lane)
        if gpu is None or self._job.layout.num_gpus == 1:
            return error
        loss = GpuLostError(str(error), gpu)
        loss.__cause__ = error
        return loss

    def _told(self, lane: Lane) -> list[Completion]:
        if lane.name == NEWS:
            news = lane.message()
            if isinstance(news, Takeover):
                self._gpus.take(news)
                return []
            return [news]
        if lane.name == UPDATES:
            try:
                return [self._shard_pool.updated(lane)]
            except WorkerLostError as error:
                self._shard_pool.revive(lane, error)
                self._look_around()
                return []
        return self._answered(lane)

    def _left_in(self, lane: Lane) -> list[Completion]:
        """What came on a lane before its other end was lost."""
        found: list[Completion] = []
        with suppress(WorkerLostError):
            while lane.has_message():
                found += self._answered(lane) if lane.owed else [lane.message()]
        return [completion for completion in found if not isinstance(completion, Takeover)]

    def _answered(self, lane: Lane) -> list[Completion]:
        result = lane.answer()
        if isinstance(result, OpReport) and result.span.stream is WorkStream.D2H and result.span.part == 0:
            self._reprojections[result.span.layer] = result.reprojections
        return [] if result is None else [result]  # none: the last deltas have come up

    def close(self) -> None:
        """End the actors; what they held is lost."""
        self._watch.close()
        self._gpus.close()
        if self._shards is not None:
            self._shards.close()
        self._keepers.close()

    @property
    def _shard_pool(self) -> ShardPool:
        assert self._shards is not None, "nothing leaves the device"
        return self._shards
