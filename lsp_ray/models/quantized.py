"""Bases whose weights are quantised: as they are loaded, by transformers' own quantisers, or already in the folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from lsp_ray.config import Bits
from lsp_ray.errors import ConfigError
from lsp_ray.models.aliases import FIELD

_ROWS = 1024  # of a weight that are made at a time


def quantization_of(config: PreTrainedConfig) -> dict[str, Any] | None:
    """What a folder's config.json says of its quantised weights; None where they are not."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    return dict(found) if isinstance(found, dict) else dict(found.to_dict())


def loading_options(
    config: PreTrainedConfig, bits: Bits | None, dtype: torch.dtype, device: torch.device, whole: Sequence[str] = ()
) -> dict[str, Any]:
    """What `from_pretrained` is to be told besides; empty where nothing is quantised. `whole` linears are not."""
    if bits is None and quantization_of(config) is None:
        return {}
    options: dict[str, Any] = {"device_map": {"": str(device)}}
    if bits is not None:
        options["quantization_config"] = _bitsandbytes(bits, dtype, whole)
    return options


def check_quantizer(config: PreTrainedConfig, bits: Bits | None, *, on_gpu: bool) -> None:
    """Refuse what cannot be loaded for want of a package, or of a GPU.

    Raises:
        ConfigError: Names what is missing.
    """
    found = quantization_of(config)
    field = FIELD if bits is None else f"load_in_{bits}bit"
    if bits is not None and found is not None:
        raise ConfigError(field, f"be left out, as the model is quantised already ({found.get('quant_method')})", True)
    if bits is None and found is None:
        return
    try:
        asked: Any = found if bits is None else _bitsandbytes(bits, torch.bfloat16)
        from transformers.quantizers.auto import AutoHfQuantizer  # imports every quantiser that there is

        quantizer = AutoHfQuantizer.from_config(asked, pre_quantized=bits is None)
        quantizer.validate_environment(device_map={"": "cuda:0" if on_gpu else "cpu"})
    except (ImportError, RuntimeError, ValueError, NotImplementedError) as error:
        line = " ".join(str(error).split())[:200]
        hint = "pip install bitsandbytes" if "bitsandbytes" in line.lower() else line
        method = "bitsandbytes" if found is None else found.get("quant_method")
        value = method if bits is None else True
        raise ConfigError(
            field, f"be loaded by its quantiser, {method}, which is missing here", value, hint=hint
        ) from error


def is_quantized_linear(module: nn.Module) -> bool:
    """Whether a module stands for a linear whose weight is in no type that could be trained."""
    if not isinstance(getattr(module, "in_features", None), int) or not hasattr(module, "out_features"):
        return False
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return not any(True for _ in module.children())
    return not weight.is_floating_point() or type(weight.data) is not torch.Tensor


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
    device = next(iter([*module.parameters(recurse=False), *module.buffers(recurse=False)])).device
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
