"""Deltas kept apart, as an adapter that PEFT loads beside the same base: A = Qᵀ and B = P D.

Whatever else was trained goes with it: whole modules without a projector (norms, a classifier's head) as PEFT's
modules_to_save, biases of linears under their names.

Legend: M rows (out), N columns (in), D × E of a delta: the adapter's rank is E.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn

from lsp_ray.config import Task
from lsp_ray.device.delta_linear import DeltaLinear
from lsp_ray.device.unit import StartedTarget, Unit
from lsp_ray.methods.adapter_rank import WEIGHTS
from lsp_ray.methods.lora import ADAPTER_FOLDER

_PREFIX = "base_model.model."


def save_adapter(model: nn.Module, units: Sequence[Unit], folder: Path, *, base: str, task: Task) -> None:
    """Write `adapter/` into a run's folder.

    Args:
        model: With its DeltaLinears.
        units: What was trained.
        folder: The run's.
        base: What the run began with, for PEFT's configuration.
        task: What it was trained for.
    """
    from peft import LoraConfig, TaskType

    linears = {name: module for name, module in model.named_modules() if isinstance(module, DeltaLinear)}
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    for name, linear in linears.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"], tensors[f"{_PREFIX}{name}.lora_B.weight"] = factors(linear)
        ranks[name] = linear.projector.right.dim
    modules, others = _others(model, units, linears)
    target = folder / ADAPTER_FOLDER
    target.mkdir(parents=True, exist_ok=True)
    content = save({name: tensor.cpu().contiguous() for name, tensor in (tensors | others).items()})
    (target / WEIGHTS).write_bytes(content)  # save_file would make it private (0600)
    most = max(ranks.values())
    fewer = {name: size for name, size in ranks.items() if size != most}
    LoraConfig(
        task_type=TaskType.CAUSAL_LM if task == "causal_lm" else TaskType.SEQ_CLS,
        base_model_name_or_path=base,
        r=most,
        lora_alpha=most,
        rank_pattern=fewer,
        alpha_pattern=fewer,
        target_modules=sorted(linears),
        modules_to_save=modules or None,
        fan_in_fan_out=any(linear.transposed for linear in linears.values()),
        inference_mode=True,
    ).save_pretrained(str(target))


def factors(linear: DeltaLinear) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A = Qᵀ (E, N) and B = P D (M, E), multiplied in float32, both in the projector's type."""
    left, right = linear.projector.left, linear.projector.right
    up_ME = left.to(linear.projector.device, torch.float32).spread(linear.delta_DE.float())
    return right.dense().t(), up_ME.to(left.value_FR.dtype)


def _others(
    model: nn.Module, units: Sequence[Unit], linears: Mapping[str, DeltaLinear]
) -> tuple[list[str], dict[str, torch.Tensor]]:
    """The modules that were trained without a projector, and all tensors that go with the adapter's."""
    names = {id(module): name for name, module in model.named_modules()}
    bases = {id(linear.base): name for name, linear in linears.items()}
    owners = {id(target.owner): target.owner for target in _started(units)}
    modules, tensors = [], {}
    for key, owner in owners.items():
        if key in bases:
            bias = owner.get_parameter("bias").detach()
            tensors[f"{_PREFIX}{bases[key]}.base_layer.bias"] = bias
            continue
        modules.append(names[key])
        for name, tensor in owner.state_dict().items():
            tensors[f"{_PREFIX}{names[key]}.{name}"] = tensor
    return modules, tensors


def _started(units: Sequence[Unit]) -> Iterator[StartedTarget]:
    for target in (target for unit in units for target in unit.targets):
        if isinstance(target, StartedTarget):
            yield target
