"""What a run is refused for before anything slow starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from lsp_ray.config import Delta, RunConfig
from lsp_ray.data.tokenize import TokenizedRows, check_token_ids
from lsp_ray.errors import ConfigError
from lsp_ray.methods.galore import check_rank
from lsp_ray.methods.lora import check_lora
from lsp_ray.models.attention import check_packing
from lsp_ray.models.layers import Layer
from lsp_ray.models.load import check_weights, load_config, load_model, num_positions, num_token_rows
from lsp_ray.models.quantized import check_quantizer, quantization_of
from lsp_ray.models.save import check_saving
from lsp_ray.runtime.prepare.device_choice import Device


def check_model(
    skeleton: PreTrainedModel,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    tokenized: TokenizedRows,
    config: RunConfig,
    dtype: torch.dtype,
) -> None:
    """Refuse a model that cannot read these rows, or can be neither loaded nor saved."""
    _check_positions(skeleton, tokenizer, config)
    if config.packing:
        check_packing(skeleton.config, tokenized.task, config.seq_length)
    check_token_ids(tokenized, tokenizer, num_token_rows(skeleton))
    check_weights(folder)
    if quantization_of(load_config(folder)) is None:  # else its quantiser would have to be there
        load_model(folder, dtype=dtype, task=tokenized.task, label_names=tokenized.label_names, on_meta=True)
    check_saving(skeleton, tokenizer, folder)


def _check_recomputed(layers: Sequence[Layer], field: str) -> None:
    """What a block that is not checkpointed keeps, of its weights or beside its input, would be gone or too much."""
    block = _not_recomputed(layers)
    if block is not None:
        bound = f"be device for this model, whose {type(block).__name__} has no gradient checkpointing"
        raise ConfigError(field, bound, "host")


def _not_recomputed(layers: Sequence[Layer]) -> nn.Module | None:
    blocks = (layer.block for layer in layers if layer.block is not None)
    return next((block for block in blocks if not isinstance(block, GradientCheckpointingLayer)), None)


def check_sizes(config: RunConfig, num_steps: int, num_examples: int) -> None:
    """Refuse a batch that is larger than the data, and a warm-up that is longer than the run."""
    batch_size = config.examples_per_step
    kind = "packed training" if config.packing else "training"
    factors = [config.per_device_train_batch_size, config.gradient_accumulation_steps]
    names = ""
    if config.replicas > 1:
        factors.append(config.replicas)
        names = " and num_replicas"
    if batch_size > num_examples:
        raise ConfigError(
            "per_device_train_batch_size",
            f"make, times gradient_accumulation_steps{names}, at most the {num_examples} {kind} examples",
            config.per_device_train_batch_size,
            hint=f"{' × '.join(map(str, factors))} = {batch_size} examples a step, there are {num_examples}",
        )
    if config.warmup_steps >= num_steps:
        raise ConfigError("warmup_steps", f"be below the {num_steps} steps of this run", config.warmup_steps)


def check_method(layers: Sequence[Layer], config: RunConfig) -> None:
    """Refuse ranks that no linear of the model has room for, and blocks whose weights cannot come up one by one."""
    if config.method == "lora":
        check_lora(layers, config.lora)
    if config.method == "galore":
        check_rank(layers, config.galore)
    if config.streams:
        _check_recomputed(layers, "runtime.weights")
    if config.parks_inputs:
        _check_recomputed(layers, "runtime.activations")


def _check_positions(skeleton: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: RunConfig) -> None:
    bound = num_positions(skeleton.config, tokenizer)
    if config.seq_length > bound:
        raise ConfigError("max_seq_length", f"be at most {bound}, the positions of this model", config.seq_length)


def with_delta(
    config: RunConfig, model_config: PreTrainedConfig, device: Device, note: Callable[[str], None]
) -> tuple[RunConfig, bool]:
    """The run with `lsp.delta` decided, and whether the base is quantised."""
    # what comes up from main memory was quantised there
    check_quantizer(model_config, config.bits, on_gpu=device == "cuda" and not config.streams)
    found = quantization_of(model_config)
    quantized = config.bits is not None or found is not None
    if found is not None:
        _check_found(config, found)
    if not quantized:
        delta: Delta = "apart" if config.streams else "merged"
        return replace(config, lsp=replace(config.lsp, delta=config.lsp.delta or delta)), False
    if config.method == "lsp" and config.lsp.check_every:
        note("projectors stay to the end (lsp.check_every is 0), as a quantised base cannot take in what others did")
    return replace(config, lsp=replace(config.lsp, delta="apart", check_every=0)), True


def _check_found(config: RunConfig, found: Mapping[str, Any]) -> None:
    """Refuse what cannot be done with a folder's own quantised weights."""
    if config.method not in ("lsp", "lora"):
        raise ConfigError("method", "be lsp or lora, as the model's weights are quantised", config.method)
    if config.lsp.delta == "merged":
        raise ConfigError("lsp.delta", "be apart, as the model's weights are quantised", "merged")
    if config.streams and not _is_nf4(found):
        bound = "be device for this model; in 4 bits of bitsandbytes, or not quantised, weights can be host"
        raise ConfigError("runtime.weights", bound, "host")


def can_stream(config: RunConfig, model_config: PreTrainedConfig, layers: Sequence[Layer]) -> bool:
    """Whether `runtime.weights host` would be taken, for a run whose `lsp.delta` is decided."""
    found = quantization_of(model_config)
    return (
        config.method == "lsp"
        and config.lsp.is_apart
        and not config.load_in_8bit
        and (found is None or _is_nf4(found))
        and not (config.torch_compile or config.runtime.cuda_graphs)
        and _not_recomputed(layers) is None
    )


def _is_nf4(found: Mapping[str, Any]) -> bool:
    return found.get("quant_method") == "bitsandbytes" and bool(found.get("load_in_4bit"))
