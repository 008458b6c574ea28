"""A DeviceWorker, one OptimizerShard and buffers between them on one thread: a whole run without any runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedModel

from lsp_ray.device.backend import Backend, CpuBackend
from lsp_ray.device.judge import Judge
from lsp_ray.device.refit import Refitter
from lsp_ray.device.step_report import StepReport
from lsp_ray.device.unit import Unit
from lsp_ray.device.worker import DeviceWorker
from lsp_ray.models.loss import Batch
from lsp_ray.optim.codec import Codec
from lsp_ray.optim.shard import OptimizerShard
from lsp_ray.optim.sums import SummedPart
from lsp_ray.schedule.ops import GradientReady


class Loopback:
    """Runs steps; after each, every payload goes down, through its update and up."""

    def __init__(
        self,
        model: PreTrainedModel,
        units: Sequence[Unit],
        *,
        learning_rates: Sequence[float],
        weight_decay: float = 0.0,
        native: bool = False,
        seed: int = 0,
        staleness: int = 0,
        refitter: Refitter | None = None,
        judge: Judge | None = None,
        codec: Codec | None = None,
        backend: Backend | None = None,
        sums: Mapping[int, Sequence[SummedPart]] | None = None,
    ) -> None:
        codec = codec or Codec()
        sizes = {unit.index: unit.numel for unit in units}
        self.announced: list[GradientReady] = []
        self.gradients: dict[int, torch.Tensor] = {}
        self.deltas: dict[int, torch.Tensor] = {}
        self._learning_rates = learning_rates
        self._shard = OptimizerShard(sizes, codec=codec, sums=sums, weight_decay=weight_decay)
        self._slots = {index: torch.empty(codec.wire_numel(numel), dtype=codec.dtype) for index, numel in sizes.items()}
        self.worker = DeviceWorker(
            model,
            units,
            backend or CpuBackend(),
            learning_rates=learning_rates,
            weight_decay=weight_decay,
            seed=seed,
            on_gradients=self.announced.append,
            local_shard=OptimizerShard(sizes) if native else None,
            staleness=staleness,
            refitter=refitter,
            judge=judge,
            codec=codec,
            graphs=backend is not None and backend.has_graphs,
        )

    def step(self, step: int, micro_batches: Sequence[Batch]) -> StepReport:
        """Run one update; its deltas are added by the next forward, or by `worker.flush`."""
        self.announced.clear()
        report = self.worker.run_step(step, micro_batches)
        for ready in self.announced:
            slot = self._slots[ready.layer]
            _, reprojections = self.worker.send(step, ready.layer, slot)
            self._shard.carry_over(ready.layer, reprojections)
            self.gradients[ready.layer] = slot.clone()
            delta = torch.empty_like(slot)
            rate, scale = self._learning_rates[step], report.grad_scale
            self._shard.update(ready.layer, [slot], delta, learning_rate=rate, grad_scale=scale)
            self.deltas[ready.layer] = delta
            self.worker.prefetch(step, ready.layer, delta, is_void=scale == 0.0)
        return report
