"""Bases whose weights are quantised: as they are loaded, by transformers' own quantisers, or already in the folder."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from lsp_ray.config import Bits
from lsp_ray.errors import ConfigError
from lsp_ray.models.aliases import FIELD

_ROWS = 1024  # of a weight that are made at a time
_PROBE_ROWS = 8
_OTHER = "a model that is not quantised trains in 4 bits with --load_in_4bit true"


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A kind of quantised weights that runs begin with.

    Attributes:
        packages: What loads it, under names that pip knows as well.
        options: What its quantiser is told besides: to take kernels that have a backward.
        has_parameters: Whether biases beside such weights are parameters; else they are buffers, and stay.
    """

    packages: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    has_parameters: bool = True


_TRAINABLE = {"backend": "auto_trainable"}
FORMATS = {
    "awq": Format(packages=("gptqmodel",), options=_TRAINABLE, has_parameters=False),
    "bitsandbytes": Format(packages=("bitsandbytes",)),
    "gptq": Format(packages=("gptqmodel", "optimum"), options=_TRAINABLE, has_parameters=False),
    "torchao": Format(packages=("torchao",)),
}


def quantization_of(config: PreTrainedConfig) -> dict[str, Any] | None:
    """What a folder's config.json says of its quantised weights, `quant_method` first of all; None: they are not.

    Raises:
        ConfigError: They are in no format of `FORMATS`.
    """
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    told = dict(found) if isinstance(found, dict) else dict(found.to_dict())
    if told.get("load_in_4bit") or told.get("load_in_8bit"):  # older folders say no more
        told["quant_method"] = "bitsandbytes"
    method = str(getattr(told.get("quant_method"), "value", told.get("quant_method")))
    if method not in FORMATS:
        *others, last = FORMATS
        bound = f"be quantised by {', '.join(others)} or {last}, or not at all"
        raise ConfigError(FIELD, bound, method, hint=_OTHER)
    return told | {"quant_method": method}


def bits_of(found: Mapping[str, Any]) -> Bits:
    """The nearer of 4 and 8 to what a weight takes, by `quantization_of`."""
    if "quant_type" in found:  # torchao keeps all but its own int4 in bytes
        return 4 if '"Int4' in json.dumps(found["quant_type"], default=str) else 8
    bits = 8 if found.get("load_in_8bit") else found.get("bits", 4)
    return 8 if isinstance(bits, int) and bits > 4 else 4


def freeze_biases(model: nn.Module, found: Mapping[str, Any]) -> None:
    """Make buffers of a skeleton's biases where its format does, so that it says what is trained."""
    if FORMATS[found["quant_method"]].has_parameters:
        return
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D) and module.bias is not None:
            bias = module.bias.detach()
            del module.bias
            module.register_buffer("bias", bias)


def loading_options(
    config: PreTrainedConfig, bits: Bits | None, dtype: torch.dtype, device: torch.device, whole: Sequence[str] = ()
) -> dict[str, Any]:
    """What `from_pretrained` is to be told besides; empty where nothing is quantised. `whole` linears are not."""
    found = quantization_of(config)
    if bits is None and found is None:
        return {}
    options: dict[str, Any] = {"device_map": {"": str(device)}}
    if found is not None:
        config.quantization_config = {**found, **FORMATS[found["quant_method"]].options}
    else:
        assert bits is not None
        options["quantization_config"] = _bitsandbytes(bits, dtype, whole)
    return options


def check_quantizer(config: PreTrainedConfig, bits: Bits | None, *, on_gpu: bool) -> None:
    """Refuse what cannot be loaded for want of a package, or of a GPU.

    Raises:
        ConfigError: Names what is missing.
    """
    found = quantization_of(config)
    name = FIELD if bits is None else f"load_in_{bits}bit"
    if bits is not None and found is not None:
        raise ConfigError(name, f"be left out, as the model is quantised already ({found['quant_method']})", True)
    if bits is None and found is None:
        return
    method = "bitsandbytes" if found is None else found["quant_method"]
    value = method if bits is None else True
    missing = [package for package in FORMATS[method].packages if find_spec(package) is None]
    if missing:
        bound, also = f"be loaded by {' and '.join(missing)}, missing here", f"; {_OTHER}" if bits is None else ""
        raise ConfigError(name, bound, value, hint=f"pip install {' '.join(missing)}{also}")
    try:
        asked: Any = found if bits is None else _bitsandbytes(bits, torch.bfloat16)
        from transformers.quantizers.auto import AutoHfQuantizer  # imports every quantiser that there is

        quantizer = AutoHfQuantizer.from_config(asked, pre_quantized=bits is None)
        quantizer.validate_environment(device_map={"": "cuda:0" if on_gpu else "cpu"})
    except (ImportError, LookupError, RuntimeError, TypeError, ValueError, AssertionError) as error:
        line = " ".join(str(error).split())[:200]
        raise ConfigError(name, f"be what its quantiser, {method}, can load here", value, hint=line) from error


def is_quantized_linear(module: nn.Module) -> bool:
    """Whether a module stands for a linear whose weight is in no type that could be trained.

    It has `in_features` and `out_features`, no modules in it, and a weight that is a tensor's subclass or no floating
    numbers, or none by this name.
    """
    if not isinstance(getattr(module, "in_features", None), int) or not hasattr(module, "out_features"):
        return False
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return not any(True for _ in module.children())
    return not weight.is_floating_point() or type(weight.data) is not torch.Tensor


def keep_type(model: nn.Module, dtype: torch.dtype) -> None:
    """Undo that a quantiser had all else loaded in float16, as AWQ's does on a GPU."""
    for module in model.modules():
        if not is_quantized_linear(module):
            for parameter in module.parameters(recurse=False):
                if parameter.dtype == torch.float16:
                    parameter.data = parameter.data.to(dtype)


