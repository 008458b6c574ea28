"""What a run trains beside a base that stays as it is, in a safetensors file: adapters, or deltas that are kept apart.

For each target UNIT.POSITION: the parameter, or the D of a linear; for each linear whose base took in what another
projector's D was, base.UNIT.POSITION: the weight of that base. All are to the bit as they are on the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from lsp_ray.device.delta_linear import DeltaLinear, DeltaTarget
from lsp_ray.device.unit import Target, Unit

_BASE = "base."


def save_trained(units: Sequence[Unit], path: Path) -> None:
    """Write it."""
    save_file({name: tensor.contiguous() for name, tensor in _tensors(units)}, path)


def load_trained(units: Sequence[Unit], path: Path) -> None:
    """Read what `save_trained` wrote.

    Raises:
        ValueError: A tensor is missing, or of another shape or type.
        OSError, SafetensorError: The file cannot be read.
    """
    saved = load_file(path)
    for name, module in _delta_linears(units):
        module.is_merged = f"{_BASE}{name}" in saved
    for name, tensor in _tensors(units):
        found = saved.get(name)
        if found is None or found.shape != tensor.shape or found.dtype != tensor.dtype:
            raise ValueError(f"{path.name} holds what another run trained")
        tensor.copy_(found)


def _tensors(units: Sequence[Unit]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, target in _named(units):
        value = target.owner.delta_DE if isinstance(target, DeltaTarget) else target.leaf
        yield name, value.detach()
    for name, module in _delta_linears(units):
        if module.is_merged:
            yield f"{_BASE}{name}", module.weight.detach()


def _delta_linears(units: Sequence[Unit]) -> Iterator[tuple[str, DeltaLinear]]:
    for name, target in _named(units):
        if isinstance(target, DeltaTarget):
            yield name, target.owner


def _named(units: Sequence[Unit]) -> Iterator[tuple[str, Target]]:
    for unit in units:
        for at, target in enumerate(unit.targets):
            yield f"{unit.index}.{at}", target
