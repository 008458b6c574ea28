"""Memory of the device and of the host, by part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from lsp_ray.schedule.block_ring import FEWEST_BUFFERS, INPUT_BUFFERS, parked_blocks
from lsp_ray.schedule.head_pieces import CHUNK_LOGITS, positions_at_once, row_pieces
from lsp_ray.sim.activations import activation_bytes, held_input_bytes
from lsp_ray.sim.cluster import arrivals
from lsp_ray.sim.model_shape import LayerShape, LinearShape, ModelShape
from lsp_ray.sim.store import balanced, payload_bytes, slot_bytes, store_bytes
from lsp_ray.sim.workload import Workload
from lsp_ray.trace import Span, WorkStream

_CHUNK_BYTES = 8  # for a logit of a chunk: itself and its softmax in float32
_LOSS_BYTES = 12  # for a logit, while its gradient is made: log-softmax and two gradients in float32
NOISE_BYTES = 2 * ((1 << 21) + (1 << 20))  # as in device/noise.py: what weights are rounded with
_PROCESS_BYTES = 400e6  # of Python with torch, as measured; the driver, the GPU actor and every shard are one each
_KEEPER_BYTES = 200e6  # the same of what passes payloads on, one on each of several machines: 174 MB with its imports


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMemory:
    """Bytes on the device.

    Attributes:
        weights: All that are not quantised, frozen ones as well; adapters in float32 (lora).
        quantized: Weights that are, with their scales.
        noise: Random bits that weights are rounded with.
        weight_buffers: For blocks that come up from main memory, whose weights are then in neither of the two.
        deltas: D of each projected linear where it is kept apart, and what other trained parameters began with.
        projectors: R values for each row of P and Q (lsp); singular vectors in float32 (galore).
        optimizer_state: m and v in float32, where they stay on the device.
        dequantized: The largest quantised weight as it is for a product, in the type of activations; a part of the two
            that follow.
        activations: At their most, with the loss's.
        block: The largest block's in its backward, with buffers for inputs that wait in main memory.
        gradients: Of the largest layer; of all where the update is made on the device.
        payload_buffers: Payloads and deltas that are there at one time.
    """

    weights: float
    quantized: float
    noise: float
    weight_buffers: float
    deltas: float
    projectors: float
    optimizer_state: float
    dequantized: float
    activations: float
    block: float
    gradients: float
    payload_buffers: float

    @property
    def peak_bytes(self) -> float:
        """Largest sum: activations go as gradients come, so the peak is at one of the backward's ends."""
        steady = self.weights + self.quantized + self.noise + self.weight_buffers
        steady += self.deltas + self.projectors + self.optimizer_state
        return steady + max(self.activations, self.block + self.gradients + self.payload_buffers)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostMemory:
    """Bytes on the host.

    Attributes:
        object_store: Shared memory, as `sim.store` counts it.
        processes: Python with torch, several times.
        weights: On their way to a GPU, before training; where the host computes the device's own are these, and what
            is to be quantised goes one by one. Those that come up from here are here to the end.
        inputs: Of blocks, where they wait for the backward.
    """

    object_store: float
    processes: float
    weights: float
    inputs: float

    @property
    def total_bytes(self) -> float:
        """All parts."""
        return float(sum(getattr(self, field.name) for field in fields(self)))


