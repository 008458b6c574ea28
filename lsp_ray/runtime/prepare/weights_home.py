"""Where a run's frozen weights live: on the device if they fit, else in main memory, from where they come up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from transformers import PreTrainedConfig, PreTrainedModel

from lsp_ray.config import RunConfig, Weights
from lsp_ray.models.layers import Layer
from lsp_ray.runtime.prepare.job_checks import can_stream
from lsp_ray.runtime.prepare.model_shape import model_shape
from lsp_ray.sim.hardware_profile import RESERVE_BYTES
from lsp_ray.sim.memory import device_memory
from lsp_ray.sim.workload import Workload


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
) -> RunConfig:
    """The run with `runtime.weights` decided: as asked; auto is device unless only host leaves the reserve free.

    Args:
        config: The run, with its length and `lsp.delta` decided.
        model_config: The folder's.
        skeleton: The model without weights.
        layers: The skeleton's.
        device_bytes: Of the device's memory; None does not bound it, as where it is main memory itself.
        note: Told what was decided where host is, and what follows.
        quantized: Whether the blocks' linears are, to 4 bits unless `config.bits` says otherwise.
        bf16: Whether other weights and activations are of 2 bytes.
    """
    if config.runtime.weights == "auto":
        home: Weights = "device"
        if device_bytes is not None and can_stream(config, model_config, layers):
            needed_bytes = _needed_bytes(config, skeleton, layers, quantized=quantized, bf16=bf16)
            if needed_bytes + RESERVE_BYTES > device_bytes:
                home = "host"
                note(
                    f"runtime.weights auto: host, as {needed_bytes / 1e9:.1f} GB and {RESERVE_BYTES / 1e9:g} GB to "
                    f"spare do not fit into the device's {device_bytes / 1e9:.1f} GB"
                )
        config = replace(config, runtime=replace(config.runtime, weights=home))
    if not config.streams:
        return config
    note("runtime.weights host: each block's forward runs again in its backward, as with gradient_checkpointing")
    if not config.lsp.check_every:
        return config
    note("projectors stay to the end (lsp.check_every is 0), as weights in main memory cannot take in what others did")
    return replace(config, lsp=replace(config.lsp, check_every=0))


def _needed_bytes(
    config: RunConfig, skeleton: PreTrainedModel, layers: Sequence[Layer], *, quantized: bool, bf16: bool
) -> float:
    """At the device's peak, with the weights there."""
    work = Workload(
        method="lsp",
        batch_size=config.per_device_train_batch_size,
        seq_length=config.seq_length,
        bf16=bf16,
        bits=config.bits or (4 if quantized else None),
        apart=True,
        activations=config.runtime.activations,
        gradient_checkpointing=config.recomputes,
        subspace_dim=config.lsp.dim,
        nnz_per_row=config.lsp.nnz_per_row,
        payload_dtype=config.runtime.payload_dtype,
    )
    shape = model_shape(skeleton, layers)
    waiting = 2 * max(map(work.payload_bytes, shape.layers))
    return device_memory(shape, work, waiting).peak_bytes
