"""DeviceWork: operations and bytes of a layer on the device, whatever the device.

Legend: T tokens, S tokens of a sequence, A features of all heads, M rows out, N columns in, F either of them, K any
width, D subspace, R non-zeros a row; e bytes of an activation.

Sources: a product of (T, N) and (N, M) takes 2·T·M·N operations, and a backward twice a forward (Kaplan et al. 2020,
Section 2.1). Attention's two products take 4·T·S·A (Chowdhery et al. 2022, Appendix B); nothing is taken off for causal
masks. A sparse factor with R non-zeros in each of F rows, times a table of width K, gathers F·R rows of the table.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lsp_ray.sim.activations import activation_bytes
from lsp_ray.sim.model_shape import LayerShape, LinearShape, ModelShape
from lsp_ray.sim.workload import Workload

ADAMW_BYTES = 28  # for an element: gradient, both moments and parameter read, all but the gradient written, 4 each
SHARD_BYTES = ADAMW_BYTES + 16  # a shard copies both moments first, to go back to if it is lost
_ROUNDING_BYTES = 44  # for an element of bfloat16: to float32 6, delta 12 and noise 12 added, masked 8, back 6
_ROUNDING_KERNEL_BYTES = 12  # the same in one pass: weight, delta and noise read, weight written
DENSE_DIM = 256  # as in projection/sparse_projector.py: up to it a GPU projects bfloat16 by a dense product
_LOGIT_BYTES = 24  # for a logit: to float32, its softmax, both gradients, back


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceWork:
    """Operations of matrix products, in the run's type and in float32 whatever that is, and bytes.

    Read and written in order; of activations, where small operators come with them; of rows gathered in any order.
    """

    flops: float = 0.0
    float32_flops: float = 0.0
    moved_bytes: float = 0.0
    activation_bytes: float = 0.0
    gathered_bytes: float = 0.0

    def __add__(self, other: DeviceWork) -> DeviceWork:
        return DeviceWork(
            flops=self.flops + other.flops,
            float32_flops=self.float32_flops + other.float32_flops,
            moved_bytes=self.moved_bytes + other.moved_bytes,
            activation_bytes=self.activation_bytes + other.activation_bytes,
            gathered_bytes=self.gathered_bytes + other.gathered_bytes,
        )


def forward_work(model: ModelShape, workload: Workload, layer: LayerShape) -> DeviceWork:
    """2·T·M·N a linear, attention, every activation written and read once, (X Q)ᵀ of projected linears."""
    tokens = workload.tokens
    work = DeviceWork(
        flops=sum(2.0 * tokens * linear.numel for linear in layer.linears) + _attention_flops(model, workload, layer),
        activation_bytes=2.0 * tokens * _passed_bytes(model, workload, layer),
    )
    for linear in layer.linears:
        if workload.method == "lora":
            work += _adapter_work(workload, linear)
        elif not workload.full_gradient:
            work += projection_work(workload, linear.columns, workload.dim_of(linear))
    return work


def backward_work(model: ModelShape, workload: Workload, layer: LayerShape) -> DeviceWork:
    """Gradients of inputs and weights, attention and activations twice the forward's; checkpointing adds a forward."""
    tokens = workload.tokens
    work = DeviceWork(
        flops=sum(2.0 * tokens * linear.numel for linear in layer.linears)
        + 2.0 * _attention_flops(model, workload, layer),
        activation_bytes=4.0 * tokens * _passed_bytes(model, workload, layer),
    )
    for linear in layer.linears:
        work += _weight_gradient(workload, linear)
    if workload.gradient_checkpointing and layer.is_block:
        work += forward_work(model, workload, layer)
    return work


def loss_work(model: ModelShape, workload: Workload) -> DeviceWork:
    """Logits and their input's gradient, 2 a target each an element of the frozen output embedding, and the softmax."""
    return DeviceWork(
        flops=4.0 * workload.targets * model.hidden_size * model.num_logits,
        moved_bytes=float(_LOGIT_BYTES * workload.targets * model.num_logits),
    )


def apply_work(workload: Workload, layer: LayerShape, *, on_gpu: bool) -> DeviceWork:
    """W ← W + P δ Qᵀ: two gathers in float32, the delta written, and added.

    The CPU's kernel for bfloat16 writes and reads no delta.
    """
    add_bytes = _add_bytes(workload, on_gpu=on_gpu)
    written_bytes = 4 if add_bytes != _ROUNDING_KERNEL_BYTES else -4
    work = DeviceWork(moved_bytes=float(add_bytes * layer.raw_numel))
    for linear in layer.linears:
        dim = workload.dim_of(linear)
        if dim is None:
            work += DeviceWork(moved_bytes=float(add_bytes * linear.numel))
            continue
        table = linear.columns * dim
        work += DeviceWork(
            moved_bytes=float((written_bytes + add_bytes) * linear.numel + 12 * table),
            gathered_bytes=float(4 * workload.nnz_per_row * (linear.numel + table)),
        )
    return work