def device_memory(model: ModelShape, workload: Workload, payload_buffers: float) -> DeviceMemory:
    """Return the device's memory; `payload_buffers` comes from `peak_payload_bytes`."""
    on_device, is_lora = workload.stays_on_device, workload.method == "lora"
    element = workload.element_bytes
    trained = [workload.trained_numel(layer) for layer in model.layers]
    gradients = [_layer_gradient_bytes(workload, layer) for layer in model.layers]
    kept = [activation_bytes(model, workload, layer) for layer in model.layers]
    held = [held_input_bytes(model, workload, layer) for layer in model.layers]
    compressing = [_compressing_bytes(workload, layer) for layer in model.layers]
    quantized = [(layer, linear) for layer in model.layers if workload.is_quantized(layer) for linear in layer.linears]
    block = max(workload.tokens * own + more for own, more in zip(kept, compressing, strict=True))
    loss = float(_loss_bytes(model, workload))
    if workload.gradient_checkpointing:  # blocks are computed again after the loss's own bytes are free
        num_blocks = sum(bytes_kept > 0 for bytes_kept in kept)
        num_inputs, buffers = num_blocks, 0.0
        if workload.parks_inputs and parked_blocks(num_blocks):  # the first one's, and buffers for the longest there is
            num_inputs, buffers = 1, float(element * model.hidden_size * INPUT_BUFFERS * workload.full.tokens)
        inputs = element * model.hidden_size * num_inputs * workload.tokens + buffers
        activations = inputs + workload.tokens * sum(held) + max(loss, block)
        block += buffers
    else:  # as they are when the deepest block compresses
        activations = workload.tokens * (sum(kept) + sum(held)) + max(loss, max(compressing))
    streamed = sum(map(workload.streamed_bytes, model.layers))
    in_bits = sum(workload.weight_bytes(layer, linear) for layer, linear in quantized)
    return DeviceMemory(
        weights=float(
            element * (model.num_parameters - sum(linear.numel for _, linear in quantized))
            + (4 * sum(trained) if is_lora else 0)
            - (streamed if workload.bits is None else 0.0)
            - (element * model.num_held if workload.streams else 0)
        ),
        quantized=0.0 if workload.streams else in_bits,
        noise=float(NOISE_BYTES),
        weight_buffers=workload.weight_buffers * max(_coming_bytes(model, workload), default=0.0),
        deltas=float(element * sum(map(workload.payload_numel, model.layers))) if workload.is_apart else 0.0,
        projectors=float(sum(_projector_bytes(workload, layer) for layer in model.layers)),
        optimizer_state=8.0 * sum(map(workload.state_numel, model.layers)) if on_device else 0.0,
        dequantized=max(_dequantized_bytes(workload, layer) for layer in model.layers),
        activations=activations,
        block=block,
        gradients=float(sum(gradients)) if on_device else float(max(gradients)),
        payload_buffers=_update_bytes(workload) * max(trained) if on_device else payload_buffers,
    )


