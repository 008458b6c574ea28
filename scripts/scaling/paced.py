"""A GPU actor that computes next to nothing and takes as long as a GPU would: layers sleep."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from torch import nn

from lsp_ray.runtime.actors.decided import Decided
from lsp_ray.runtime.actors.device_side import SetupReport
from lsp_ray.runtime.actors.gpu_actor import GpuActor
from lsp_ray.runtime.actors.ray_workers import RayWorkers

STEP_S = "SCALING_STEP_S"  # of the environment: of all layers, both ways
FORWARD_SHARE = 12.2 / (12.2 + 28.1)  # of a layer's seconds (paper, Table 1)


class PacedGpuActor(GpuActor):
    """Every block's forward and backward take their part of the step, however short they are by themselves."""

    def setup(self, decided: Decided | None = None) -> SetupReport:
        """See `GpuActor.setup`."""
        report = super().setup(decided)
        blocks: Any = self._side._model.get_submodule("model.layers")
        block_s = float(os.environ[STEP_S]) / len(blocks)
        for block in blocks:
            _pace(block, FORWARD_SHARE * block_s, (1 - FORWARD_SHARE) * block_s)
        return report


def _pace(block: nn.Module, forward_s: float, backward_s: float) -> None:
    start_s = 0.0

    def begin(*_: object) -> None:  # the last hook before the forward: after what waits for a delta
        nonlocal start_s
        start_s = time.monotonic()

    block.register_forward_pre_hook(begin)
    block.register_forward_hook(_until(lambda: start_s + forward_s))
    block.register_full_backward_pre_hook(_until(lambda: time.monotonic() + backward_s))


def _until(end_s: Callable[[], float]) -> Callable[..., None]:
    def sleep(*_: object) -> None:
        time.sleep(max(0.0, end_s() - time.monotonic()))

    return sleep


class PacedWorkers(RayWorkers):
    """Whose GPUs are paced."""

    gpu_actor = PacedGpuActor
