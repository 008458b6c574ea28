"""CostModel: from shapes and rates to seconds. Products are bound by arithmetic, everything else by memory."""

from __future__ import annotations

from dataclasses import dataclass

from lsp_ray.schedule.block_ring import FEWEST_BUFFERS
from lsp_ray.sim.cluster import COPY_BYTES_PER_S
from lsp_ray.sim.costs import HostShares, LayerCosts, StepCosts
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
from lsp_ray.sim.network import Crossing, NetworkCosts
from lsp_ray.sim.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """What one step of `workload` on `hardware` costs."""

    model: ModelShape
    workload: Workload
    hardware: HardwareProfile

    def step(self) -> StepCosts:
        """All costs of a step, of its parts of one; but for those of a network."""
        bytes_per_s = self._update_bytes_per_s()
        return StepCosts(
            layers=tuple(self._layer(layer, bytes_per_s) for layer in self.model.layers),
            loss_s=self._device_s(loss_work(self.model, self.workload)),
            num_micro_batches=self.workload.num_micro_batches,
            hop_s=self.hardware.hop_s,
            shared_link_rate=self.hardware.shared_link_rate,
            host=self._host_shares(bytes_per_s) if self.workload.cluster.gpus_per_node > 1 else None,
            num_buffers=FEWEST_BUFFERS if self.workload.streams else 0,
        )

    def network(self) -> NetworkCosts | None:
        """What crosses between nodes; None on one.

        One GPU is simulated, which stands for all: they do the same, and each has to wait for the slowest. Shards are
        dealt out to nodes in turn.
        """
        cluster = self.workload.cluster
        if cluster.num_nodes == 1:
            return None
        nodes, bytes_per_s = tuple(range(cluster.num_nodes)), self._update_bytes_per_s()
        return NetworkCosts(
            num_nodes=cluster.num_nodes,
            node_of_shard=nodes * self.workload.num_shards,
            nodes_of_gpu=(nodes,),
            layers=tuple(self._crossing(layer, bytes_per_s) for layer in self.model.layers),
        )

    def _crossing(self, layer: LayerShape, update_bytes_per_s: float) -> Crossing:
        work, bytes_per_s = self.workload, self.workload.cluster.network_bytes_per_s
        added = work.cluster.gpus_per_node - 1 if work.sums_on_node else 0
        return Crossing(
            sum_s=self._host_s(added * work.sum_bytes * work.payload_numel(layer), update_bytes_per_s),
            down_s=work.crossing_bytes(layer) / bytes_per_s,
            up_s=work.payload_bytes(layer) / bytes_per_s,
        )

    def _layer(self, layer: LayerShape, update_bytes_per_s: float) -> LayerCosts:
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
            cpu_s=self._shard_update_s(layer, update_bytes_per_s),
            h2d_s=size_bytes / (rate * self.hardware.h2d_bytes_per_s),
            weights_s=self.workload.streamed_bytes(layer) / (rate * self.hardware.h2d_bytes_per_s),
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

    def _shard_update_s(self, layer: LayerShape, bytes_per_s: float) -> float:
        """AdamW on the shard that owns the layer, of the sum of all parts."""
        work = self.workload
        element_bytes = work.update_bytes + (work.parts_at_shard - 1) * work.sum_bytes
        return self._host_s(element_bytes * work.payload_numel(layer), bytes_per_s)

    def _host_s(self, moved_bytes: int, bytes_per_s: float) -> float:
        """One shard's, bound by memory.

        Shards share the host's memory evenly, as if all of them always worked; with slices all of them do.
        """
        share = 1 if self.workload.shard_by == "slice" else self.workload.num_shards
        return share * moved_bytes / bytes_per_s

    def _update_bytes_per_s(self) -> float:
        """Of all shards of a host together, with the cores that Ray's copies leave them."""
        work, machine = self.workload, self.hardware
        threads = work.num_shards * work.shard_threads
        bytes_per_s = min(threads * machine.core_bytes_per_s, machine.host_bytes_per_s)
        return bytes_per_s if work.cluster.num_nodes == 1 else bytes_per_s * self._left_by_copies()

    def _left_by_copies(self) -> float:
        """The part of a host's cores that Ray's copies over its boundary leave, spread over a step's compute.

        What leaves a node or comes to it takes a core there; there is one each way, and half of all is left.
        """
        cluster, layers = self.workload.cluster, self.model.layers
        crossing = sum(self.workload.crossing_bytes(layer) + self.workload.payload_bytes(layer) for layer in layers)
        each_way = crossing * (cluster.num_nodes - 1) / cluster.num_nodes
        device_s = sum(
            self._device_s(work(self.model, self.workload, layer))
            for layer in layers
            for work in (forward_work, backward_work)
        )
        taken = 2 * min(1.0, each_way / COPY_BYTES_PER_S / (self.workload.num_micro_batches * device_s))
        return max(0.5, 1.0 - taken / self.hardware.num_cores)

    def _host_shares(self, update_bytes_per_s: float) -> HostShares:
        machine, num_gpus = self.hardware, self.workload.cluster.gpus_per_node
        lanes = 1 if self.workload.shard_by == "slice" else self.workload.num_shards
        rate = 1.0 if self.workload.pinned else self.hardware.pageable_fraction
        return HostShares(
            d2h=num_gpus * rate * machine.d2h_bytes_per_s / machine.host_bytes_per_s,
            cpu=update_bytes_per_s / lanes / machine.host_bytes_per_s,
            h2d=num_gpus * rate * machine.h2d_bytes_per_s / machine.host_bytes_per_s,
        )
