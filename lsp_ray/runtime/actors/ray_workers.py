"""RayWorkers: the device and the shards as actors, and the slots and lanes to them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, ClassVar

import ray

from lsp_ray.errors import DeadlineError, WorkerLostError
from lsp_ray.optim.reproject import Reprojection
from lsp_ray.optim.sums import SummedPart
from lsp_ray.runtime.actors.device_side import SetupReport
from lsp_ray.runtime.actors.gpu_actor import COMPUTE, CONCURRENCY_GROUPS, D2H, H2D, LANES, NEWS, GpuActor
from lsp_ray.runtime.actors.shard_pool import ShardPool
from lsp_ray.runtime.actors.throttle import Throttle
from lsp_ray.runtime.drive.driver import Completion
from lsp_ray.runtime.drive.ledger import OpReport
from lsp_ray.runtime.prepare.job import Job
from lsp_ray.runtime.transport.answers import answer
from lsp_ray.runtime.transport.lanes import POLL_S, START_TIMEOUT_S, Lane, Order, actor_class, open_lanes
from lsp_ray.runtime.transport.unit_slots import new_unit_slots
from lsp_ray.schedule.ops import Op
from lsp_ray.trace import WorkStream

COMPLETION_TIMEOUT_S = 900.0  # only a hang lasts so long: a dead actor shows at once


class RayWorkers:
    """See `Workers`. Ray must be running; leave by `close`.

    Args:
        job: The run.
        completion_timeout_s: How long nothing at all may happen.
        note: Told, in a line, of a shard that died and is replaced.

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
    ) -> None:
        self._job = job
        self._completion_timeout_s = completion_timeout_s
        self._reprojections: dict[int, Sequence[Reprojection]] = {}  # unit -> those of its last payload
        sums: Sequence[Sequence[SummedPart] | None] = job.sums or [None] * len(job.payload_sizes)
        slots = [
            new_unit_slots(unit, numel, job.codec, parts, job.config.num_replicas)
            for unit, (numel, parts) in enumerate(zip(job.payload_sizes, sums, strict=True))
        ]
        actor = actor_class(self.gpu_actor, **CONCURRENCY_GROUPS).options(  # type: ignore[arg-type]  # classes are hashable
            num_cpus=1, num_gpus=int(job.device == "cuda"), max_restarts=0
        )
        self._gpu: Any = actor.remote(job, slots)
        self._shards: ShardPool | None = None
        self._lanes: dict[str, Lane] = {}
        try:
            self._shards = ShardPool(job, slots, note) if slots else None
            self._lanes = open_lanes(self._gpu, "gpu", LANES)
        except BaseException:
            self.close()
            raise

    # long calls of the GPU actor, one at a time

    def setup(self, on_progress: Callable[[str], None]) -> SetupReport:
        """See `DeviceSide.setup`."""
        said = ""

        def tell_progress() -> None:
            nonlocal said
            now = answer(self._gpu.progress.remote(), "gpu: progress", START_TIMEOUT_S)
            if now and now != said:
                on_progress(now)
                said = now

        report: SetupReport = self._lanes[COMPUTE].call("gpu: setup", "setup", meanwhile=tell_progress)
        if self._shards is not None:
            self._shards.set_up(report.throttle)
        return report

    def keep_to(self, throttle: Throttle) -> None:
        """Between two steps: slow link and shards down to this from now on."""
        self._lanes[COMPUTE].call("gpu: throttle", "keep_to", throttle)
        if self._shards is not None:
            self._shards.keep_to(throttle)

    def evaluate(self) -> dict[str, float]:
        """See `DeviceSide.evaluate`."""
        scores: dict[str, float] = self._lanes[COMPUTE].call("gpu: evaluation", "evaluate")
        return scores

    def eval_loss(self) -> float:
        """See `DeviceSide.eval_loss`."""
        loss: float = self._lanes[COMPUTE].call("gpu: evaluation", "eval_loss")
        return loss

    def sample(self) -> Sequence[float]:
        """See `DeviceSide.sample`."""
        numbers: Sequence[float] = self._lanes[COMPUTE].call("gpu: sample answer", "sample")
        return numbers

    def save(self, folder: Path) -> None:
        """See `DeviceSide.save`."""
        # absolute: an actor's working directory need not be this process's
        self._lanes[COMPUTE].call("gpu: save", "save", str(folder.absolute()))

    def save_state(self, folder: Path) -> None:
        """See `DeviceSide.save_state`. All actors write at once."""
        path = str(folder.absolute())
        if self._shards is not None:
            self._shards.save(path)
        self._lanes[COMPUTE].call("gpu: save", "save_state", path)
        if self._shards is not None:
            self._shards.wait()

    def take_weights(self, checkpoint: Path) -> None:
        """See `DeviceSide.take_weights`."""
        self._lanes[COMPUTE].call("gpu: weights of a checkpoint", "take_weights", str(checkpoint.absolute()))

    # the driver's seam

    def start_step(self, step: int) -> None:
        """See `Workers`."""
        self._lanes[COMPUTE].order(Order(what=f"gpu: step {step}", method="run_step", args=(step,)))

    def drain(self) -> None:
        """See `Workers`."""
        self._lanes[COMPUTE].order(Order(what="gpu: the last deltas", method="drain", args=()))

    def launch(self, op: Op, grad_scale: float = 1.0) -> None:
        """See `Workers`."""
        match op.stream:
            case WorkStream.D2H:
                lane, method, more = self._lanes[D2H], "send", op.part
            case WorkStream.H2D:
                lane, method, more = self._lanes[H2D], "prefetch", grad_scale == 0.0
            case _:
                self._shard_pool.update(op, self._reprojections[op.layer], grad_scale)
                return
        what = f"gpu: {method} of unit {op.layer}, step {op.step}"
        lane.order(Order(what=what, method=method, args=(op.step, op.layer, more)))

    def next_completions(self) -> list[Completion]:
        """See `Workers`."""
        deadline_s = time.monotonic() + self._completion_timeout_s
        while True:
            lanes = [*self._lanes.values(), *(self._shards.lanes if self._shards is not None else ())]
            ready: list[Any] = wait(lanes, min(POLL_S, max(0.0, deadline_s - time.monotonic())))
            ready = ready or [lane for lane in lanes if lane.has_ended()]
            completions = [completion for lane in ready for completion in self._received(lane)]
            if completions:
                return completions
            if time.monotonic() >= deadline_s:
                pending = ", ".join(sorted(order.what for lane in lanes for order in lane.owed))
                raise DeadlineError(f"nothing happened for {self._completion_timeout_s:.0f} s; waiting for {pending}")

    def _received(self, lane: Lane) -> list[Completion]:
        if lane is self._lanes[NEWS]:
            return [lane.message()]
        if lane not in self._lanes.values():
            try:
                return [self._shard_pool.updated(lane)]
            except WorkerLostError as error:
                self._shard_pool.revive(lane, error)
                return []
        result = lane.answer()
        if isinstance(result, OpReport) and result.span.stream is WorkStream.D2H and result.span.part == 0:
            self._reprojections[result.span.layer] = result.reprojections
        return [] if result is None else [result]  # none: the last deltas have come up

    def close(self) -> None:
        """End the actors; what they held is lost."""
        ray.kill(self._gpu)
        for lane in self._lanes.values():
            lane.close()
        if self._shards is not None:
            self._shards.close()

    @property
    def _shard_pool(self) -> ShardPool:
        assert self._shards is not None, "nothing leaves the device"
        return self._shards
