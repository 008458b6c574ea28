"""PacedGpu: a GPU actor that sleeps as long as a GPU would compute; what crosses its lanes and slots is as in a run.

Copies between device and slots are not made, as a GPU's copy engines make them; on another machine than the driver's
its payloads and deltas cross the network.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from lsp_ray.device.step_report import StepReport
from lsp_ray.hardware import BACKWARD_SHARE
from lsp_ray.runtime.actors.decided import Decided, SetupReport
from lsp_ray.runtime.actors.gpu_actor import GpuActor
from lsp_ray.runtime.actors.ray_workers import RayWorkers
from lsp_ray.runtime.actors.throttle import Throttle
from lsp_ray.runtime.drive.ledger import OpReport
from lsp_ray.runtime.prepare.job import Job
from lsp_ray.runtime.transport.unit_slots import OwnSlots, UnitSlots
from lsp_ray.schedule.ops import GradientReady
from lsp_ray.trace import Span, Wait, WorkStream

UNIT_S = 0.002  # of a unit's forward, and of its backward
STEP_S = 1.3  # of all units' forward and backward, of `LongPacedGpu`


class PacedGpu(GpuActor):
    """It has no model: payloads are what the slots hold, and deltas are added to nothing."""

    def __init__(self, job: Job, slots: Sequence[UnitSlots | OwnSlots], gpu: int = 0) -> None:
        super().__init__(job, slots, gpu)
        self._forward_s = self._backward_s = UNIT_S
        self._gpu_of_part = job.layout.gpu_of_part
        self._parts, self._num_parts = job.layout.parts_of(gpu), len(self._gpu_of_part)
        self._staleness = job.staleness
        self._came_up = threading.Condition()
        self._last_up = [-1] * len(slots)  # the step whose delta came up last, by unit

    def setup(self, decided: Decided | None = None) -> SetupReport:
        """Nothing to load."""
        return SetupReport(unfitted=[], num_pageable=0, throttle=Throttle(), gpu_of_part=self._gpu_of_part)

    def pace(self) -> float:
        """The same on all."""
        return UNIT_S

    def decided(self) -> Decided:
        """Nothing that others would have to have alike."""
        return Decided(throttle=Throttle(), projectors={})

    def digest(self) -> int:
        """All train the same: nothing."""
        return 0

    def keep_to(self, throttle: Throttle) -> None:
        """Nothing is copied that could be slowed down."""

    def run_step(self, step: int) -> StepReport:
        """Sleep through a forward and a backward of every own part, and wait for deltas as they are needed."""
        start_s = time.monotonic()
        waits = []
        for part in self._parts:
            for unit in range(len(self._last_up)):
                waits += self._waits(unit, step - 1 - self._staleness)
                time.sleep(self._forward_s)
            for unit in reversed(range(len(self._last_up))):
                time.sleep(self._backward_s)
                self._tell(GradientReady(step=step, layer=unit, part=part))
        return StepReport(
            step=step,
            losses=dict.fromkeys(self._parts, 1.0 / self._num_parts),
            num_tokens=1,
            start_s=start_s,
            end_s=time.monotonic(),
            forward_s=self._forward_s * len(self._last_up),
            backward_s=self._backward_s * len(self._last_up),
            waits=tuple(waits),
            grad_norm=0.0,
            grad_scale=1.0,
            peak_device_bytes=None,
            bias=None,
        )

    def send(self, step: int, unit: int, part: int) -> OpReport:
        """Leave the slot as it is, with the step's number."""
        start_s = time.monotonic()
        slot = self._slots[unit].down[part]
        slot.to_write()
        slot.publish(step)
        return self._report(WorkStream.D2H, step, unit, start_s, part, slot.payload.nbytes)

    def prefetch(self, step: int, unit: int, is_void: bool) -> OpReport:
        """Let the forward go on that waits for the delta."""
        start_s = time.monotonic()
        payload = self._slots[unit].up.to_read(step)
        with self._came_up:
            self._last_up[unit] = step
            self._came_up.notify()
        return self._report(WorkStream.H2D, step, unit, start_s, self._gpu, payload.nbytes)

    def _waits(self, unit: int, step: int) -> list[Wait]:
        """Wait until the delta of `step` is up; returns the wait, if there was one."""
        start_s = time.monotonic()
        with self._came_up:
            if self._last_up[unit] >= step:
                return []
            self._came_up.wait_for(lambda: self._last_up[unit] >= step)
        return [Wait(step=step, layer=unit, start_s=start_s, end_s=time.monotonic())]

    def _report(self, stream: WorkStream, step: int, unit: int, start_s: float, part: int, size_bytes: int) -> OpReport:
        span = Span(stream=stream, step=step, layer=unit, start_s=start_s, end_s=time.monotonic(), part=part)
        return OpReport(span=span, size_bytes=size_bytes)


class LongPacedGpu(PacedGpu):
    """One whose step takes as long as a large model's, forward and backward as the paper's."""

    def __init__(self, job: Job, slots: Sequence[UnitSlots | OwnSlots], gpu: int = 0) -> None:
        super().__init__(job, slots, gpu)
        self._backward_s = BACKWARD_SHARE * STEP_S / len(slots)
        self._forward_s = STEP_S / len(slots) - self._backward_s


class PacedWorkers(RayWorkers):
    """RayWorkers with paced GPUs."""

    gpu_actor = PacedGpu


class LongPacedWorkers(RayWorkers):
    """RayWorkers with such."""

    gpu_actor = LongPacedGpu
