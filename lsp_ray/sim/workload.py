"""Workload: what a step computes and sends, by method; no seconds yet.

Legend: T tokens, M rows out, N columns in, D and E columns of P and Q, R non-zeros a row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from lsp_ray.config import Bits, Method, PayloadDtype, Weights
from lsp_ray.errors import ConfigError
from lsp_ray.schedule.block_ring import FEWEST_BUFFERS
from lsp_ray.sim.cluster import ONE_GPU, Cluster, arrivals
from lsp_ray.sim.model_shape import LayerShape, LinearShape, ModelShape
from lsp_ray.sim.store import payload_bytes

ShardBy = Literal["layer", "slice"]
MIN_SIDE_PER_NNZ = 4  # as in methods/lsp.py: a linear with a smaller side than this times R is sent as it is
ON_QUANTIZED: tuple[Method, ...] = ("lsp", "lora")  # those that leave a base's weights as they are
ADAMW_BYTES = 28  # for an element: gradient, both moments and parameter read, all but the gradient written, 4 each
_NF4_TABLE_BYTES = 4 * (16 + 256 + 1)  # with the mean that is taken off the scales
_UNDO_BYTES = 16  # a shard copies both moments first, to go back to if it is lost
_SUM_BYTES = 20  # a sum of all updates is copied with them, read and written, and read once more to be sent
# an update with the payload's element on its way from slot to slot: bfloat16 is read twice and made float32 in parts
# that stay in a cache; of int8, as measured, torch's operators take a dozen passes, with what its rounding leaves out
_UPDATE_BYTES: dict[PayloadDtype, int] = {"float32": ADAMW_BYTES, "bfloat16": 16 + 3 * 2, "int8": ADAMW_BYTES + 66}
# where there are several parts: their sum is kept while its norm is taken in float64; each is decoded and added once.
# Measured on a core that moves 12 to 22e9 bytes a second in updates of one part: 2, 4 and 8 parts (docs/log)
_KEPT_SUM_BYTES: dict[PayloadDtype, int] = {"float32": 40, "bfloat16": 22, "int8": 14}
_PART_BYTES: dict[PayloadDtype, int] = {"float32": 14, "bfloat16": 12, "int8": 16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A step of one method.

    Attributes:
        method: What is trained, sent and applied.
        batch_size: Examples in a micro-batch.
        seq_length: Tokens of each at most.
        typical_length: Tokens to which a typical micro-batch is padded; default: seq_length.
        typical_targets: Predictions that count in a typical micro-batch; default: one for each of its tokens.
        num_micro_batches: In an optimizer update, of each of its parts.
        bf16: Weights and activations of 2 bytes, else of 4.
        bits: To which the linears of blocks are quantised (lsp, lora); None: they are as the other weights.
        apart: Whether updates are kept beside the weights and not added to them (lsp); with `bits` they are.
        weights: Where the weights that stay as they are live: on the device, or in main memory, from where they come
            up block by block (lsp, apart, with gradient checkpointing).
        weight_buffers: Blocks whose weights are then on the device at one time.
        activations: Where blocks' inputs wait for the backward (with gradient checkpointing).
        gradient_checkpointing: Whether the backward runs each block's forward again.
        subspace_dim: Columns asked for of P and of Q (lsp).
        nnz_per_row: R (lsp).
        lora_rank: Of the adapters (lora).
        galore_rank: Dimensions that a gradient's shorter side is projected onto (galore).
        num_shards: Optimizer shards of each machine that has any.
        shard_threads: Threads of each.
        shard_by: Whether a shard owns whole layers or a slice of every layer.
        pinned: Whether slots are page-locked.
        speculates: Whether updates may have to be made again once their step is judged, as with clipping.
        payload_dtype: What crosses the link, both ways; the paper's float16 is as wide as bfloat16.
        plain_updates: Whether deltas are added without rounding and shards keep nothing to go back to, as in the paper.
        full_gradient: Whether the (M, N) gradient is formed before it is compressed, as in the paper (lsp).
        cluster: The GPUs that compute the parts of a step; several only with lsp and zero_offload.
    """

    method: Method
    batch_size: int
    seq_length: int
    typical_length: int | None = None
    typical_targets: int | None = None
    num_micro_batches: int = 1
    bf16: bool = True
    bits: Bits | None = None
    apart: bool = False
    weights: Weights = "device"
    weight_buffers: int = FEWEST_BUFFERS
    activations: Weights = "device"
    gradient_checkpointing: bool = False
    subspace_dim: int = 256
    nnz_per_row: int = 8
    lora_rank: int = 8
    galore_rank: int = 128
    num_shards: int = 1
    shard_threads: int = 1
    shard_by: ShardBy = "layer"
    pinned: bool = True
    speculates: bool = False
    payload_dtype: PayloadDtype = "bfloat16"
    full_gradient: bool = False
    plain_updates: bool = False
    cluster: Cluster = ONE_GPU

    def __post_init__(self) -> None:
        counts = ("batch_size", "seq_length", "num_micro_batches", "subspace_dim", "nnz_per_row")
        for name in (*counts, "lora_rank", "galore_rank", "num_shards", "shard_threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"workload.{name}", "be at least 1", getattr(self, name))
        if self.bits is not None and self.method not in ON_QUANTIZED:
            raise ConfigError("workload.bits", f"be None for {self.method}, which changes the weights", self.bits)
        if self.streams and not (self.is_apart and self.gradient_checkpointing):
            bound = "be device but for lsp, updates apart, with gradient checkpointing"
            raise ConfigError("workload.weights", bound, self.weights)
        if self.parks_inputs and not self.gradient_checkpointing:
            raise ConfigError("workload.activations", "be device but with gradient checkpointing", self.activations)

    @property
    def full(self) -> Workload:
        """The same with the longest micro-batch there can be, a target for every token."""
        return replace(self, typical_length=None, typical_targets=None)

    @property
    def padded_length(self) -> int:
        """Tokens of each example of a typical micro-batch, padding included."""
        return self.seq_length if self.typical_length is None else self.typical_length

    @property
    def tokens(self) -> int:
        """T of a typical micro-batch, padding included."""
        return self.batch_size * self.padded_length

    @property
    def targets(self) -> int:
        """Rows of logits of a typical micro-batch."""
        return self.tokens if self.typical_targets is None else self.typical_targets

    @property
    def tokens_per_step(self) -> int:
        """Of all micro-batches of all parts."""
        return self.tokens * self.num_micro_batches * self.cluster.num_parts

    @property
    def element_bytes(self) -> int:
        """Of a weight or an activation."""
        return 2 if self.bf16 else 4

    @property
    def stays_on_device(self) -> bool:
        """Whether gradients, optimizer state and deltas never leave the device."""
        return self.method in ("native", "lora", "galore")

    @property
    def is_apart(self) -> bool:
        """Whether what is trained of a linear stays beside it, and shards keep the sum of all updates (lsp)."""
        return self.method == "lsp" and (self.apart or self.bits is not None)

    @property
    def streams(self) -> bool:
        """Whether weights come up from main memory."""
        return self.weights == "host"

    @property
    def parks_inputs(self) -> bool:
        """Whether blocks' inputs wait in main memory."""
        return self.activations == "host"

    def streamed_bytes(self, layer: LayerShape) -> float:
        """Of a layer's weights that come up, each time."""
        if not (self.streams and layer.is_block):
            return 0.0
        return sum(
            self.weight_bytes(layer, linear)
            for linear in layer.linears
            if self.bits is not None or self.dims_of(linear) is not None
        )

    def piece_bytes(self, model: ModelShape) -> list[float]:
        """Of each piece of the output embedding that comes up."""
        return [float(self.element_bytes * rows * model.hidden_size) for rows in model.head_pieces if self.streams]

    def is_quantized(self, layer: LayerShape) -> bool:
        """Whether a layer's linears are: those of blocks."""
        return self.bits is not None and layer.is_block

    def weight_bytes(self, layer: LayerShape, linear: LinearShape) -> float:
        """Of a linear's weight as it is kept.

        LLM.int8 has a float32 scale for each row.
        """
        if not self.is_quantized(layer):
            return float(self.element_bytes * linear.numel)
        if self.bits == 8:
            return float(linear.numel + 4 * linear.rows)
        return nf4_bytes(linear.numel)

    def trains(self, layer: LayerShape, linear: LinearShape) -> bool:
        """Whether a linear gets a gradient of its own; a quantised one only where it is projected (lsp)."""
        return self.method != "lora" and (not self.is_quantized(layer) or self.dims_of(linear) is not None)

    def trained_numel(self, layer: LayerShape) -> int:
        """Elements of a layer that get a gradient and a delta on the device: all of them, or its adapters'."""
        if self.method != "lora":
            return layer.numel
        return sum(self.lora_rank * (linear.rows + linear.columns) for linear in layer.linears)

    def state_numel(self, layer: LayerShape) -> int:
        """Elements of m, and of v, on the device."""
        if self.method != "galore":
            return self.trained_numel(layer)
        sides = [(linear.small_side, linear.numel) for linear in layer.linears]
        return layer.raw_numel + sum(
            self.galore_rank * numel // small if small > self.galore_rank else numel for small, numel in sides
        )

    def basis_numel(self, linear: LinearShape) -> int:
        """Elements of a linear's singular vectors (galore)."""
        is_projected = self.method == "galore" and linear.small_side > self.galore_rank
        return self.galore_rank * linear.small_side if is_projected else 0

    def dims_of(self, linear: LinearShape) -> tuple[int, int] | None:
        """(D, E) of a linear, multiples of R, each at most half of its side; None where it is not projected."""
        if self.method != "lsp" or linear.small_side < MIN_SIDE_PER_NNZ * self.nnz_per_row:
            return None
        return self._dim(linear.rows), self._dim(linear.columns)

    def _dim(self, width: int) -> int:
        return max(1, min(self.subspace_dim, width // 2) // self.nnz_per_row) * self.nnz_per_row

    def projected_inputs(self, layer: LayerShape) -> list[tuple[int, int]]:
        """(N, E) of every input that projected linears read; those that read the same one share Q and X Q."""
        pairs = [(linear, self.dims_of(linear)) for linear in layer.linears]
        return list({linear.input: (linear.columns, dims[1]) for linear, dims in pairs if dims}.values())

    def payload_numel(self, layer: LayerShape) -> int:
        """Elements that a layer sends in each direction."""
        if self.stays_on_device:
            return 0
        sent = [linear for linear in layer.linears if self.trains(layer, linear)]
        shapes = [self.dims_of(linear) or (linear.rows, linear.columns) for linear in sent]
        return layer.raw_numel + sum(rows * columns for rows, columns in shapes)

    def payload_bytes(self, layer: LayerShape) -> int:
        """Bytes that a layer sends in each direction."""
        return payload_bytes(self.payload_numel(layer), self.payload_dtype)

    def sent_bytes(self, layer: LayerShape) -> float:
        """Bytes of a layer that a machine sends to a home elsewhere: single parts, or float32 sums of several."""
        come = arrivals(self.cluster, self.payload_dtype)
        return come.sent_single * self.payload_bytes(layer) + come.sent_sums * 4 * self.payload_numel(layer)

    def summed_bytes(self, layer: LayerShape) -> float:
        """Bytes that a machine reads and writes for these sums."""
        num_summed = arrivals(self.cluster, self.payload_dtype).num_summed
        return num_summed * _PART_BYTES[self.payload_dtype] * self.payload_numel(layer)

    @property
    def sum_bytes(self) -> int:
        """Of an element that a shard reads and writes to add up all that comes, beside the update of one part."""
        if self.cluster.num_parts == 1:
            return 0
        come = arrivals(self.cluster, self.payload_dtype)
        added = (come.num_single - 1) * _PART_BYTES[self.payload_dtype] + come.num_sums * _PART_BYTES["float32"]
        return _KEPT_SUM_BYTES[self.payload_dtype] + added

    @property
    def update_bytes(self) -> int:
        """Of an element that a shard reads and writes: AdamW's with the payload's coding, and the copy of its state."""
        if self.plain_updates:
            return ADAMW_BYTES
        return _UPDATE_BYTES[self.payload_dtype] + _UNDO_BYTES + (_SUM_BYTES if self.is_apart else 0)


def nf4_bytes(numel: int) -> float:
    """Of a linear's weight in NF4.

    It has half a byte for a value, for 64 of them a scale of a byte, and for 256 of these another in float32; both
    tables of what the codes stand for come with each linear.
    """
    return numel * (1 / 2 + 1 / 64 + 4 / (64 * 256)) + _NF4_TABLE_BYTES
