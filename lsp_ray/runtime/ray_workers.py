"""RayWorkers: the device and the shards as actors, and the slots between them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import ray

from lsp_ray.device.step_report import StepReport
from lsp_ray.errors import DeadlineError, WorkerLostError
from lsp_ray.optim.reproject import Reprojection
from lsp_ray.optim.sums import SummedPart
from lsp_ray.runtime.answers import answer
from lsp_ray.runtime.device_side import SetupReport
from lsp_ray.runtime.driver import Completion
from lsp_ray.runtime.gpu_actor import CONCURRENCY_GROUPS, GpuActor
from lsp_ray.runtime.job import Job
from lsp_ray.runtime.ledger import OpReport
from lsp_ray.runtime.shard_pool import START_TIMEOUT_S, ShardPool, new_pair
from lsp_ray.runtime.throttle import Throttle
from lsp_ray.schedule.ops import Op
from lsp_ray.trace import Span, WorkStream

COMPLETION_TIMEOUT_S = 900.0  # only a hang lasts so long: a dead actor shows at once
POLL_S = 1.0  # of the long poll for news, and of the progress of long calls


@cache
def _actor_class() -> Any:
    """Made once, as `shard_pool`'s is."""
    return ray.remote(concurrency_groups=CONCURRENCY_GROUPS)(GpuActor)  # type: ignore[call-overload]


