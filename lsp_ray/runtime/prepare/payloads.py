"""What of a run crosses the link, in elements and bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from lsp_ray.config import RunConfig
from lsp_ray.data.micro_batches import MicroBatches
from lsp_ray.methods.lsp import frozen_linears, lsp_payload_parts, lsp_payload_sizes
from lsp_ray.methods.units import full_payload_sizes
from lsp_ray.models.layers import Layer
from lsp_ray.models.output_head import host_tables
from lsp_ray.optim.sums import SummedPart
from lsp_ray.schedule.block_ring import parked_blocks
from lsp_ray.schedule.delta_room import DeltaRoom, delta_room
from lsp_ray.sim.store import payload_bytes
from lsp_ray.sim.workload import nf4_bytes


def payload_sizes_of(layers: Sequence[Layer], config: RunConfig, *, quantized: bool) -> list[int]:
    """Elements of each unit's payload; empty where nothing leaves the device."""
    if config.method == "lsp":
        return lsp_payload_sizes(layers, config.lsp, quantized=quantized)
    return full_payload_sizes(layers) if config.method == "zero_offload" else []


def sums_of(
    layers: Sequence[Layer], config: RunConfig, *, quantized: bool
) -> tuple[tuple[SummedPart, ...], ...] | None:
    """Their parts where the shards add up all updates; None where the device does."""
    if config.method != "lsp" or not config.lsp.is_apart:
        return None
    return tuple(tuple(parts) for parts in lsp_payload_parts(layers, config.lsp, quantized=quantized))


def room_of(layers: Sequence[Layer], payload_sizes: Sequence[int], config: RunConfig) -> DeltaRoom | None:
    """For deltas on the device, see `delta_room`."""
    sent, full = (
        [payload_bytes(size, config.runtime.payload_dtype) for size in sizes]
        for sizes in (payload_sizes, full_payload_sizes(layers))
    )
    return delta_room(sent, full)


def streamed_bytes_of(
    model: PreTrainedModel, layers: Sequence[Layer], config: RunConfig, dtype: torch.dtype, *, quantized: bool
) -> int:
    """Frozen weights that stay in main memory: the blocks', and tables of embeddings."""
    if not config.streams:
        return 0
    linears = frozen_linears(layers, config.lsp, quantized=quantized)
    numels = [site.shape[0] * site.shape[1] for _, sites in linears for site in sites]
    table_bytes = dtype.itemsize * host_tables(model).numel
    return table_bytes + round(sum(nf4_bytes(numel) if quantized else dtype.itemsize * numel for numel in numels))


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockInputs:
    """Bytes of a block's input in the longest micro-batch, and of all inputs that wait in main memory."""

    largest_bytes: int
    parked_bytes: int


def block_inputs(
    model: PreTrainedModel, layers: Sequence[Layer], config: RunConfig, micro_batches: MicroBatches, dtype: torch.dtype
) -> BlockInputs:
    """What of a run's activations leaves the device; where rows tell no length, `max_seq_length` stands for it."""
    tokens = config.per_device_train_batch_size * (micro_batches.longest or config.seq_length)
    largest = tokens * int(model.config.get_text_config().hidden_size) * dtype.itemsize
    parked = parked_blocks(sum(layer.block is not None for layer in layers))
    return BlockInputs(largest_bytes=largest, parked_bytes=len(parked) * largest)
