"""GPU actors that go astray or are slow; in a module of their own, so that Ray's workers find them."""

from __future__ import annotations

from typing import cast

from lsp_ray.device.shared_weights import WeightsPlace
from lsp_ray.device.step_report import StepReport
from lsp_ray.device.unit import AddedTarget
from lsp_ray.runtime.actors.gpu_actor import GpuActor


class Astray(GpuActor):
    """The second GPU's weights change once by something that no other GPU sees."""

    def run_step(self, step: int) -> StepReport:
        report = super().run_step(step)
        if step == 1 and self._gpu == 1:
            weight = cast("AddedTarget", self._side.worker.units[0].targets[0]).addition.weight
            weight.data[(0,) * weight.ndim] += 1.0
        return report


class WithoutBase(GpuActor):
    """What takes the weights of another one of its machine finds none in the folder."""

    def share(self, place: WeightsPlace | None) -> None:
        path = self._side._job.model_folder / "model.safetensors"
        away = path.with_name("away")
        if place is not None:
            path.rename(away)
        super().share(place)
        if place is not None:
            away.rename(path)


class SlowFirst(GpuActor):
    """The first GPU takes three times as long as the others."""

    def pace(self) -> float:
        assert super().pace() > 0.0
        return 3.0 if self._gpu == 0 else 1.0
