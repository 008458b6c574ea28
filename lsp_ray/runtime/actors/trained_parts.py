"""What a run trains in its model: units, what renews their projectors, and optimizer state on the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from lsp_ray.device.backend import Backend
from lsp_ray.device.calibrate import fit_projectors
from lsp_ray.device.compute_time import compute_seconds
from lsp_ray.device.fits import fit_of
from lsp_ray.device.host_activations import HostActivations
from lsp_ray.device.projected_linear import InSubspace
from lsp_ray.device.refit import Refitter
from lsp_ray.device.refit_follower import RefitFollower
from lsp_ray.device.rounding_error import give_back_
from lsp_ray.device.shared_weights import SharedWeights
from lsp_ray.device.streamed_weights import StreamedWeights
from lsp_ray.device.switch import Takeover
from lsp_ray.device.unit import Unit
from lsp_ray.hardware import MACHINES
from lsp_ray.methods import lora
from lsp_ray.methods.galore import GaloreShard
from lsp_ray.methods.lsp import lsp_units, projector_sizes, take_projectors
from lsp_ray.methods.streaming import stream_weights
from lsp_ray.methods.units import full_payload_sizes, full_units
from lsp_ray.models.layers import Layer, find_layers
from lsp_ray.models.shared_inputs import shared_inputs
from lsp_ray.optim.shard import OptimizerShard
from lsp_ray.projection.projector_file import FILE_NAME, load_projectors
from lsp_ray.projection.sparse_projector import ProjectorSizes
from lsp_ray.runtime.actors.decided import Decided
from lsp_ray.runtime.actors.throttle import Throttle, emulating
from lsp_ray.runtime.checkpoints.saved_run import FIELD
from lsp_ray.runtime.prepare.job import Job
from lsp_ray.schedule.ops import DeltaDue, GradientReady

if TYPE_CHECKING:
    from peft import PeftModel

MEASURED_UPDATES = 6  # forward and backward of so many, before training, where it must be known what they take

News = GradientReady | DeltaDue | Takeover
"""What is told beside answers: a payload is ready to be sent, a delta is to be added, projectors take over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedParts:
    """Units, shallowest first; linears with projectors, by name; LoRA's adapters.

    `unfitted` are the names of linears whose projectors could not be learned, `missing` of those whose weights before
    rounding are not in the model's folder.
    """

    units: list[Unit]
    linears: Sequence[tuple[str, InSubspace]] = ()
    adapters: PeftModel | None = None
    unfitted: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def build(
    job: Job,
    model: PreTrainedModel,
    layers: Sequence[Layer],
    decided: Decided | None,
    device: torch.device,
    say: Callable[[str], None],
) -> TrainedParts:
    """Put into a model what its method trains; projectors are learned unless there are some.

    Args:
        job: The run.
        model: On its device.
        layers: The model's.
        decided: What another GPU has; None for the first one.
        device: Where the model computes.
        say: Told what is being done.
    """
    config = job.config
    if config.method == "lora":
        adapters, units = lora.add_adapters(model, layers, config.lora, task=job.task, seed=config.seed)
        return TrainedParts(units=units, adapters=adapters)
    if config.method != "lsp":
        return TrainedParts(units=full_units(layers))
    units, linears = lsp_units(
        layers,
        config.lsp,
        seed=config.seed,
        shared=shared_inputs(model),
        dtype=job.dtype,
        quantized=job.quantized,
        device=device,
    )
    if decided is not None:
        _take(decided, linears)
        return TrainedParts(units=units, linears=linears)
    unfitted = _with_projectors(job, model, linears, projector_sizes(layers, config.lsp), say)
    missing: list[str] = []
    if job.gives_back:
        missing = _give_back(job, model, linears, say)
    return TrainedParts(units=units, linears=linears, unfitted=unfitted, missing=missing)


def _take(decided: Decided, linears: Sequence[tuple[str, InSubspace]]) -> None:
    take_projectors(linears, decided.projectors)
    for name, linear in linears:
        if name in decided.deltas:
            linear.get_buffer("delta_DE").copy_(decided.deltas[name])


def _with_projectors(
    job: Job,
    model: PreTrainedModel,
    linears: list[tuple[str, InSubspace]],
    sizes: Mapping[str, ProjectorSizes],
    say: Callable[[str], None],
) -> list[str]:
    """Give all linears the run's projectors; returns the names of those that could not be learned."""
    lsp = job.config.lsp
    if job.saved is not None:
        take_projectors(linears, load_projectors(job.saved.state / FILE_NAME, sizes, field=FIELD))
    elif lsp.init_from is not None:
        take_projectors(linears, load_projectors(Path(lsp.init_from), sizes))
    elif lsp.fit != "random":
        return _fit(job, model, linears, say)
    return []


