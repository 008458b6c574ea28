"""ThreadWorkers: the same run with threads of this process in the actors' place. What Ray costs is the difference."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from lsp_ray.device.token_bucket import TokenBucket
from lsp_ray.device.worker import StepReport
from lsp_ray.errors import WorkerLostError
from lsp_ray.methods.lsp_shard import carry_over, whiten
from lsp_ray.optim.shard import OptimizerShard
from lsp_ray.projection.reproject import Reprojection
from lsp_ray.runtime.device_side import DeviceSide, SetupReport
from lsp_ray.runtime.driver import Completion
from lsp_ray.runtime.job import Job
from lsp_ray.runtime.ledger import OpReport
from lsp_ray.schedule.ops import Op
from lsp_ray.trace import Span, WorkStream


class ThreadWorkers:
    """See `Workers`; has the methods of RayWorkers. One thread for each lane.

    Args:
        job: The run.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._completions: queue.SimpleQueue[Completion | BaseException] = queue.SimpleQueue()
        self.side = DeviceSide(job, self._completions.put)
        self._down = [torch.empty(numel) for numel in job.payload_sizes]
        self._up = [torch.empty(numel) for numel in job.payload_sizes]
        self._buckets: list[TokenBucket | None] = [None] * job.layout.num_shards
        self._reprojections: dict[int, Sequence[Reprojection]] = {}
        layout = job.layout
        self._shards = [
            OptimizerShard({unit: job.payload_sizes[unit] for unit in layout.units_of(index)})
            for index in range(layout.num_shards)
        ]
        self._compute, self._d2h, self._h2d = (ThreadPoolExecutor(1, name) for name in ("compute", "d2h", "h2d"))
        self._cpu = [ThreadPoolExecutor(1, f"shard-{index}") for index in range(layout.num_shards)]

    def setup(self, on_progress: Callable[[str], None]) -> SetupReport:
        """See `DeviceSide.setup`; progress is not told."""
        report = self._compute.submit(self.side.setup, (*self._down, *self._up)).result()
        num_shards = self._job.layout.num_shards
        self._buckets = [report.throttle.shard(num_shards) for _ in range(num_shards)]
        if self._job.whitens:
            projectors = self.side.projectors()
            for unit, index in enumerate(self._job.layout.shard_of_unit):
                whiten(self._shards[index], unit, projectors[unit])
        return report

    def evaluate(self) -> float:
        """See `DeviceSide.evaluate`."""
        return self._compute.submit(self.side.evaluate).result()

    def sample(self) -> list[int]:
        """See `DeviceSide.sample`."""
        return self._compute.submit(self.side.sample).result()

    def save(self, folder: Path) -> None:
        """See `DeviceSide.save`."""
        self._compute.submit(self.side.save, folder).result()

    def start_step(self, step: int) -> None:
        """See `Workers`."""
        self._report(self._compute.submit(self.side.run_step, step, (*self._down, *self._up)))

    def launch(self, op: Op) -> None:
        """See `Workers`."""
        match op.stream:
            case WorkStream.D2H:
                future = self._d2h.submit(self._send, op)
            case WorkStream.H2D:
                future = self._h2d.submit(self._prefetch, op)
            case _:
                future = self._cpu[self._job.layout.shard_of_unit[op.layer]].submit(self._update, op)
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

    def _send(self, op: Op) -> OpReport:
        slot = self._down[op.layer]
        span, reprojections = self.side.worker.send(op.step, op.layer, slot)
        self._reprojections[op.layer] = reprojections  # read by this layer's next update, which this copy precedes
        return OpReport(span=span, size_bytes=slot.nbytes, reprojections=reprojections)

    def _prefetch(self, op: Op) -> OpReport:
        slot = self._up[op.layer]
        return OpReport(span=self.side.worker.prefetch(op.step, op.layer, slot), size_bytes=slot.nbytes)

    def _update(self, op: Op) -> OpReport:
        start_s = time.monotonic()
        index = self._job.layout.shard_of_unit[op.layer]
        shard, bucket = self._shards[index], self._buckets[index]
        learning_rate = self._job.learning_rates[op.step]
        carry_over(shard, op.layer, self._reprojections[op.layer])
        square_sum = shard.update(op.layer, self._down[op.layer], self._up[op.layer], learning_rate=learning_rate)
        if bucket is not None:
            bucket.take(self._down[op.layer].numel(), start_s=start_s)
        span = Span(stream=op.stream, step=op.step, layer=op.layer, start_s=start_s, end_s=time.monotonic())
        return OpReport(span=span, grad_square_sum=float(square_sum))

    def _report(self, future: Future[StepReport] | Future[OpReport]) -> None:
        def put(done: Future[StepReport] | Future[OpReport]) -> None:
            if not done.cancelled():
                self._completions.put(done.exception() or done.result())

        future.add_done_callback(put)
