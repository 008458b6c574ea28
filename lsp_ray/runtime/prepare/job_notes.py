"""What a person is told of a run before it starts, a line each: of its model and of its data."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence

from transformers import PreTrainedConfig, PreTrainedModel

from lsp_ray.config import RunConfig
from lsp_ray.data.tokenize import TokenizedRows
from lsp_ray.methods.lsp import lsp_payload_sizes
from lsp_ray.methods.units import full_payload_sizes
from lsp_ray.models.layers import Layer, ParameterSite
from lsp_ray.models.text_reach import parts_of
from lsp_ray.projection.sparse_projector import ProjectorSizes
from lsp_ray.sim.store import payload_bytes, size_text

_SHOWN = 3
_LEAST_SIDE = 8  # of a matrix; smaller ones are convolutions' kernels


def model_notes(skeleton: PreTrainedModel, config: PreTrainedConfig, unreached: Collection[str]) -> Iterator[str]:
    """What of the model is trained.

    Args:
        skeleton: The model that is trained.
        config: Of the folder that it is from, which may hold more than the model does.
        unreached: Names of parameters that text does not reach.
    """
    parts = parts_of(skeleton, unreached)
    if parts:
        num_weights = sum(parameter.numel() for parameter in skeleton.parameters())
        largest = sorted(parts, key=lambda name: -parts[name])
        shown = ", ".join(largest[:_SHOWN]) + (" …" if len(largest) > _SHOWN else "")
        kept = f"{sum(parts.values()):,} of {num_weights:,} parameters stay as they are"
        yield f"{kept}, as text does not reach them: {shown}"
    if type(skeleton.config) is not type(config):
        yield f"only the language model of this {config.model_type} is trained and saved: {type(skeleton).__name__}"


def method_notes(config: RunConfig, layers: Sequence[Layer], sizes: Mapping[str, ProjectorSizes]) -> Iterator[str]:
    """What the method does otherwise than its name lets expect.

    Args:
        config: The run.
        layers: What is trained.
        sizes: Of the projected linears, by name; empty for other methods than lsp.
    """
    if config.parks_inputs and not (config.gradient_checkpointing or config.streams):
        yield "runtime.activations host: each block's forward runs again in its backward (gradient_checkpointing)"
    if config.torch_compile:
        yield "torch_compile: the first step, and the first of other sizes, compiles for a minute or more"
    cut = [size for size in sizes.values() if min(size.shape) // 2 < config.lsp.dim]
    if cut:
        smallest = min(cut, key=lambda size: size.dims[0] * size.dims[1])
        dims, shape = (f"{rows} × {columns}" for rows, columns in (smallest.dims, smallest.shape))
        yield (
            f"lsp.subspace_dim {config.lsp.dim} is cut to half a side in {len(cut)} of {len(sizes)} matrices, "
            f"such as to {dims} for one of {shape}"
        )
    fused = [site for layer in layers for site in layer.parameters if _is_fused(site)]
    if fused:
        yield from _fused_notes(fused, config, layers)


def _is_fused(site: ParameterSite) -> bool:
    """Whether it is several matrices in one, as transformers keeps experts: no method sees a linear in it."""
    return site.parameter.ndim > 2 and min(site.parameter.shape[-2:]) >= _LEAST_SIDE


def _fused_notes(fused: Sequence[ParameterSite], config: RunConfig, layers: Sequence[Layer]) -> Iterator[str]:
    numel = sum(site.parameter.numel() for site in fused)
    shape = " × ".join(map(str, fused[0].parameter.shape))
    share = f"{numel:,} of {sum(full_payload_sizes(layers)):,} trained parameters"
    what = f"matrices fused into one weight, as experts are ({fused[0].name}: {shape})"
    if config.method == "lsp":
        dtype = config.runtime.payload_dtype
        sent = sum(payload_bytes(site.parameter.numel(), dtype) for site in fused)
        total = sum(payload_bytes(size, dtype) for size in lsp_payload_sizes(layers, config.lsp))
        yield (
            f"{share} are {what}; lsp sends them uncompressed: {size_text(sent)} of {size_text(total)} each way a "
            f"step. --method lora leaves them as they are, --method native sends nothing if the device holds all"
        )
    if config.method == "galore":
        yield f"{share} are {what}; galore does not project them: their moments are on the device, whole"
    if config.method == "lora":
        yield (
            f"{numel:,} parameters are {what}; lora gives them no adapter, so they stay as they are. "
            f"--method native or zero_offload trains them"
        )


def data_notes(tokenized: TokenizedRows, config: RunConfig, num_steps: int) -> Iterator[str]:
    """What of the data is trained, and for how long."""
    num_train, num_eval = len(tokenized.train), len(tokenized.eval)
    yield f"data: {num_train} train and {num_eval} eval examples of {config.dataset}"
    yield f"data: {_length_line(tokenized, config, num_steps)}"
    if tokenized.task == "sequence_classification" and len(tokenized.label_names) == 1:
        yield "data: labels are floats, so the model learns the number (regression)"
    for line in tokenized.notes:
        yield f"data: {line}"
    if config.num_train_epochs is not None and config.steps != -1:
        yield f"num_train_epochs {config.num_train_epochs:g} is not used, as max_steps {config.steps} decides"


def _length_line(tokenized: TokenizedRows, config: RunConfig, num_steps: int) -> str:
    """How long a run is, and how long its examples."""
    size = config.examples_per_step
    num_train = len(tokenized.train)
    epochs = num_steps * size / num_train if config.steps != -1 else config.epochs
    parts = [f"{num_train:,} examples, {_rounded(epochs)}, {num_steps:,} steps of {size}"]
    if tokenized.max_seq_length:
        num_rows = num_train + len(tokenized.eval) + tokenized.num_dropped
        held = math.floor(100 * (1 - tokenized.num_truncated / num_rows))
        parts.append(f"{tokenized.max_seq_length} tokens hold {held} % of them")
    return "; ".join(parts)


def _rounded(epochs: float) -> str:
    return f"{epochs:.3g} {'epoch' if epochs == 1 else 'epochs'}"
