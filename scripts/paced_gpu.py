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
from lsp_ray.optim.reproject import Reprojection
from lsp_ray.runtime.actors.decided import Decided, SetupReport
from lsp_ray.runtime.actors.gpu_actor import GpuActor
from lsp_ray.runtime.actors.ray_workers import RayWorkers
from lsp_ray.runtime.actors.throttle import Throttle
from lsp_ray.runtime.prepare.job import Job
from lsp_ray.runtime.transport.line import Way
from lsp_ray.runtime.transport.slots import Slot
from lsp_ray.runtime.transport.unit_slots import UnitSlots
from lsp_ray.schedule.ops import GradientReady
from lsp_ray.trace import Span, Wait, WorkStream

UNIT_S = 0.002  # of a unit's forward, and of its backward
STEP_S = 1.3  # of all units' forward and backward, of `LongPacedGpu`


class PacedGpu(GpuActor):
    """It has no model: payloads are what the slots hold, and deltas are added to nothing."""

    def __init__(self, job: Job, slots: Sequence[UnitSlots], gpu: int = 0, way: Way | None = None) -> None:
        super().__init__(job, slots, gpu, way)
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

    def _run(self, step: int) -> StepReport:
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

    def _copy_down(self, step: int, unit: int, part: int, slot: Slot) -> tuple[Span, tuple[Reprojection, ...]]:
        """Leave the slot as it is."""
        slot.to_write()
        return self._span(WorkStream.D2H, step, unit, part), ()

    def _copy_up(self, step: int, unit: int, slot: Slot, is_void: bool) -> Span:
        """Let the forward go on that waits for the delta."""
        slot.to_read(step)
        with self._came_up:
            self._last_up[unit] = step
            self._came_up.notify()
        return self._span(WorkStream.H2D, step, unit, self._gpu)

    def _waits(self, unit: int, step: int) -> list[Wait]:
        """Wait until the delta of `step` is up; returns the wait, if there was one."""
        start_s = time.monotonic()
        with self._came_up:
            if self._last_up[unit] >= step:
                return []
            self._came_up.wait_for(lambda: self._last_up[unit] >= step)
        return [Wait(step=step, layer=unit, start_s=start_s, end_s=time.monotonic())]

    def _span(self, stream: WorkStream, step: int, unit: int, part: int) -> Span:
        now_s = time.monotonic()
        return Span(stream=stream, step=step, layer=unit, start_s=now_s, end_s=now_s, part=part)


class LongPacedGpu(PacedGpu):
    """One whose step takes as long as a large model's, forward and backward as the paper's."""

    def __init__(self, job: Job, slots: Sequence[UnitSlots], gpu: int = 0, way: Way | None = None) -> None:
        super().__init__(job, slots, gpu, way)
        self._backward_s = BACKWARD_SHARE * STEP_S / len(slots)
        self._forward_s = STEP_S / len(slots) - self._backward_s


class PacedWorkers(RayWorkers):
    """RayWorkers with paced GPUs."""

    gpu_actor = PacedGpu


class LongPacedWorkers(RayWorkers):
    """RayWorkers with such."""

    gpu_actor = LongPacedGpu
