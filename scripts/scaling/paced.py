"""A GPU actor that computes next to nothing and takes as long as a GPU would: layers sleep."""

from __future__ import annotations

import os
import time
from typing import Any

from torch import nn

from lsp_ray.runtime.actors.decided import Decided, SetupReport
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
    start_s = own_s = 0.0

    def begin(*_: object) -> None:  # the last hook before the forward: after what waits for a delta
        nonlocal start_s
        start_s = time.monotonic()

    def end_forward(*_: object) -> None:
        _sleep(start_s + forward_s - time.monotonic())

    def begin_backward(*_: object) -> None:
        nonlocal start_s  # gradients are told of during the backward: it sleeps before, so that they come late
        _sleep(backward_s - own_s)
        start_s = time.monotonic()

    def end_backward(*_: object) -> None:
        nonlocal own_s
        own_s = time.monotonic() - start_s

    block.register_forward_pre_hook(begin)
    block.register_forward_hook(end_forward)
    block.register_full_backward_pre_hook(begin_backward)
    block.register_full_backward_hook(end_backward)


def _sleep(seconds: float) -> None:
    time.sleep(max(0.0, seconds))


class PacedWorkers(RayWorkers):
    """Whose GPUs are paced."""

    gpu_actor = PacedGpuActor