class RayWorkers:
    """See `Workers`. Ray must be running; leave by `close`.

    Args:
        job: The run.
        completion_timeout_s: How long nothing at all may happen.
    """

    def __init__(self, job: Job, *, completion_timeout_s: float = COMPLETION_TIMEOUT_S) -> None:
        self._job = job
        self._completion_timeout_s = completion_timeout_s
        self._pending: dict[ray.ObjectRef[Any], str] = {}
        self._reprojections: dict[int, Sequence[Reprojection]] = {}  # unit -> those of its last payload
        self._updates: dict[ray.ObjectRef[Any], _Update] = {}  # those of `_pending`
        sums: Sequence[Sequence[SummedPart] | None] = job.sums or [None] * len(job.payload_sizes)
        pairs = [
            new_pair(unit, numel, job.codec, parts)
            for unit, (numel, parts) in enumerate(zip(job.payload_sizes, sums, strict=True))
        ]
        self._gpu: Any = (
            _actor_class().options(num_cpus=1, num_gpus=int(job.device == "cuda"), max_restarts=0).remote(job, pairs)
        )
        try:
            self._shards = ShardPool(job, pairs) if pairs else None
        except BaseException:
            ray.kill(self._gpu)
            raise

    # long calls of the GPU actor, one at a time

    def setup(self, on_progress: Callable[[str], None]) -> SetupReport:
        """See `DeviceSide.setup`."""
        ref = self._gpu.setup.remote()
        said = ""
        while not ray.wait([ref], timeout=POLL_S)[0]:
            now = answer(self._gpu.progress.remote(), "gpu: progress", START_TIMEOUT_S)
            if now and now != said:
                on_progress(now)
                said = now
        report: SetupReport = answer(ref, "gpu: setup")
        if self._shards is not None:
            self._shards.set_up(report.throttle)
        return report

    def keep_to(self, throttle: Throttle) -> None:
        """Between two steps: slow link and shards down to this from now on."""
        answer(self._gpu.keep_to.remote(throttle), "gpu: throttle")
        if self._shards is not None:
            self._shards.keep_to(throttle)

    def evaluate(self) -> dict[str, float]:
        """See `DeviceSide.evaluate`."""
        scores: dict[str, float] = answer(self._gpu.evaluate.remote(), "gpu: evaluation")
        return scores

    def eval_loss(self) -> float:
        """See `DeviceSide.eval_loss`."""
        loss: float = answer(self._gpu.eval_loss.remote(), "gpu: evaluation")
        return loss

    def sample(self) -> Sequence[float]:
        """See `DeviceSide.sample`."""
        numbers: Sequence[float] = answer(self._gpu.sample.remote(), "gpu: sample answer")
        return numbers

    def save(self, folder: Path) -> None:
        """See `DeviceSide.save`."""
        # absolute: an actor's working directory need not be this process's
        answer(self._gpu.save.remote(str(folder.absolute())), "gpu: save")

    def save_state(self, folder: Path) -> None:
        """See `DeviceSide.save_state`. All actors write at once."""
        path = str(folder.absolute())
        calls = {"gpu: save": self._gpu.save_state.remote(path)}
        if self._shards is not None:
            calls |= self._shards.save(path)
        for what, call in calls.items():
            answer(call, what)

    def take_weights(self, checkpoint: Path) -> None:
        """See `DeviceSide.take_weights`."""
        answer(self._gpu.take_weights.remote(str(checkpoint.absolute())), "gpu: weights of a checkpoint")

    # the driver's seam

    def start_step(self, step: int) -> None:
        """See `Workers`."""
        if step == self._job.first_step and self._shards:
            self._poll_news()
        self._pending[self._gpu.run_step.remote(step)] = f"gpu: step {step}"

    def drain(self) -> None:
        """See `Workers`."""
        self._pending[self._gpu.drain.remote()] = "gpu: the last deltas"

    def launch(self, op: Op, grad_scale: float = 1.0) -> None:
        """See `Workers`."""
        match op.stream:
            case WorkStream.D2H:
                ref, who = self._gpu.send.remote(op.step, op.layer), "gpu: send"
            case WorkStream.H2D:
                ref, who = self._gpu.prefetch.remote(op.step, op.layer), "gpu: prefetch"
            case _:
                reprojections = self._reprojections[op.layer]
                self._update(_Update(op=op, reprojections=reprojections, grad_scale=grad_scale))
                return
        self._pending[ref] = f"{who} of unit {op.layer}, step {op.step}"

    def next_completions(self) -> list[Completion]:
        """See `Workers`."""
        deadline_s = time.monotonic() + self._completion_timeout_s
        completions: list[Completion] = []
        while not completions:
            waiting = list(self._pending)
            ray.wait(waiting, timeout=max(0.0, deadline_s - time.monotonic()))
            done, _ = ray.wait(waiting, num_returns=len(waiting), timeout=0)  # all that are there by now
            for ref in done:
                if ref in self._pending:  # else it was asked for again meanwhile
                    completions += self._received(ref)
            if not completions and time.monotonic() >= deadline_s:
                pending = ", ".join(sorted(self._pending.values()))
                raise DeadlineError(f"nothing happened for {self._completion_timeout_s:.0f} s; waiting for {pending}")
        return completions

    def _received(self, ref: ray.ObjectRef[Any]) -> list[Completion]:
        try:
            result = answer(ref, self._pending[ref])
        except WorkerLostError as error:
            if ref not in self._updates:
                raise
            self._revive(self._updates[ref].op, error)
            return []
        del self._pending[ref]
        return self._completions(ref, result)

    def _completions(self, ref: ray.ObjectRef[Any], result: object) -> list[Completion]:
        match result:
            case OpReport():
                if result.span.stream is WorkStream.D2H:
                    self._reprojections[result.span.layer] = result.reprojections
                return [result]
            case StepReport():
                return [result]
            case Span():
                self._shard_pool.updated(self._updates.pop(ref).op)
                return [OpReport(span=result)]
            case None:  # drained
                return []
            case list():  # gradients and deltas that are due, or none for a while
                self._poll_news()
                return result
        raise AssertionError(f"an actor answered {result!r}")

    def close(self) -> None:
        """End the actors; what they held is lost."""
        ray.kill(self._gpu)
        if self._shards is not None:
            self._shards.close()
        self._pending.clear()  # with the slots' references gone, the store has room for another run's

    @property
    def _shard_pool(self) -> ShardPool:
        assert self._shards is not None, "nothing leaves the device"
        return self._shards

    def _update(self, update: _Update) -> None:
        op = update.op
        ref = self._shard_pool.update(op, update.reprojections, update.grad_scale)
        self._updates[ref] = update
        self._pending[ref] = f"shard {self._shard_pool.index_of(op)}: update of unit {op.layer}, step {op.step}"

    def _revive(self, op: Op, error: WorkerLostError) -> None:
        """Replace the shard that owed this update, and ask again for all that it owed, in the same order."""
        index = self._shard_pool.index_of(op)
        owed = {ref: update for ref, update in self._updates.items() if self._shard_pool.index_of(update.op) == index}
        for ref in owed:
            del self._updates[ref], self._pending[ref]
        self._shard_pool.revive(index, error)
        for update in owed.values():
            self._update(update)

    def _poll_news(self) -> None:
        self._pending[self._gpu.next_news.remote(POLL_S)] = "gpu: news"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Update:
    """What a shard was asked for, kept until it is done."""

    op: Op
    reprojections: Sequence[Reprojection]
    grad_scale: float