def check_gradients(model: nn.Module, dtype: torch.dtype) -> None:
    """Refuse kernels that serve inference alone: past them there would be no gradient, and training would not show it.

    One linear of each name is tried, whatever the block.

    Raises:
        ConfigError: Names the first that has no gradient for its input.
    """
    tried: set[str] = set()
    for name, module in model.named_modules():
        kind = re.sub(r"\.\d+\.", ".*.", name)
        if kind in tried or not is_quantized_linear(module):
            continue
        tried.add(kind)
        why = _why_no_gradient(module, dtype)
        if why is not None:
            stored = type(getattr(module, "weight", module)).__name__
            bound = "be quantised for kernels that pass gradients on to their input"
            raise ConfigError(FIELD, bound, stored, hint=f"{name}: {why}; {_OTHER}")


def _why_no_gradient(module: nn.Module, dtype: torch.dtype) -> str | None:
    assert isinstance(module.in_features, int)
    input_TN = torch.ones(_PROBE_ROWS, module.in_features, dtype=dtype, device=_device(module), requires_grad=True)
    try:
        with torch.enable_grad():
            output_TM = module(input_TN)
            if not output_TM.requires_grad:
                return "its output has none"
            [grad_TN] = torch.autograd.grad(output_TM.sum(), [input_TN], allow_unused=True)
    except (RuntimeError, TypeError, ValueError) as error:
        return " ".join(str(error).split())[:200]
    return None if grad_TN is not None and bool(grad_TN.any()) else "its input gets none"


def _device(module: nn.Module) -> torch.device:
    return next(iter([*module.parameters(recurse=False), *module.buffers(recurse=False)])).device


def keep_weights(model: nn.Module) -> None:
    """Let quantised linears stay in training mode: else libraries repack their weights, in place and not exactly."""
    for module in model.modules():
        if is_quantized_linear(module):
            module.train()
            module.train = partial(_stay, module)  # type: ignore[method-assign]


def _stay(module: nn.Module, _mode: bool = True) -> nn.Module:
    return module


def frozen_tensors(module: nn.Module) -> list[torch.Tensor]:
    """All that a linear's weight is made of: in 4 bits, the scales as well, and what the codes stand for."""
    weight = module.get_parameter("weight")
    state = getattr(weight, "quant_state", None)
    if state is None:
        return [weight]
    parts = [state.absmax, state.code]
    if state.nested:
        parts += [state.offset, state.state2.absmax, state.state2.code]
    return [weight, *parts]


def read_late(module: nn.Module) -> None:
    """Let a linear's backward read its weight where it is by then; to be called once.

    bitsandbytes keeps, past checkpointing, the place where it was in the first forward. Torch's own linears do not.
    """
    if getattr(module.get_parameter("weight"), "quant_state", None) is not None:
        module.forward = partial(_ReadLate.run, module, module.forward)


class _ReadLate(torch.autograd.Function):
    """What a 4-bit linear computes, to the bit."""

    @staticmethod
    def run(module: nn.Module, plain: Callable[[torch.Tensor], torch.Tensor], input_TN: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return plain(input_TN)
        output_TM: torch.Tensor = _ReadLate.apply(  # type: ignore[no-untyped-call]
            input_TN, module.bias, module, plain
        )
        return output_TM

    @staticmethod
    def forward(
        ctx: Any,
        input_TN: torch.Tensor,
        bias_M: torch.Tensor | None,
        module: nn.Module,
        plain: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        ctx.module, ctx.dtype, ctx.bias_dtype = module, input_TN.dtype, None if bias_M is None else bias_M.dtype
        return plain(input_TN)

    @staticmethod
    def backward(ctx: Any, grad_TM: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        from bitsandbytes.functional import dequantize_4bit

        grad_TM = grad_TM.to(ctx.module.compute_dtype)
        grad_TN = grad_M = None
        if ctx.needs_input_grad[1]:
            grad_M = grad_TM.sum(0, dtype=grad_TM.dtype).to(ctx.bias_dtype)
        if ctx.needs_input_grad[0]:
            weight = ctx.module.weight
            weight_MN = dequantize_4bit(weight.data, weight.quant_state).to(grad_TM.dtype)
            grad_TN = torch.matmul(grad_TM, weight_MN).to(ctx.dtype)
        return grad_TN, grad_M, None, None


def dense_weight(module: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """The (out, in) weight that a linear of any kind computes with, on its device: what it makes of unit vectors."""
    weight = getattr(module, "weight", None)
    if not is_quantized_linear(module):
        assert isinstance(weight, torch.Tensor)
        return (weight.t() if isinstance(module, Conv1D) else weight).detach().to(dtype)
    state = getattr(weight, "quant_state", None)
    if isinstance(weight, torch.Tensor) and state is not None:  # a unit vector at a time gives the same
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, state).to(getattr(module, "compute_dtype", None) or dtype).to(dtype)
    device = _device(module)
    num_columns = int(module.in_features)  # type: ignore[arg-type]
    bias = getattr(module, "bias", None)
    parts = []
    with torch.no_grad():
        for first in range(0, num_columns, _ROWS):
            units = torch.zeros(min(_ROWS, num_columns - first), num_columns, dtype=dtype, device=device)
            units.diagonal(offset=first).fill_(1.0)
            made = module(units)
            parts.append(made if bias is None else made - bias)
    return torch.cat(parts).t().contiguous()


def _bitsandbytes(bits: Bits, dtype: torch.dtype, whole: Sequence[str] = ()) -> BitsAndBytesConfig:
    skipped = list(whole) or None
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        llm_int8_skip_modules=skipped,  # of 4 bits as well
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
