"""DeviceWork: operations and bytes of a layer on the device, whatever the device.

Legend: T tokens, S tokens of a sequence, A features of all heads, M rows out, N columns in, F either of them, D and E
columns of P and Q, R non-zeros a row.

Sources: a product of (T, N) and (N, M) takes 2·T·M·N operations, and a backward twice a forward (Kaplan et al. 2020,
Section 2.1). Attention's two products take 4·T·S·A (Chowdhery et al. 2022, Appendix B); nothing is taken off for causal
masks. A product with a factor of F rows takes 2·F·R operations a row of what comes out, whatever D is: many small ones,
which have a rate of their own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lsp_ray.sim.activations import activation_bytes
from lsp_ray.sim.model_shape import LayerShape, LinearShape, ModelShape
from lsp_ray.sim.store import payload_bytes
from lsp_ray.sim.workload import ADAMW_BYTES, Workload

_LOGIT_BYTES = 24  # for a logit: to float32, its softmax, both gradients, back


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceWork:
    """Operations, and bytes that are read and written.

    Of matrix products in the run's type, in float32 whatever that is, and with a projector's blocks; bytes in order,
    and of activations, where small operators come with them.
    """

    flops: float = 0.0
    float32_flops: float = 0.0
    block_flops: float = 0.0
    moved_bytes: float = 0.0
    activation_bytes: float = 0.0

    def __add__(self, other: DeviceWork) -> DeviceWork:
        return DeviceWork(
            flops=self.flops + other.flops,
            float32_flops=self.float32_flops + other.float32_flops,
            block_flops=self.block_flops + other.block_flops,
            moved_bytes=self.moved_bytes + other.moved_bytes,
            activation_bytes=self.activation_bytes + other.activation_bytes,
        )


def forward_work(model: ModelShape, workload: Workload, layer: LayerShape) -> DeviceWork:
    """2·T·M·N a linear, attention, every activation written and read once, X Q of every input that is projected.

    Updates that are kept apart add ((X Q) Dᵀ) Pᵀ, 2·T·D·E and P's blocks; a quantised weight is dequantised first.
    """
    tokens = workload.tokens
    work = DeviceWork(
        flops=sum(2.0 * tokens * linear.numel for linear in layer.linears) + _attention_flops(model, workload, layer),
        activation_bytes=2.0 * tokens * _passed_bytes(model, workload, layer),
    )
    if workload.method == "lora":
        for linear in layer.linears:
            work += _adapter_work(workload, linear)
    if not workload.full_gradient:
        for columns, dim in workload.projected_inputs(layer):
            work += projection_work(workload, columns, dim)
    for linear in layer.linears:
        work += _dequantizing_work(workload, layer, linear)
        if workload.is_apart and (dims := workload.dims_of(linear)):
            product = DeviceWork(flops=2.0 * workload.tokens * dims[0] * dims[1])
            work += product + _expansion_work(workload, linear.rows, dims[0], num_passes=2)
    return work


def backward_work(model: ModelShape, workload: Workload, layer: LayerShape) -> DeviceWork:
    """Gradients of inputs and weights, and attention twice the forward's; checkpointing adds a forward.

    Of activations, every gradient is written and read, and what the forward kept is read as often. Of updates kept
    apart, (dY P) D takes 2·T·D·E, and what comes of it for all that read an input is brought back to it once.
    """
    tokens = workload.tokens
    passed_bytes = _passed_bytes(model, workload, layer)
    kept_bytes = activation_bytes(model, workload, layer) if workload.method == "lsp" else passed_bytes
    work = DeviceWork(
        flops=sum(2.0 * tokens * linear.numel for linear in layer.linears)
        + 2.0 * _attention_flops(model, workload, layer),
        activation_bytes=2.0 * tokens * (passed_bytes + kept_bytes),
    )
    for linear in layer.linears:
        work += _weight_gradient(workload, layer, linear) + _dequantizing_work(workload, layer, linear)
        if workload.is_apart and (dims := workload.dims_of(linear)):
            work += DeviceWork(flops=2.0 * workload.tokens * dims[0] * dims[1])
    if workload.is_apart:
        for columns, dim in workload.projected_inputs(layer):
            work += _expansion_work(workload, columns, dim, num_passes=4)
    if workload.gradient_checkpointing and layer.is_block:
        work += forward_work(model, workload, layer)
    return work


def loss_work(model: ModelShape, workload: Workload) -> DeviceWork:
    """Logits and their input's gradient, 2 a target each an element of the frozen output embedding, and the softmax."""
    return DeviceWork(
        flops=4.0 * workload.targets * model.hidden_size * model.num_logits,
        moved_bytes=float(_LOGIT_BYTES * workload.targets * model.num_logits),
    )


