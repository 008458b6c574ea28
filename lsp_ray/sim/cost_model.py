"""CostModel: from shapes and rates to seconds. Products are bound by arithmetic, everything else by memory."""

from __future__ import annotations

from dataclasses import dataclass

from lsp_ray.sim.costs import LayerCosts, StepCosts
from lsp_ray.sim.device_work import (
    DeviceWork,
    apply_work,
    backward_work,
    device_update_work,
    forward_work,
    loss_work,
)
from lsp_ray.sim.hardware_profile import HardwareProfile
from lsp_ray.sim.model_shape import LayerShape, ModelShape
from lsp_ray.sim.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """What one step of `workload` on `hardware` costs."""

    model: ModelShape
    workload: Workload
    hardware: HardwareProfile

    def step(self) -> StepCosts:
        """All costs of a step."""
        return StepCosts(
            layers=tuple(self._layer(layer) for layer in self.model.layers),
            loss_s=self._device_s(loss_work(self.model, self.workload)),
            num_micro_batches=self.workload.num_micro_batches,
            hop_s=self.hardware.hop_s,
            shared_link_rate=self.hardware.shared_link_rate,
        )

    def _layer(self, layer: LayerShape) -> LayerCosts:
        forward_s = self._device_s(forward_work(self.model, self.workload, layer))
        backward_s = self._device_s(backward_work(self.model, self.workload, layer))
        if self.workload.stays_on_device:
            update_s = self._device_s(device_update_work(self.workload, layer))
            return LayerCosts(forward_s=forward_s, backward_s=backward_s, update_s=update_s)
        size_bytes = self.workload.payload_bytes(layer)
        rate = 1.0 if self.workload.pinned else self.hardware.pageable_fraction
        return LayerCosts(
            forward_s=forward_s,
            backward_s=backward_s,
            apply_s=self._device_s(apply_work(self.workload, layer)),
            d2h_s=size_bytes / (rate * self.hardware.d2h_bytes_per_s),
            cpu_s=self._shard_update_s(layer),
            h2d_s=size_bytes / (rate * self.hardware.h2d_bytes_per_s),
        )

    def _device_s(self, work: DeviceWork) -> float:
        machine = self.hardware
        flops_per_s = machine.device_bf16_flops if self.workload.bf16 else machine.device_float32_flops
        return (
            work.flops / flops_per_s
            + work.float32_flops / machine.device_float32_flops
            + work.block_flops / machine.block_flops
            + work.moved_bytes / machine.device_bytes_per_s
            + work.activation_bytes / machine.activation_bytes_per_s
        )

    def _shard_update_s(self, layer: LayerShape) -> float:
        """AdamW on the shard that owns the layer, bound by memory.

        Shards share the host's memory evenly, as if all of them always worked; with slices all of them do.
        """
        work, machine = self.workload, self.hardware
        threads = work.num_shards * work.shard_threads
        bytes_per_s = min(threads * machine.core_bytes_per_s, machine.host_bytes_per_s)
        share = 1 if work.shard_by == "slice" else work.num_shards
        return share * work.update_bytes * work.payload_numel(layer) / bytes_per_s
