"""Deltas kept apart, as an adapter that PEFT loads beside the same base: A = Qᵀ and B = P D, or of a smaller rank.

Whatever else was trained goes with it: whole modules without a projector (norms, a classifier's head) as PEFT's
modules_to_save, biases of linears under their names.

Legend: M rows (out), N columns (in), D × E of a delta, K the adapter's rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from lsp_ray.config import Task
from lsp_ray.device.delta_linear import DeltaLinear
from lsp_ray.device.unit import StartedTarget, Unit
from lsp_ray.methods.lora import ADAPTER_FOLDER
from lsp_ray.projection.block_factor import BlockFactor

_PREFIX = "base_model.model."
_WEIGHTS = "adapter_model.safetensors"


def save_adapter(
    model: nn.Module, units: Sequence[Unit], folder: Path, *, base: str, task: Task, rank: int | None = None
) -> float:
    """Write `adapter/` into a run's folder.

    Args:
        model: With its DeltaLinears.
        units: What was trained.
        folder: The run's.
        base: What the run began with, for PEFT's configuration.
        task: What it was trained for.
        rank: At most so many directions a linear, by singular value decomposition; default: all.

    Returns:
        The share of the update's norm that is kept, 1 without a rank.
    """
    from peft import LoraConfig, TaskType

    linears = {name: module for name, module in model.named_modules() if isinstance(module, DeltaLinear)}
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    kept = whole = 0.0
    for name, linear in linears.items():
        down_KN, up_MK, kept_square, square = factors(linear, rank)
        kept, whole, ranks[name] = kept + kept_square, whole + square, len(down_KN)
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = down_KN
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = up_MK
    modules, others = _others(model, units, linears)
    (folder / ADAPTER_FOLDER).mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.cpu().contiguous() for name, tensor in (tensors | others).items()}, _path(folder))
    most = max(ranks.values())
    LoraConfig(
        task_type=TaskType.CAUSAL_LM if task == "causal_lm" else TaskType.SEQ_CLS,
        base_model_name_or_path=base,
        r=most,
        lora_alpha=most,
        rank_pattern={name: size for name, size in ranks.items() if size != most},
        alpha_pattern={name: size for name, size in ranks.items() if size != most},
        target_modules=sorted(linears),
        modules_to_save=modules or None,
        fan_in_fan_out=any(linear.transposed for linear in linears.values()),
        inference_mode=True,
    ).save_pretrained(str(folder / ADAPTER_FOLDER))
    return math.sqrt(kept / whole) if whole else 1.0


def factors(linear: DeltaLinear, rank: int | None = None) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """Return A (K, N) and B (M, K) with B A ≈ P D Qᵀ, the square of the norm that they keep, and of all.

    A of all directions is Qᵀ in its own type; everything else is float32.
    """
    left, right = linear.projector.left, linear.projector.right
    float_left, float_right = (factor.to(factor.value_FR.device, torch.float32) for factor in (left, right))
    up_ME = float_left.spread(linear.delta_DE.float())
    if rank is None or rank >= right.dim:
        return right.dense().t(), up_ME, 1.0, 1.0
    bases = [_orthonormal(factor) for factor in (float_left, float_right)]
    # of orthonormal bases' coefficients the singular values are those of the update itself
    table_DE = bases[0].project(up_ME.t()).t()
    table_DE = bases[1].project(float_right.spread(table_DE.t()).t())
    u_DK, value_K, v_KE = torch.linalg.svd(table_DE, full_matrices=False)
    up_MK = bases[0].spread(u_DK[:, :rank] * value_K[:rank])
    down_KN = bases[1].spread(v_KE[:rank].t()).t()
    squares = value_K.double().square()
    return down_KN, up_MK, float(squares[:rank].sum()), float(squares.sum())


def _orthonormal(factor: BlockFactor) -> BlockFactor:
    """A factor whose columns span what this one's do, without the scale of its rows."""
    return factor.with_bases(torch.linalg.qr(block_GSR).Q for block_GSR in factor.blocks())


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


def _path(folder: Path) -> Path:
    return folder / ADAPTER_FOLDER / _WEIGHTS