def apply_work(workload: Workload, layer: LayerShape) -> DeviceWork:
    """W ← W + P δ Qᵀ in one pass over W; δ Qᵀ (D, N) is made R rows at a time and never moved. Else W ← W + δ.

    Where updates are kept apart D is written anew, and other parameters from what they began with.
    """
    if workload.is_apart:
        written_bytes = workload.element_bytes * (workload.payload_numel(layer) + layer.raw_numel)
        return DeviceWork(moved_bytes=float(workload.payload_bytes(layer) + written_bytes))
    moved_bytes = _add_bytes(workload) * layer.numel + workload.payload_bytes(layer)
    block_flops, raw_numel = 0.0, layer.raw_numel
    for linear in layer.linears:
        if (dims := workload.dims_of(linear)) is None:
            raw_numel += linear.numel
        else:
            block_flops += 2.0 * workload.nnz_per_row * (linear.numel + dims[0] * linear.columns)
    if not workload.plain_updates and workload.payload_dtype != "float32":
        moved_bytes += 8 * raw_numel  # made float32 first
    return DeviceWork(block_flops=block_flops, moved_bytes=float(moved_bytes))


def device_update_work(workload: Workload, layer: LayerShape) -> DeviceWork:
    """AdamW on the device, with the gradient put into a float32 payload before it and the delta added after it.

    GaLore takes each gradient down to its K dimensions and the step up again, 2·K·M·N each; its singular value
    decompositions, one in hundreds of steps, are not counted.
    """
    if workload.method == "lora":  # adapters are float32
        return DeviceWork(moved_bytes=float((ADAMW_BYTES + 16 + 12) * workload.trained_numel(layer)))
    moved_bytes = (workload.element_bytes + 8 + _add_bytes(workload)) * layer.numel
    moved_bytes += ADAMW_BYTES * workload.state_numel(layer)
    projected = [linear for linear in layer.linears if workload.basis_numel(linear)]
    flops = sum(4.0 * workload.galore_rank * linear.numel for linear in projected)
    moved_bytes += sum(16 * linear.numel for linear in projected)  # read, made again, gathered
    return DeviceWork(float32_flops=flops, moved_bytes=float(moved_bytes))


def _add_bytes(workload: Workload) -> int:
    """Of an element of a weight: read and written, and the noise that rounds bfloat16 read; the delta comes on top."""
    noise_bytes = 0 if workload.plain_updates or not workload.bf16 else 2
    return 2 * workload.element_bytes + noise_bytes


def _weight_gradient(workload: Workload, layer: LayerShape, linear: LinearShape) -> DeviceWork:
    """G = dYᵀX, 2·T·M·N; or dY P and (dY P)ᵀ(X Q), 2·T·D·E; or, as in the paper, the former and then PᵀGQ."""
    if workload.method == "lora":  # products with A and B, for their gradients and for what passes through them
        return _adapter_work(workload, linear) + _adapter_work(workload, linear)
    if not workload.trains(layer, linear):
        return DeviceWork()
    dims = workload.dims_of(linear)
    rows, columns = dims or (linear.rows, linear.columns)
    full = DeviceWork(flops=2.0 * workload.tokens * linear.numel)
    if dims is None and (workload.stays_on_device or workload.plain_updates):
        return full  # what native does with it belongs to its update
    if dims is not None and workload.full_gradient:
        right = _block_work(workload, linear.rows, linear.columns, columns)
        return full + right + _block_work(workload, columns, linear.rows, rows)
    sent = payload_bytes(rows * columns, workload.payload_dtype)
    if dims is None:
        return full + DeviceWork(moved_bytes=float(workload.element_bytes * linear.numel + sent))
    # what is compressed is made float32 before it is put into the payload
    work = DeviceWork(
        flops=2.0 * workload.tokens * rows * columns,
        moved_bytes=float((workload.element_bytes + 8) * rows * columns + sent),
    )
    return work + projection_work(workload, linear.rows, rows)


def projection_work(workload: Workload, width: int, dim: int) -> DeviceWork:
    """X Q or dY P: (T, F) read, (G, T, R) written, and put into the order of (T, D)."""
    return _block_work(workload, workload.tokens, width, dim)


def _block_work(workload: Workload, num_rows: int, width: int, dim: int) -> DeviceWork:
    return DeviceWork(
        block_flops=2.0 * num_rows * width * workload.nnz_per_row,
        moved_bytes=float(workload.element_bytes * num_rows * (width + 3 * dim)),
    )


def _expansion_work(workload: Workload, width: int, dim: int, *, num_passes: int) -> DeviceWork:
    """A table of (T, D) times Pᵀ or Qᵀ, whose (T, F) is read or written so many times until it is added."""
    return DeviceWork(
        block_flops=2.0 * workload.tokens * width * workload.nnz_per_row,
        moved_bytes=float(workload.element_bytes * workload.tokens * (num_passes * width + dim)),
    )


def _dequantizing_work(workload: Workload, layer: LayerShape, linear: LinearShape) -> DeviceWork:
    """The weight read as it is kept, and written as it is for a product: at the rate of activations, as measured."""
    if not workload.is_quantized(layer):
        return DeviceWork()
    return DeviceWork(activation_bytes=workload.weight_bytes(layer, linear) + workload.element_bytes * linear.numel)


def _passed_bytes(model: ModelShape, workload: Workload, layer: LayerShape) -> float:
    """Of a token's activations that a block writes and reads; what adapters and projectors add is counted with them."""
    return activation_bytes(model, replace(workload, method="native", bits=None, weights="device"), layer)


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
