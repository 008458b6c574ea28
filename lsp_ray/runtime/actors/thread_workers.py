"""ThreadWorkers: the same run with threads of this process in the actors' place. What Ray costs is the difference."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from lsp_ray.device.step_report import StepReport
from lsp_ray.device.switch import Takeover
from lsp_ray.device.token_bucket import TokenBucket
from lsp_ray.errors import WorkerLostError
from lsp_ray.optim.adamw import AdamWState
from lsp_ray.optim.moments_file import load_moments, save_moments
from lsp_ray.optim.reproject import Reprojection
from lsp_ray.optim.shard import OptimizerShard
from lsp_ray.runtime.actors.decided import SetupReport
from lsp_ray.runtime.actors.device_side import DeviceSide
from lsp_ray.runtime.actors.throttle import Throttle
from lsp_ray.runtime.actors.trained_parts import News
from lsp_ray.runtime.checkpoints.checkpoint import STATE, writing
from lsp_ray.runtime.checkpoints.saved_run import reading
from lsp_ray.runtime.drive.driver import Completion
from lsp_ray.runtime.drive.ledger import OpReport
from lsp_ray.runtime.prepare.job import Job
from lsp_ray.runtime.transport.slots import OpenSlots, new_slot
from lsp_ray.schedule.ops import Op
from lsp_ray.sim.store import singly
from lsp_ray.trace import Span, WorkStream


class ThreadWorkers:
    """See `Workers`; has the methods of RayWorkers. One thread for each lane.

    Args:
        job: The run.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._completions: queue.SimpleQueue[Completion | BaseException] = queue.SimpleQueue()
        assert job.layout.num_gpus == 1, "threads of one process are one GPU's"
        completions = self._completions

        def tell(news: News) -> None:  # no method: it would keep this object alive in a circle
            if not isinstance(news, Takeover):  # told where there are other GPUs
                completions.put(news)

        self.side = DeviceSide(job, tell)
        wires = [job.codec.wire_numel(numel) for numel in job.payload_sizes]
        dtype, parts = job.codec.dtype, range(job.config.replicas)
        self._slots = [
            OpenSlots(
                down={part: new_slot(numel, f"down {unit}", dtype) for part in parts},
                up=new_slot(numel, f"up {unit}", dtype),
            )
            for unit, numel in enumerate(wires)
        ]
        self._host_payloads = [slot.payload for own in self._slots for slot in (*own.down.values(), own.up)]
        self._buckets: list[TokenBucket | None] = [None] * job.layout.num_shards
        self._reprojections: dict[int, Sequence[Reprojection]] = {}
        self._before: dict[int, tuple[int, AdamWState]] = {}  # unit -> its last update's step, the state before it
        layout = job.layout
        self._shards = [
            OptimizerShard(
                {unit: job.payload_sizes[unit] for unit in layout.units_of(index)},
                codec=job.codec,
                sums=None if job.sums is None else dict(enumerate(job.sums)),
                weight_decay=job.config.weight_decay,
                parts=singly(parts),
            )
            for index in range(layout.num_shards)
        ]
        self._compute, self._d2h, self._h2d = (ThreadPoolExecutor(1, name) for name in ("compute", "d2h", "h2d"))
        self._cpu = [ThreadPoolExecutor(1, f"shard-{index}") for index in range(layout.num_shards)]

    def setup(self, on_progress: Callable[[str], None]) -> SetupReport:
        """See `DeviceSide.setup`; progress is not told."""
        report = self._compute.submit(self.side.setup, self._host_payloads).result()
        self.keep_to(report.throttle)
        if self._job.saved is not None and self._job.payload_sizes:
            with reading(self._job.saved.folder):
                for shard in self._shards:
                    load_moments(self._job.saved.moments, shard.states, num_updates=self._job.saved.step)
        if self._job.begins_with_updates:
            for unit, state in ((unit, state) for shard in self._shards for unit, state in shard.states.items()):
                assert state.total is not None
                self.side.copy_totals(unit, state.total)
        return report

    def keep_to(self, throttle: Throttle) -> None:
        """Between two steps: slow link and shards down to this from now on."""
        self._compute.submit(self.side.keep_to, throttle).result()
        num_shards = self._job.layout.num_shards
        self._buckets = [throttle.shard(num_shards) for _ in range(num_shards)]

    def evaluate(self) -> dict[str, float]:
        """See `DeviceSide.evaluate`."""
        return self._compute.submit(self.side.evaluate).result()

    def eval_loss(self) -> float:
        """See `DeviceSide.eval_loss`."""
        return self._compute.submit(self.side.eval_loss).result()

    def sample(self) -> Sequence[float]:
        """See `DeviceSide.sample`."""
        return self._compute.submit(self.side.sample).result()

    def save(self, folder: Path) -> None:
        """See `DeviceSide.save`."""
        self._compute.submit(self.side.save, folder).result()

    def save_state(self, folder: Path) -> None:
        """See `DeviceSide.save_state`."""
        self._compute.submit(self.side.save_state, folder).result()
        for index, shard in enumerate(self._shards if self._job.payload_sizes else []):
            with writing(folder):
                save_moments(folder / STATE / f"moments-{index}.safetensors", shard.states)

    def take_weights(self, checkpoint: Path) -> None:
        """See `DeviceSide.take_weights`."""
        self._compute.submit(self.side.take_weights, checkpoint).result()

    def start_step(self, step: int) -> None:
        """See `Workers`."""
        self._report(self._compute.submit(self.side.run_step, step, self._host_payloads))

    def drain(self) -> None:
        """See `Workers`."""
        self._report(self._compute.submit(self.side.drain))

    def launch(self, op: Op, grad_scale: float = 1.0) -> None:
        """See `Workers`."""
        match op.stream:
            case WorkStream.D2H:
                future = self._d2h.submit(self._send, op)
            case WorkStream.H2D:
                future = self._h2d.submit(self._prefetch, op, is_void=grad_scale == 0.0)
            case _:
                future = self._cpu[self._job.layout.shard_of_unit[op.layer]].submit(self._update, op, grad_scale)
        self._report(future)

    def next_completions(self) -> list[Completion]:
        """See `Workers`."""
        completion = self._completions.get()
        if isinstance(completion, BaseException):
            raise completion
        return [completion]

    def close(self) -> None:
        """End the threads, also one that waits for what will not come."""
        self.side.abandon(WorkerLostError("the run was given up"))
        for lane in (self._compute, self._d2h, self._h2d, *self._cpu):
            lane.shutdown(cancel_futures=True)
        self.side.close()

    def _send(self, op: Op) -> OpReport:
        slot = self._slots[op.layer].down[op.part]
        span, reprojections = self.side.worker.send(op.step, op.layer, slot.to_write(), op.part)
        slot.publish(op.step)
        if op.part == 0:
            self._reprojections[op.layer] = reprojections  # read by this layer's next update, which this copy precedes
        return OpReport(span=span, size_bytes=slot.payload.nbytes, reprojections=reprojections)

    def _prefetch(self, op: Op, *, is_void: bool) -> OpReport:
        payload = self._slots[op.layer].up.to_read(op.step)
        span = self.side.worker.prefetch(op.step, op.layer, payload, is_void=is_void)
        return OpReport(span=span, size_bytes=payload.nbytes)

    def _update(self, op: Op, grad_scale: float) -> OpReport:
        start_s = time.monotonic()
        index = self._job.layout.shard_of_unit[op.layer]
        shard, bucket = self._shards[index], self._buckets[index]
        learning_rate = self._job.learning_rates[op.step]
        own = self._slots[op.layer]
        gradients, up = own.gradients(op.step), own.up
        if self._job.speculates:
            self._begin_from_before(shard, op)
        shard.carry_over(op.layer, self._reprojections[op.layer])
        squares = shard.update(op.layer, gradients, up.to_write(), learning_rate=learning_rate, grad_scale=grad_scale)
        if bucket is not None:
            bucket.take(self._job.payload_sizes[op.layer], start_s=start_s)
        up.publish(op.step)
        span = Span(stream=op.stream, step=op.step, layer=op.layer, start_s=start_s, end_s=time.monotonic())
        return OpReport(span=span, square_sum=squares)

    def _begin_from_before(self, shard: OptimizerShard, op: Op) -> None:
        """Undo the step's update of this unit, if there was one already, and keep what it begins from."""
        state = shard.states[op.layer]
        made = self._before.get(op.layer)
        if made is not None and made[0] == op.step:
            state.copy_(made[1])
        else:
            self._before[op.layer] = op.step, state.clone()

    def _report(self, future: Future[StepReport] | Future[OpReport] | Future[None]) -> None:
        def put(done: Future[StepReport] | Future[OpReport] | Future[None]) -> None:
            if not done.cancelled() and (news := done.exception() or done.result()) is not None:
                self._completions.put(news)

        future.add_done_callback(put)