def with_most_buffers(model: ModelShape, workload: Workload, payload_buffers: float, device_bytes: float) -> Workload:
    """Return the workload with as many blocks' weights on the device as fit, all of which it streams; at least 2."""
    coming = _coming_bytes(model, workload)
    if not coming:
        return workload
    fewest = replace(workload, weight_buffers=FEWEST_BUFFERS)
    left_bytes = device_bytes - device_memory(model, fewest, payload_buffers).peak_bytes
    num_more = max(0, int(left_bytes // max(coming)))
    return replace(workload, weight_buffers=max(FEWEST_BUFFERS, min(len(coming), FEWEST_BUFFERS + num_more)))


def _coming_bytes(model: ModelShape, workload: Workload) -> list[float]:
    """Of each block's weights that come up, and of each piece of the output embedding."""
    blocks = [size for size in map(workload.streamed_bytes, model.layers) if size]
    return blocks + workload.piece_bytes(model)


def _loss_bytes(model: ModelShape, workload: Workload) -> int:
    if not model.head_comes:
        return _LOSS_BYTES * workload.targets * model.num_logits
    return loss_bytes(workload.targets, model.num_logits, model.hidden_size, element_bytes=workload.element_bytes)


def loss_bytes(
    positions: int, vocabulary: int, hidden: int, *, element_bytes: int, chunk_logits: int = CHUNK_LOGITS
) -> int:
    """Bytes at their most of a loss that goes through pieces of the vocabulary, see models/piecewise_loss.py.

    Beside the logits made at one time there are for each position the mean of rows in float32, the target's row, and
    in the end the gradient of the hidden state, which is that mean where it is float32 as well.
    """
    num_rows = len(row_pieces(vocabulary, hidden)[0])
    at_once = positions_at_once(positions, num_rows, chunk_logits)
    gradient = 0 if element_bytes == 4 else element_bytes * positions * hidden
    return (4 + element_bytes) * positions * hidden + max(_CHUNK_BYTES * at_once * max(num_rows, hidden), gradient)


def host_memory(model: ModelShape, workload: Workload, *, on_gpu: bool) -> HostMemory:
    """Return the driver's machine's memory, beside what the device needs where the host computes."""
    return _host_memory(model, workload, on_gpu=on_gpu, machines=range(1))


def host_memory_elsewhere(model: ModelShape, workload: Workload, *, on_gpu: bool) -> HostMemory | None:
    """Return the same of that other machine which needs most; None: there is none."""
    cluster = workload.cluster
    if not cluster.num_away:
        return None
    machines = range(1, max(2, cluster.num_homes))  # without shards they are all alike
    return _host_memory(model, workload, on_gpu=on_gpu, machines=machines)


def _host_memory(model: ModelShape, workload: Workload, *, on_gpu: bool, machines: range) -> HostMemory:
    sizes = [] if workload.stays_on_device else [workload.payload_numel(layer) for layer in model.layers]
    cluster, is_driver = workload.cluster, machines.start == 0
    num_beside = 1 if is_driver else 0  # the driver
    if sizes and (is_driver or cluster.num_homes > 1):
        num_beside += workload.num_shards
    keeper = _KEEPER_BYTES if cluster.num_away else 0.0
    return HostMemory(
        object_store=float(max(_store_bytes(workload, sizes, machine) for machine in machines)),
        processes=(cluster.gpus_per_node + num_beside) * _PROCESS_BYTES + keeper,
        weights=_brought_bytes(model, workload, on_gpu=on_gpu),
        inputs=_parked_bytes(model, workload),
    )


def _store_bytes(workload: Workload, sizes: Sequence[int], machine: int) -> int:
    """Of a machine: slots of layers that are at home on it, as a run lays them out, and what it sends to others."""
    cluster, dtype = workload.cluster, workload.payload_dtype
    shard_of_layer = balanced(sizes, min(workload.num_shards * cluster.num_homes, max(1, len(sizes))))
    here = [layer for layer, shard in enumerate(shard_of_layer) if shard % cluster.num_homes == machine]
    come = arrivals(cluster, dtype)
    at_home = store_bytes(
        [sizes[layer] for layer in here],
        [shard_of_layer[layer] for layer in here],
        speculates=workload.speculates,
        payload_dtype=dtype,
        summed=workload.is_apart,
        num_parts=come.num_single,
        num_sums=come.num_sums,
    )
    ways = [slot_bytes(payload_bytes(sizes[layer], dtype)) for layer in set(range(len(sizes))) - set(here)]
    return at_home + (cluster.gpus_per_node * cluster.parts_per_gpu + 1) * sum(ways)


def _parked_bytes(model: ModelShape, workload: Workload) -> float:
    """Of a machine's GPUs, each with its own, page-locked for the longest micro-batch there can be."""
    if not workload.parks_inputs:
        return 0.0
    num_parked = len(parked_blocks(sum(layer.is_block for layer in model.layers)))
    input_bytes = workload.element_bytes * model.hidden_size * workload.full.tokens
    return float(workload.cluster.gpus_per_node * num_parked * input_bytes)


def _brought_bytes(model: ModelShape, workload: Workload, *, on_gpu: bool) -> float:
    """What stays here is there once for all GPUs of a machine, the first of which loads all for the others."""
    is_brought = on_gpu and workload.bits is None
    brought = float(workload.element_bytes * model.num_parameters) if is_brought else 0.0
    kept = sum(map(workload.streamed_bytes, model.layers))
    if not workload.streams:
        return workload.cluster.gpus_per_node * brought
    if workload.cluster.gpus_per_node > 1:  # and what else there is lies beside it
        linears = [linear for layer in model.layers for linear in layer.linears if workload.streamed_bytes(layer)]
        return max(brought, kept + workload.element_bytes * (model.num_parameters - sum(own.numel for own in linears)))
    return max(brought, kept + workload.element_bytes * model.num_held)


def peak_payload_bytes(spans: Sequence[Span], payload_bytes: Sequence[int]) -> int:
    """Most bytes of payloads and deltas that are on the device at one time, given a simulation's spans of one GPU.

    A payload lies there from the end of its layer's backward to the end of its way down, a delta from the start of its
    way up until the forward that added it is done.
    """
    computed: dict[int, list[Span]] = {}
    for span in sorted((span for span in spans if span.stream is WorkStream.GPU), key=lambda span: span.end_s):
        computed.setdefault(span.layer, []).append(span)
    changes: list[tuple[float, int]] = []
    for span in spans:
        size, runs = payload_bytes[span.layer], computed.get(span.layer, [])
        if span.stream is WorkStream.D2H:
            made_s = max((run.end_s for run in runs if _made(run, span)), default=span.start_s)
            changes += [(made_s, size), (span.end_s, -size)]
        elif span.stream is WorkStream.H2D:
            read_s = min((run.end_s for run in runs if _read(run, span)), default=span.end_s)
            changes += [(span.start_s, size), (read_s, -size)]
    held = peak = 0
    for _, change in sorted(changes):
        held += change
        peak = max(peak, held)
    return peak


def _made(run: Span, sent: Span) -> bool:
    return (run.step, run.part) == (sent.step, sent.part) and run.end_s <= sent.start_s


def _read(run: Span, brought: Span) -> bool:
    return run.step > brought.step and run.start_s >= brought.end_s


def _compressing_bytes(workload: Workload, layer: LayerShape) -> float:
    """Bytes while a compression works: output gradients of the widest and its partner, and what comes of one.

    LoRA's adapters hold two of the widest in float32: the output's gradient and the input's. Plain autograd frees
    activations as it makes such gradients; there they do not add to the peak. A quantised weight is dequantised beside
    three gradients, LoRA's copies are gone by then.
    """
    if not layer.is_block:
        return 0.0
    widest = workload.tokens * max(max(linear.rows, linear.columns) for linear in layer.linears)
    compressing = {"lsp": 3.0 * workload.element_bytes, "lora": 8.0}.get(workload.method, 0.0) * widest
    if not workload.is_quantized(layer):
        return compressing
    return max(compressing, 3.0 * workload.element_bytes * widest + _dequantized_bytes(workload, layer))


def _dequantized_bytes(workload: Workload, layer: LayerShape) -> float:
    if not workload.is_quantized(layer):
        return 0.0
    return float(workload.element_bytes * max(linear.numel for linear in layer.linears))


def _update_bytes(workload: Workload) -> float:
    """Of an element while its layer is updated on the device: gradient and delta in float32; parts of a delta first."""
    return 12.0 if workload.method == "galore" else 8.0


def _layer_gradient_bytes(workload: Workload, layer: LayerShape) -> int:
    if workload.method == "lora":
        return 4 * workload.trained_numel(layer)
    trained = [linear for linear in layer.linears if workload.trains(layer, linear)]
    return sum(_gradient_bytes(workload, linear) for linear in trained) + workload.element_bytes * layer.raw_numel


def _gradient_bytes(workload: Workload, linear: LinearShape) -> int:
    dims = workload.dims_of(linear)
    if dims is None or workload.full_gradient:
        return workload.element_bytes * linear.numel
    return 4 * dims[0] * dims[1]


def _projector_bytes(workload: Workload, layer: LayerShape) -> int:
    """Paper, Section 3: O((M + N)·R) for both, whatever D is; linears that read the same input share Q."""
    if workload.method == "galore":
        return 4 * sum(map(workload.basis_numel, layer.linears))
    rows = sum(linear.rows for linear in layer.linears if workload.dims_of(linear))
    columns = sum(columns for columns, _ in workload.projected_inputs(layer))
    return workload.element_bytes * workload.nnz_per_row * (rows + columns)
