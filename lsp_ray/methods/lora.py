"""LoRA: PEFT's adapters beside the linears; their state and the optimizer's are on the device."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from lsp_ray.config import LoraConfig, Task
from lsp_ray.device.rounding import mixed
from lsp_ray.device.unit import RawTarget, Target, Unit
from lsp_ray.errors import ConfigError
from lsp_ray.methods.units import as_units
from lsp_ray.models.layers import Layer
from lsp_ray.models.quantized import dense_weight, is_quantized_linear

if TYPE_CHECKING:  # peft takes a second to import, and only this method needs it
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

ADAPTER_FOLDER = "adapter"


def check_lora(layers: Sequence[Layer], lora: LoraConfig) -> None:
    """Raise ConfigError where the adapters would be larger than every linear that they stand beside."""
    bound = max((min(site.shape) for layer in layers for site in layer.linears), default=0)
    if lora.r > bound:
        raise ConfigError("lora.r", f"be at most {bound}, the shorter side of the largest linear", lora.r)


def add_adapters(
    model: PreTrainedModel, layers: Sequence[Layer], lora: LoraConfig, *, task: Task, seed: int
) -> tuple[PeftModel, list[Unit]]:
    """Put PEFT's adapters into the model, in place, and train nothing but them and a classifier's head.

    Returns:
        PEFT's view of the model, and the units: the trained parameters of each block, then those outside.
    """
    from peft import LoraConfig as PeftLoraConfig
    from peft import TaskType, get_peft_model

    heads = [] if task == "causal_lm" else _heads(model)
    sites = [site for layer in layers for site in layer.linears if site.name.split(".")[0] not in heads]
    peft_config = PeftLoraConfig(
        task_type=TaskType.CAUSAL_LM if task == "causal_lm" else None,
        r=lora.r,
        lora_alpha=lora.lora_alpha,  # type: ignore[arg-type]
        target_modules=[site.name for site in sites],
        modules_to_save=heads or None,
        fan_in_fan_out=any(site.transposed for site in sites),
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by a name that is going away
        torch.default_generator.manual_seed(mixed(seed))
        peft_model = get_peft_model(model, peft_config)
    return peft_model, _units(model, layers)


def merged_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The state of the model without adapters that computes the same: W + (α/r) B A, added in float32.

    What is quantised is dense then.
    """
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    state = dict(model.state_dict())
    for name, module in model.named_modules():
        is_adapted = isinstance(module, LoraLayer | ModulesToSaveWrapper)
        if not is_adapted and (name.endswith(".base_layer") or not is_quantized_linear(module)):
            continue
        for key in [key for key in state if key.startswith(f"{name}.")]:
            del state[key]
        inner = module.base_layer if isinstance(module, LoraLayer) else module
        if isinstance(module, ModulesToSaveWrapper):
            inner = module.modules_to_save["default"]
        state |= {f"{name}.{key}": tensor for key, tensor in _dense_state(inner, model.dtype).items()}
        if isinstance(module, LoraLayer):
            weight = state[f"{name}.weight"]
            state[f"{name}.weight"] = (weight.float() + _delta(module).to(weight.device)).to(weight.dtype)
    return state


def _delta(module: LoraLayer) -> torch.Tensor:
    """(α/r) B A in float32: PEFT has none for what it puts beside GPTQ and AWQ."""
    up, down = (part["default"].get_parameter("weight").detach() for part in (module.lora_B, module.lora_A))
    delta: torch.Tensor = module.scaling["default"] * (up.float() @ down.float())
    return delta.t() if getattr(module, "fan_in_fan_out", False) else delta


def _dense_state(module: torch.nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    if not is_quantized_linear(module):
        return module.state_dict()
    bias = getattr(module, "bias", None)
    return {"weight": dense_weight(module, dtype)} | ({} if bias is None else {"bias": bias.detach()})


def save_adapter(peft_model: PeftModel, folder: Path) -> None:
    """Write the adapters, and a classifier's head, as PEFT's own folder."""
    # "auto" would ask the hub about the base model's vocabulary
    peft_model.save_pretrained(str(folder / ADAPTER_FOLDER), save_embedding_layers=False)


def _heads(model: PreTrainedModel) -> list[str]:
    """Modules with weights beside the pretrained body: what PEFT calls modules_to_save, as a task's data make them."""
    body = model.base_model_prefix
    return [name for name, module in model.named_children() if name != body and any(True for _ in module.parameters())]


def _units(model: PreTrainedModel, layers: Sequence[Layer]) -> list[Unit]:
    blocks = [layer for layer in layers if layer.block is not None]
    seen: set[int] = set()
    targets_of_layer = [_targets(layer.block, seen) for layer in blocks if layer.block is not None]
    outside = _targets(model, seen)
    if outside:
        blocks.append(Layer(name="outside", block=None))
        targets_of_layer.append(outside)
    return as_units(blocks, targets_of_layer)


def _targets(module: torch.nn.Module, seen: set[int]) -> list[Target]:
    """The trained parameters in the module that were not seen before."""
    targets: list[Target] = []
    for owner in module.modules():
        for parameter in owner.parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                targets.append(RawTarget(parameter, owner))
    return targets
