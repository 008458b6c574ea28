"""GpuActor: a thin shell that gives each thread of DeviceSide a lane of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

import ray
import torch

from lsp_ray.device.shared_weights import WeightsPlace
from lsp_ray.device.step_report import StepReport
from lsp_ray.device.switch import Takeover
from lsp_ray.optim.reproject import Reprojection
from lsp_ray.process import keep_loaded
from lsp_ray.runtime.actors.decided import Decided, SetupReport
from lsp_ray.runtime.actors.device_side import DeviceSide
from lsp_ray.runtime.actors.numa_nodes import node_of_actor, numa_nodes, run_on
from lsp_ray.runtime.actors.throttle import Throttle
from lsp_ray.runtime.actors.trained_parts import News
from lsp_ray.runtime.cluster.malloc_arenas import give_back_free
from lsp_ray.runtime.drive.ledger import OpReport
from lsp_ray.runtime.prepare.job import Job
from lsp_ray.runtime.transport.lanes import COMPUTE, NEWS, connect, gpu_lanes, serve
from lsp_ray.runtime.transport.line import Lines, Way
from lsp_ray.runtime.transport.messages import tell
from lsp_ray.runtime.transport.network import Address
from lsp_ray.runtime.transport.slots import Slot, as_bytes
from lsp_ray.runtime.transport.unit_slots import UnitSlots
from lsp_ray.trace import ComputeSpan, Span, Wait

Timed = TypeVar("Timed", Span, Wait, ComputeSpan, StepReport)


class GpuActor:
    """Compute runs on the thread of Ray's that calls `serve`, each direction of the link on one of its own.

    Gradients that are complete and deltas that are due are told on the lane NEWS, which takes no orders. All times that
    it tells are by the clock of the driver's machine.

    Args:
        job: The run.
        slots: Of every unit, by index, on this machine; none where nothing leaves the device.
        gpu: Its number.
        way: To units whose shards are on other machines; None: there are none.
    """

    def __init__(self, job: Job, slots: Sequence[UnitSlots], gpu: int = 0, way: Way | None = None) -> None:
        keep_loaded()
        self._news: Connection | None = None
        self._telling = threading.Lock()
        self._name = job.layout.name_of(gpu)
        self._gpu = gpu
        self._lane_names = gpu_lanes(len(job.layout.homes))
        self._way, self._lines, self._offset_s = way, Lines(), 0.0
        self._crosses = [own.state is None for own in slots]
        self._down_turn, self._up_turn = threading.Lock(), threading.Lock()
        self._node = None
        if job.device == "cuda":
            self._node = node_of_actor(numa_nodes(), job.layout.num_beside(gpu) * job.layout.device_threads)
        if self._node is not None:  # before anything is allocated: memory is that of the core that first writes to it
            run_on(self._node.cores)
        self._side = DeviceSide(job, self._tell, gpu)
        self._slots = [own.open() for own in slots]
        self._begun = slots if job.begins_with_updates and gpu == 0 else ()
        payloads = [slot.payload for own in self._slots for slot in (*own.down.values(), own.up)]
        self._host_payloads = [payload for payload in payloads if payload.numel()]

    def __repr__(self) -> str:
        return self._name

    def serve(self, address: str | Address) -> None:
        """Carry out the driver's orders for as long as it lives."""
        lanes = {name: connect(address, name) for name in self._lane_names}
        self._news = lanes[NEWS]
        self._look_at_clock()
        for name in set(lanes) - {COMPUTE, NEWS}:
            threading.Thread(target=serve, args=(lanes[name], self), name=name, daemon=True).start()
        serve(lanes[COMPUTE], self)

    def _tell(self, news: News) -> None:
        assert self._news is not None, "nobody is there to be told"
        with self._telling:  # not always the same thread
            tell(self._news, news)

    def setup(self, decided: Decided | None = None) -> SetupReport:
        """See `DeviceSide.setup`."""
        report = self._side.setup(self._host_payloads, decided)
        if decided is None:  # else the shards have them, and more exactly
            for own in self._begun:
                self._begin_with(own)
        return replace(report, places=() if self._node is None else (f"{self._name} runs on {self._node}",))

    def share(self, place: WeightsPlace | None) -> None:
        """See `DeviceSide.share`."""
        self._side.share(place)

    def weights_place(self) -> WeightsPlace | None:
        """Where others of this machine find its frozen weights; None: they are not shared."""
        return None if self._side.shared is None else self._side.shared.place

    def pace(self) -> float:
        """See `DeviceSide.pace`."""
        return self._side.pace()

    def divide(self, gpu_of_part: tuple[int, ...]) -> None:
        """See `DeviceSide.divide`."""
        self._side.divide(gpu_of_part)

    def decided(self) -> Decided:
        """See `DeviceSide.decided`."""
        return self._side.decided()

    def hand_over(self, step: int, weights: str) -> Decided:
        """See `DeviceSide.hand_over`; on the thread of the way up, as the other one waits for what comes up."""
        return self._side.hand_over(step, Path(weights))

    def digest(self) -> int:
        """See `DeviceSide.digest`."""
        return self._side.digest()

    def take(self, takeover: Takeover) -> None:
        """See `DeviceSide.take`."""
        self._side.take(takeover)

    def keep_to(self, throttle: Throttle) -> None:
        """See `DeviceSide.keep_to`."""
        self._side.keep_to(throttle)

    def run_step(self, step: int) -> StepReport:
        """See `DeviceSide.run_step`."""
        self._look_at_clock()
        report = self._moved(self._run(step))
        return replace(
            report, waits=tuple(map(self._moved, report.waits)), compute=tuple(map(self._moved, report.compute))
        )

    def _run(self, step: int) -> StepReport:
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
        give_back_free()

    def take_weights(self, checkpoint: str) -> None:
        """See `DeviceSide.take_weights`."""
        self._side.take_weights(Path(checkpoint))

    def send(self, step: int, unit: int, part: int) -> OpReport:
        """Copy a unit's payload into the part's down-slot, and let it be brought to the unit's shard."""
        slot = self._slots[unit].down[part]
        with self._down_turn:
            span, reprojections = self._copy_down(step, unit, part, slot)
            slot.publish(step)
        if self._crosses[unit]:
            self._ask("forward", step, unit, part)
            span = replace(span, end_s=time.monotonic())
        return OpReport(span=self._moved(span), size_bytes=slot.payload.nbytes, reprojections=reprojections)

    def prefetch(self, step: int, unit: int, is_void: bool) -> OpReport:
        """Let a unit's delta be brought from its shard, and copy it out of its up-slot."""
        slot, start_s = self._slots[unit].up, time.monotonic()
        if self._crosses[unit]:
            self._ask("bring", step, unit)
        with self._up_turn:
            span = self._copy_up(step, unit, slot, is_void)
        if self._crosses[unit]:
            span = replace(span, start_s=start_s)
        return OpReport(span=self._moved(replace(span, part=self._gpu)), size_bytes=slot.payload.nbytes)

    def _copy_down(self, step: int, unit: int, part: int, slot: Slot) -> tuple[Span, tuple[Reprojection, ...]]:
        return self._side.worker.send(step, unit, slot.to_write(), part)

    def _copy_up(self, step: int, unit: int, slot: Slot, is_void: bool) -> Span:
        return self._side.worker.prefetch(step, unit, slot.to_read(step), is_void=is_void)

    def _begin_with(self, own: UnitSlots) -> None:
        """Let the shard's sum of a unit's updates begin with what the device has of them."""
        if not self._crosses[own.unit]:
            self._side.copy_totals(own.unit, own.open_total())
            return
        assert self._way is not None, "whose units cross has a way"
        total = torch.zeros(own.numel)
        self._side.copy_totals(own.unit, total)
        self._lines.ask(self._way.keeper, "begin_with", own.unit, as_bytes(total))

    def _ask(self, method: str, *args: int) -> None:
        assert self._way is not None, "whose units cross has a way"
        self._lines.ask(self._way.keeper, method, self._way.index, *args)

    def _look_at_clock(self) -> None:
        if self._way is not None:
            self._offset_s = self._lines.ask(self._way.keeper, "offset_s")

    def _moved(self, what: Timed) -> Timed:
        """The same by the clock of the driver's machine."""
        if not self._offset_s:
            return what
        return replace(what, start_s=what.start_s + self._offset_s, end_s=what.end_s + self._offset_s)

    @ray.method(concurrency_group="progress")
    def progress(self) -> str:
        """What a long call is doing now."""
        return self._side.progress
