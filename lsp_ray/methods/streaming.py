"""From a model in main memory to one on the device whose blocks' frozen weights come up behind the compute."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from lsp_ray.config import LspConfig
from lsp_ray.device.backend import Backend
from lsp_ray.device.frozen_block import FrozenBlock, host_bytes, move_rest
from lsp_ray.device.host_embedding import HostEmbedding
from lsp_ray.device.host_table import HostTable
from lsp_ray.device.shared_weights import SharedWeights
from lsp_ray.device.streamed_head import StreamedHead
from lsp_ray.device.streamed_weights import StreamedWeights
from lsp_ray.methods.lsp import frozen_linears
from lsp_ray.models.layers import Layer
from lsp_ray.models.output_head import host_tables
from lsp_ray.models.quantized import frozen_tensors, read_late
from lsp_ray.schedule.block_ring import FEWEST_BUFFERS


def stream_weights(
    model: PreTrainedModel,
    layers: Sequence[Layer],
    lsp: LspConfig,
    backend: Backend,
    *,
    quantized: bool,
    num_buffers: int = FEWEST_BUFFERS,
    changed: threading.Condition | None = None,
    shared: SharedWeights | None = None,
) -> StreamedWeights:
    """Bring all of a model to the device but what `lsp_units` will leave as it is; returns what brings that up.

    Embeddings stay as well, see `host_tables`: of the input's the rows that are looked up come to the device, the
    output's come up piece by piece.

    Args:
        model: In main memory.
        layers: The model's, with their linears as they were loaded.
        lsp: Of the run, whose updates are kept apart.
        backend: Of the device.
        quantized: Whether the blocks' linears are.
        num_buffers: See `StreamedWeights`.
        changed: See `StreamedWeights`.
        shared: Where those that stay are to be, with the model left for others, or are already; None: in this process.
    """
    linears = frozen_linears(layers, lsp, quantized=quantized)
    parts = [{id(tensor): tensor for site in sites for tensor in frozen_tensors(site.module)} for _, sites in linears]
    tables = host_tables(model)
    own = _packed(layers, [(unit, tensors) for (unit, _), tensors in zip(linears, parts, strict=True)], shared)
    _pack_tables(tables.weights, shared)
    if shared is not None and not shared.is_filled:
        shared.leave(model)  # before there are hooks in it
    for site in (site for _, sites in linears for site in sites):
        read_late(site.module)
    num_blocks = Counter(key for tensors in parts for key in tensors)
    common = {key: tensor for tensors in parts for key, tensor in tensors.items() if num_blocks[key] > 1}
    for tensor in common.values():  # tables that all blocks read
        tensor.data = tensor.data.to(backend.device)
    stay = {key for tensors in parts for key in tensors} | {id(weight) for weight in tables.weights}
    move_rest(model, stay, backend.device)
    held = {id(weight): HostTable(weight, backend.device) for weight in tables.weights}
    embedding, head = tables.embedding, tables.head
    weights = StreamedWeights(
        own,
        backend,
        num_buffers=num_buffers,
        changed=changed,
        tables=list(held.values()),
        embedding=None if embedding is None else HostEmbedding(embedding, held[id(embedding.weight)]),
        head=None if head is None else StreamedHead(head, held[id(head.weight)], unit=len(layers) - 1),
    )
    if shared is not None and backend.device.type == "cpu":  # a GPU asks for pages that can be written, and only reads
        shared.protect()
    return weights


def _packed(
    layers: Sequence[Layer], parts: Sequence[tuple[int, dict[int, torch.Tensor]]], shared: SharedWeights | None
) -> list[FrozenBlock]:
    """Of each block, by its unit, the tensors that no other one has."""
    num_blocks = Counter(key for _, tensors in parts for key in tensors)
    own = []
    for unit, tensors in parts:
        block, alone = layers[unit].block, [tensor for key, tensor in tensors.items() if num_blocks[key] == 1]
        if block is not None and alone:
            own.append(FrozenBlock(block, unit, alone, shared))
    return own


def _pack_tables(tables: Sequence[nn.Parameter], shared: SharedWeights | None) -> None:
    """Put them where blocks are; as they were loaded they may be a file's pages, which cannot be locked."""
    for weight in tables:
        view_VH = host_bytes(weight.nbytes, shared).view(weight.dtype).view(weight.shape)
        if shared is None or not shared.is_filled:
            view_VH.copy_(weight.data)
        weight.data = view_VH
