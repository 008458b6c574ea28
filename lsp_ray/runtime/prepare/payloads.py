"""What of a run crosses the link, in elements and bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from lsp_ray.config import RunConfig
from lsp_ray.methods.lsp import frozen_linears, lsp_payload_parts, lsp_payload_sizes
from lsp_ray.methods.units import full_payload_sizes
from lsp_ray.models.layers import Layer, own_embedding
from lsp_ray.optim.sums import SummedPart
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
    """Frozen weights that stay in main memory: the blocks', and embeddings, of which rows alone come up."""
    if not config.streams:
        return 0
    linears = frozen_linears(layers, config.lsp, quantized=quantized)
    numels = [site.shape[0] * site.shape[1] for _, sites in linears for site in sites]
    embedding = own_embedding(model)
    table_bytes = 0 if embedding is None else dtype.itemsize * embedding.weight.numel()
    return table_bytes + round(sum(nf4_bytes(numel) if quantized else dtype.itemsize * numel for numel in numels))
