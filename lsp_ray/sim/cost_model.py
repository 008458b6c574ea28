"""CostModel: from shapes and rates to seconds. Products are bound by arithmetic, everything else by memory."""

from __future__ import annotations

from dataclasses import dataclass

from lsp_ray.sim.cluster import COPY_BYTES_PER_S
from lsp_ray.sim.costs import HostShares, LayerCosts, NetworkCosts, StepCosts
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
        """All costs of a step, of its parts of one.

        One GPU is simulated, which stands for all: they do the same, and each has to wait for the slowest. So where
        there are several machines it is on one that is no layer's home: whoever makes an update waits for payloads from
        elsewhere, and a step for those whom deltas reach last.
        """
        bytes_per_s = self._update_bytes_per_s()
        return StepCosts(
            layers=tuple(self._layer(layer, bytes_per_s) for layer in self.model.layers),
            loss_s=self._device_s(loss_work(self.model, self.workload)),
            num_micro_batches=self.workload.num_micro_batches,
            hop_s=self.hardware.hop_s,
            shared_link_rate=self.hardware.shared_link_rate,
            host=self._host_shares(bytes_per_s) if self.workload.cluster.gpus_per_node > 1 else None,
            num_buffers=self.workload.weight_buffers if self.workload.streams else 0,
            pieces_s=tuple(size / self._up_bytes_per_s for size in self.workload.piece_bytes(self.model)),
            network=self._network() if self.workload.cluster.num_away else None,
        )

    def _network(self) -> NetworkCosts:
        work, layers = self.workload, self.model.layers
        bytes_per_s = work.cluster.network_bytes_per_s
        return NetworkCosts(
            # what is not added up goes part by part
            down_s=tuple(work.sent_bytes(layer) / work.cluster.parts_per_gpu / bytes_per_s for layer in layers),
            up_s=tuple(work.payload_bytes(layer) / bytes_per_s for layer in layers),
            sum_s=tuple(work.summed_bytes(layer) / self.hardware.core_bytes_per_s for layer in layers),
            away=work.cluster.num_away,
            most=min(1.0, COPY_BYTES_PER_S / bytes_per_s),
        )

    def _layer(self, layer: LayerShape, update_bytes_per_s: float) -> LayerCosts:
        forward_s = self._device_s(forward_work(self.model, self.workload, layer))
        backward_s = self._device_s(backward_work(self.model, self.workload, layer))
        # page-locked whatever slots are
        input_bytes = self.workload.element_bytes * self.model.hidden_size * self.workload.tokens
        is_parked = self.workload.parks_inputs and layer.is_block
        input_d2h_s = input_bytes / self.hardware.d2h_bytes_per_s if is_parked else 0.0
        input_h2d_s = input_bytes / self.hardware.h2d_bytes_per_s if is_parked else 0.0
        if self.workload.stays_on_device:
            return LayerCosts(
                forward_s=forward_s,
                backward_s=backward_s,
                update_s=self._device_s(device_update_work(self.workload, layer)),
                input_d2h_s=input_d2h_s,
                input_h2d_s=input_h2d_s,
            )
        size_bytes = self.workload.payload_bytes(layer)
        rate = 1.0 if self.workload.pinned else self.hardware.pageable_fraction
        return LayerCosts(
            forward_s=forward_s,
            backward_s=backward_s,
            input_d2h_s=input_d2h_s,
            input_h2d_s=input_h2d_s,
            apply_s=self._device_s(apply_work(self.workload, layer)),
            d2h_s=size_bytes / (rate * self.hardware.d2h_bytes_per_s),
            cpu_s=self._shard_update_s(layer, update_bytes_per_s),
            h2d_s=size_bytes / self._up_bytes_per_s,
            weights_s=self.workload.streamed_bytes(layer) / self._up_bytes_per_s,
        )

    @property
    def _up_bytes_per_s(self) -> float:
        return self.hardware.h2d_bytes_per_s * (1.0 if self.workload.pinned else self.hardware.pageable_fraction)

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

    def _shard_update_s(self, layer: LayerShape, bytes_per_s: float) -> float:
        """AdamW on the shard that owns the layer, of the sum of all parts; bound by memory.

        A machine's shards share its memory evenly, as if all of them always worked; with slices all of them do.
        """
        work = self.workload
        moved_bytes = (work.update_bytes + work.sum_bytes) * work.payload_numel(layer)
        share = 1 if work.shard_by == "slice" else work.num_shards
        return share * moved_bytes / bytes_per_s

    def _update_bytes_per_s(self) -> float:
        """Of all shards of a machine together, with the cores that the network's copies leave them."""
        work, machine = self.workload, self.hardware
        threads = work.num_shards * work.shard_threads
        bytes_per_s = min(threads * machine.core_bytes_per_s, machine.host_bytes_per_s)
        return bytes_per_s * self._left_by_copies() if work.cluster.num_away else bytes_per_s

    def _left_by_copies(self) -> float:
        """The part of a machine's cores that the network's copies leave to its shards, spread over a step's compute.

        Half of all is left, and each way no more is copied than the network lets through.
        """
        work, cluster, layers = self.workload, self.workload.cluster, self.model.layers
        down, up = sum(map(work.sent_bytes, layers)), sum(map(work.payload_bytes, layers))
        at_home = cluster.num_away / cluster.num_homes  # other machines, of the layers that have their home here
        ways, added_bytes = [at_home * down, at_home * up], 0.0
        if cluster.num_homes > 1:  # its own payloads and deltas of other homes cross as well
            ways = [sum(ways)] * 2
            added_bytes = at_home * sum(map(work.summed_bytes, layers))
        device_s = sum(
            self._device_s(of_layer(self.model, work, layer))
            for layer in layers
            for of_layer in (forward_work, backward_work)
        )
        compute_s = work.num_micro_batches * device_s
        copied_per_s = sum(min(cluster.network_bytes_per_s, num_bytes / compute_s) for num_bytes in ways)
        num_cores = copied_per_s / COPY_BYTES_PER_S + added_bytes / compute_s / self.hardware.core_bytes_per_s
        return max(0.5, 1.0 - num_cores / self.hardware.num_cores)

    def _host_shares(self, update_bytes_per_s: float) -> HostShares:
        machine, num_gpus = self.hardware, self.workload.cluster.gpus_per_node
        lanes = 1 if self.workload.shard_by == "slice" else self.workload.num_shards
        rate = 1.0 if self.workload.pinned else self.hardware.pageable_fraction
        return HostShares(
            d2h=num_gpus * rate * machine.d2h_bytes_per_s / machine.host_bytes_per_s,
            # those of other machines take nothing of this one's
            cpu=update_bytes_per_s / lanes / machine.host_bytes_per_s / self.workload.cluster.num_homes,
            h2d=num_gpus * rate * machine.h2d_bytes_per_s / machine.host_bytes_per_s,
        )
