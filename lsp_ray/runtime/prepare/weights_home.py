"""Where a run's frozen weights live: on the device if they fit, else in main memory, from where they come up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from transformers import PreTrainedConfig, PreTrainedModel

from lsp_ray.config import RunConfig, Weights
from lsp_ray.models.layers import Layer
from lsp_ray.models.output_head import host_tables
from lsp_ray.runtime.prepare.job_checks import can_stream
from lsp_ray.runtime.prepare.model_shape import model_shape
from lsp_ray.schedule.block_ring import FEWEST_BUFFERS
from lsp_ray.sim.forecast import WAITING_PAYLOADS
from lsp_ray.sim.hardware_profile import RESERVE_BYTES
from lsp_ray.sim.memory import device_memory, with_most_buffers
from lsp_ray.sim.model_shape import ModelShape
from lsp_ray.sim.workload import Workload

_GAPS = 0.1  # of what the allocator holds, between tensors


def with_weights(
    config: RunConfig,
    model_config: PreTrainedConfig,
    skeleton: PreTrainedModel,
    layers: Sequence[Layer],
    device_bytes: int | None,
    note: Callable[[str], None],
    *,
    quantized: bool,
    bf16: bool,
) -> tuple[RunConfig, int]:
    """The run with `runtime.weights` decided, and how many blocks' weights are then on the device at one time.

    As asked; auto is device unless only host leaves the reserve free.

    Args:
        config: The run, with its length and `lsp.delta` decided.
        model_config: The folder's.
        skeleton: The model without weights.
        layers: The skeleton's.
        device_bytes: That the run may take of the device's memory; None does not bound it.
        note: Told what was decided where host is, and what follows.
        quantized: Whether the blocks' linears are, to 4 bits unless `config.bits` says otherwise.
        bf16: Whether other weights and activations are of 2 bytes.
    """
    if config.runtime.weights == "auto":
        home: Weights = "device"
        if device_bytes is not None and can_stream(config, model_config, layers):
            there_bytes, spare_bytes = _there_bytes(config, device_bytes)
            shape = model_shape(skeleton, layers)
            needed_bytes = _needed_bytes(shape, _workload(config, quantized=quantized, bf16=bf16))
            if needed_bytes > there_bytes:
                home = "host"
                note(
                    f"runtime.weights auto: host, as {needed_bytes / 1e9:.3g} GB and {spare_bytes / 1e9:.2g} GB to "
                    f"spare do not fit into the device's {device_bytes / 1e9:.3g} GB"
                )
        config = replace(config, runtime=replace(config.runtime, weights=home))
    if not config.streams:
        return config, 0
    num_buffers = FEWEST_BUFFERS
    if device_bytes is not None:
        there_bytes, _ = _there_bytes(config, device_bytes)
        shape = model_shape(skeleton, layers)
        work = _workload(config, quantized=quantized, bf16=bf16)
        num_buffers = with_most_buffers(shape, work, _waiting_bytes(shape, work), there_bytes).weight_buffers
    note(
        f"runtime.weights host: {num_buffers} blocks' weights are on the device at one time, and each block's forward "
        "runs again in its backward, as with gradient_checkpointing"
    )
    if host_tables(skeleton).head is None:
        why = "it is trained" if skeleton.get_output_embeddings() is None else "this model changes its answer"
        note(f"runtime.weights host: the output layer stays on the device, as {why}")
    if not config.lsp.check_every:
        return config, num_buffers
    note("projectors stay to the end (lsp.check_every is 0), as weights in main memory cannot take in what others did")
    return replace(config, lsp=replace(config.lsp, check_every=0)), num_buffers


def _there_bytes(config: RunConfig, device_bytes: float) -> tuple[float, float]:
    """What a run is planned into, and what it leaves: of a memory that it was given itself a tenth, for gaps."""
    is_given = config.runtime.device_memory_gb is not None
    spare_bytes = min(RESERVE_BYTES, _GAPS * device_bytes) if is_given else RESERVE_BYTES
    return max(0.0, device_bytes - spare_bytes), spare_bytes


def _needed_bytes(shape: ModelShape, work: Workload) -> float:
    return device_memory(shape, work, _waiting_bytes(shape, work)).peak_bytes


def _waiting_bytes(shape: ModelShape, work: Workload) -> float:
    return WAITING_PAYLOADS * max(map(work.payload_bytes, shape.layers))


def _workload(config: RunConfig, *, quantized: bool, bf16: bool) -> Workload:
    return Workload(
        method="lsp",
        batch_size=config.per_device_train_batch_size,
        seq_length=config.seq_length,
        bf16=bf16,
        bits=config.bits or (4 if quantized else None),
        apart=True,
        weights="host" if config.streams else "device",
        activations=config.runtime.activations,
        gradient_checkpointing=config.recomputes,
        subspace_dim=config.lsp.dim,
        nnz_per_row=config.lsp.nnz_per_row,
        payload_dtype=config.runtime.payload_dtype,
    )