def device_update_work(workload: Workload, layer: LayerShape, *, on_gpu: bool) -> DeviceWork:
    """AdamW on the device, with the gradient made float32 before it and the delta added after it.

    GaLore takes each gradient down to its K dimensions and the step up again, 2·K·M·N each; its singular value
    decompositions, one in hundreds of steps, are not counted.
    """
    if workload.method == "lora":  # adapters are float32
        return DeviceWork(moved_bytes=float((ADAMW_BYTES + 16 + 12) * workload.trained_numel(layer)))
    moved_bytes = (_take_bytes(workload) + _add_bytes(workload, on_gpu=on_gpu)) * layer.numel
    moved_bytes += ADAMW_BYTES * workload.state_numel(layer)
    projected = [linear for linear in layer.linears if workload.basis_numel(linear)]
    flops = sum(4.0 * workload.galore_rank * linear.numel for linear in projected)
    moved_bytes += sum(16 * linear.numel for linear in projected)  # read, made again, gathered
    return DeviceWork(float32_flops=flops, moved_bytes=float(moved_bytes))


def _take_bytes(workload: Workload) -> int:
    """Of an element of a full gradient: made float32, then put into the payload."""
    return workload.element_bytes + (4 if workload.plain_updates else 12)


def _add_bytes(workload: Workload, *, on_gpu: bool) -> int:
    """Of an element: delta and weight read, weight written; see `device.rounding` for bfloat16."""
    if workload.plain_updates or not workload.bf16:
        return 4 + 2 * workload.element_bytes
    return _ROUNDING_BYTES if on_gpu else _ROUNDING_KERNEL_BYTES


def _weight_gradient(workload: Workload, linear: LinearShape) -> DeviceWork:
    """G = dYᵀX, 2·T·M·N; or (dY P)ᵀ(X Q), 2·T·D² and a gather; or, as in the paper, the former and then PᵀGQ."""
    if workload.method == "lora":  # products with A and B, for their gradients and for what passes through them
        return _adapter_work(workload, linear) + _adapter_work(workload, linear)
    dim = workload.dim_of(linear)
    full = DeviceWork(flops=2.0 * workload.tokens * linear.numel)
    if dim is None and (workload.stays_on_device or workload.plain_updates):
        return full  # what native does with it belongs to its update
    if dim is None:
        return full + DeviceWork(moved_bytes=float(_take_bytes(workload) * linear.numel))
    if not workload.full_gradient:
        return projection_work(workload, linear.rows, dim) + DeviceWork(flops=2.0 * workload.tokens * dim * dim)
    element, half = workload.element_bytes, dim * linear.columns
    return full + DeviceWork(
        moved_bytes=float(element * (3 * half + dim * dim)),
        gathered_bytes=float(element * workload.nnz_per_row * (linear.numel + half)),
    )


def projection_work(workload: Workload, width: int, dim: int | None) -> DeviceWork:
    """(X Q)ᵀ or (dY P)ᵀ: 2·T·F·D and the factor made dense; or, where `gathering_work` is less, that."""
    if dim is None:
        return DeviceWork()
    if not workload.bf16 or dim > DENSE_DIM:
        return gathering_work(workload, width, dim)
    element, tokens = workload.element_bytes, workload.tokens
    moved = element * (2 * width * dim + tokens * (width + dim))
    return DeviceWork(flops=2.0 * tokens * width * dim, moved_bytes=float(moved))


def gathering_work(workload: Workload, width: int, dim: int) -> DeviceWork:
    """The (T, F) matrix transposed, F·R rows of T gathered, (D, T) written."""
    row_bytes = workload.tokens * workload.element_bytes
    return DeviceWork(
        moved_bytes=float(row_bytes * (2 * width + dim)), gathered_bytes=float(row_bytes * width * workload.nnz_per_row)
    )


def _passed_bytes(model: ModelShape, workload: Workload, layer: LayerShape) -> float:
    """Of a token's activations that a block writes and reads again; what LoRA's adapters add is in `_adapter_work`."""
    plain = replace(workload, method="native") if workload.method == "lora" else workload
    return activation_bytes(model, plain, layer)


def _adapter_work(workload: Workload, linear: LinearShape) -> DeviceWork:
    """(X A) B, 2·T·R·(M + N) in float32; X made float32 and the answer added to the linear's."""
    tokens, element = workload.tokens, workload.element_bytes
    cast_bytes = (4 + element) * linear.columns if workload.bf16 else 0
    return DeviceWork(
        float32_flops=2.0 * tokens * workload.lora_rank * (linear.rows + linear.columns),
        moved_bytes=float(tokens * (cast_bytes + (8 + 2 * element) * linear.rows)),
    )


def _attention_flops(model: ModelShape, workload: Workload, layer: LayerShape) -> float:
    if not layer.is_block:
        return 0.0
    return 4.0 * workload.tokens * workload.padded_length * model.attention_width
