"""GpuActor: a thin shell that gives DeviceSide an inbox for each of its threads."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import ray

from lsp_ray.device.step_report import StepReport
from lsp_ray.runtime.device_side import DeviceSide, SetupReport
from lsp_ray.runtime.job import Job
from lsp_ray.runtime.ledger import OpReport
from lsp_ray.runtime.shard_actor import OpenPair, SlotPair
from lsp_ray.runtime.throttle import Throttle
from lsp_ray.schedule.ops import DeltaDue, GradientReady

CONCURRENCY_GROUPS = {"d2h": 1, "h2d": 1, "events": 1}  # beside the default group of one thread, which computes


class GpuActor:
    """Compute runs in the default concurrency group, each direction of the link and the events in one of their own.

    Args:
        job: The run.
        pairs: Slots of every unit, by index; none where nothing leaves the device.
    """

    def __init__(self, job: Job, pairs: Sequence[SlotPair]) -> None:
        self._news: queue.SimpleQueue[GradientReady | DeltaDue] = queue.SimpleQueue()
        self._side = DeviceSide(job, self._news.put)
        self._slots: list[OpenPair] = [pair.open() for pair in pairs]
        self._pairs = pairs if job.begins_with is not None else ()
        self._host_payloads = [slot.payload for pair in self._slots for slot in (pair.down, pair.up)]

    def __repr__(self) -> str:
        return "gpu"

    def setup(self) -> SetupReport:
        """See `DeviceSide.setup`."""
        report = self._side.setup(self._host_payloads)
        for pair in self._pairs:  # before the shards' first update
            self._side.copy_totals(pair.unit, pair.open_total())
        self._pairs = ()
        return report

    def keep_to(self, throttle: Throttle) -> None:
        """See `DeviceSide.keep_to`."""
        self._side.keep_to(throttle)

    def run_step(self, step: int) -> StepReport:
        """See `DeviceSide.run_step`."""
        return self._side.run_step(step, self._host_payloads)

    def drain(self) -> None:
        """See `DeviceWorker.drain`."""
        self._side.drain()

    def evaluate(self) -> dict[str, float]:
        """See `DeviceSide.evaluate`."""
        return self._side.evaluate()

    def eval_loss(self) -> float:
        """See `DeviceSide.eval_loss`."""
        return self._side.eval_loss()

    def sample(self) -> Sequence[float]:
        """See `DeviceSide.sample`."""
        return self._side.sample()

    def save(self, folder: str) -> None:
        """See `DeviceSide.save`."""
        self._side.save(Path(folder))

    def save_state(self, folder: str) -> None:
        """See `DeviceSide.save_state`."""
        self._side.save_state(Path(folder))

    def take_weights(self, checkpoint: str) -> None:
        """See `DeviceSide.take_weights`."""
        self._side.take_weights(Path(checkpoint))

    @ray.method(concurrency_group="d2h")
    def send(self, step: int, unit: int) -> OpReport:
        """Copy a unit's payload into its down-slot."""
        slot = self._slots[unit].down
        span, reprojections = self._side.worker.send(step, unit, slot.to_write())
        slot.publish(step)
        return OpReport(span=span, size_bytes=slot.payload.nbytes, reprojections=reprojections)

    @ray.method(concurrency_group="h2d")
    def prefetch(self, step: int, unit: int) -> OpReport:
        """Copy a unit's delta out of its up-slot."""
        payload = self._slots[unit].up.to_read(step)
        return OpReport(span=self._side.worker.prefetch(step, unit, payload), size_bytes=payload.nbytes)

    @ray.method(concurrency_group="events")
    def next_news(self, timeout_s: float) -> list[GradientReady | DeltaDue]:
        """Wait for completed gradients and deltas that are due and return all there are; none after `timeout_s`."""
        items: list[GradientReady | DeltaDue] = []
        with suppress(queue.Empty):
            items.append(self._news.get(timeout=timeout_s))
            while True:
                items.append(self._news.get_nowait())
        return items

    @ray.method(concurrency_group="events")
    def progress(self) -> str:
        """What a long call is doing now."""
        return self._side.progress