def _fit(
    job: Job, model: PreTrainedModel, linears: list[tuple[str, InSubspace]], say: Callable[[str], None]
) -> list[str]:
    say("collecting gradients for the projectors")
    return fit_projectors(
        model,
        linears,
        job.micro_batches.calibration(job.config.lsp.calibration_batches),
        fit_of(job.config.lsp),
        seed=job.config.seed,
        num_threads=job.layout.total_threads,
        on_fitted=lambda done, total: say(f"fitting projectors: {done} of {total}"),
    )


def _give_back(
    job: Job, model: PreTrainedModel, linears: list[tuple[str, InSubspace]], say: Callable[[str], None]
) -> list[str]:
    say("comparing weights with those before rounding")
    return give_back_(
        model,
        linears,
        job.micro_batches.calibration(job.config.lsp.calibration_batches),
        job.model_folder,
        lambda done, total: say(f"comparing weights with those before rounding: {done} of {total}"),
    )


def refitter_of(
    job: Job, units: Sequence[Unit], gpu: int, tell: Callable[[News], None]
) -> Refitter | RefitFollower | None:
    """Who renews the projectors of a GPU; the first one's tells the others' what takes over."""
    lsp, config = job.config.lsp, job.config
    if config.method != "lsp" or lsp.fit == "random" or lsp.check_every == 0:
        return None
    if gpu > 0:
        return RefitFollower(units, lsp.check_every)
    return Refitter(
        units,
        fit_of(lsp),
        check_every=lsp.check_every,
        max_bias=lsp.max_bias,
        num_sketched=config.num_sketched_steps,
        seed=config.seed,
        on_takeover=tell if job.layout.num_gpus > 1 else None,
    )


def local_shard_of(job: Job, units: Sequence[Unit], device: torch.device) -> OptimizerShard | None:
    """The optimizer's state where it stays on the device."""
    if job.config.offloads:
        return None
    if job.config.method == "galore":
        return GaloreShard(units, job.config.galore, device)
    return OptimizerShard({unit.index: unit.numel for unit in units}, device=device)


def brought(job: Job, model: PreTrainedModel, backend: Backend, shared: SharedWeights | None) -> StreamedWeights | None:
    """Bring the model to the device; returns what brings up the weights that are to stay in main memory.

    Those are put into `shared`, where others of this machine find them, or are there already.
    """
    if job.config.streams:
        return stream_weights(
            model,
            find_layers(model, job.unreached),
            job.config.lsp,
            backend,
            quantized=job.quantized,
            num_buffers=job.weight_buffers,
            shared=shared,
        )
    if not job.quantized:  # else it is there
        model.to(backend.device)  # type: ignore[arg-type]
    return None


def activations_of(
    job: Job, model: PreTrainedModel, backend: Backend, weights: StreamedWeights | None
) -> HostActivations | None:
    """The blocks' inputs, where they are to wait in main memory."""
    if job.inputs is None:
        return None
    layers = find_layers(model, job.unreached)
    blocks = [(unit, layer.block) for unit, layer in enumerate(layers) if layer.block is not None]
    link, num_pieces = (None, 0) if weights is None else (weights.link, weights.num_pieces)
    return HostActivations(blocks, backend, job.inputs.largest_bytes, up=link, num_pieces=num_pieces)


def part_seconds(job: Job, model: PreTrainedModel, backend: Backend, say: Callable[[str], None]) -> float:
    """Of a micro-batch on this GPU, whose number in a part is the same on all; before any linear is replaced."""
    say("measuring the compute of a part")
    return compute_seconds(model, [[batch] for batch in job.micro_batches.calibration(MEASURED_UPDATES)], backend)


def throttle_of(
    job: Job, model: PreTrainedModel, layers: Sequence[Layer], backend: Backend, say: Callable[[str], None]
) -> Throttle:
    """To be decided before any linear is replaced: what is emulated then does not depend on the method."""
    runtime = job.config.runtime
    if runtime.emulate is None or not job.payload_sizes:
        return Throttle(link_gbps=runtime.link_gbps, network_gbps=runtime.network_gbps)
    say("measuring the compute of a step")
    size = job.config.gradient_accumulation_steps * len(job.layout.parts_of(0))
    batches = job.micro_batches.calibration(size * MEASURED_UPDATES)
    updates = [batches[first : first + size] for first in range(0, len(batches), size)]
    compute_s = compute_seconds(model, updates, backend)
    emulated = emulating(MACHINES[runtime.emulate], compute_s=compute_s, full_numel=sum(full_payload_sizes(layers)))
    return replace(emulated, network_gbps=runtime.network_gbps)


def telling_due(gpu: int, tell: Callable[[News], None]) -> Callable[[DeltaDue], None]:
    """Tells of deltas on this GPU; no method, which would keep the device's side alive in a circle."""
    return lambda due: tell(replace(due, gpu=gpu))
