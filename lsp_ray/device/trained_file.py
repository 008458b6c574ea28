"""What a run trains, in a safetensors file: weights; beside a base that stays as it is, adapters or deltas kept apart.

For each target UNIT.POSITION: the parameter, the weight of a linear, or its D; for each linear whose base took in what
another projector's D was, base.UNIT.POSITION: the weight of that base. All are to the bit as they are on the device.
Where another run may begin with it, the metadata say on which weights all of it stands.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lsp_ray.device.delta_linear import DeltaLinear, DeltaTarget
from lsp_ray.device.projected_linear import ProjectedTarget
from lsp_ray.device.unit import Target, Unit
from lsp_ray.optim.sums import SummedPart

_BASE = "base."
_DIGEST = "base"


def save_trained(units: Sequence[Unit], path: Path, *, digest: str | None = None) -> None:
    """Write it, with the digest of the base's weights."""
    metadata = None if digest is None else {_DIGEST: digest}
    save_file({name: tensor.contiguous() for name, tensor in _tensors(units)}, path, metadata)


def load_trained(units: Sequence[Unit], path: Path) -> None:
    """Read what `save_trained` wrote, of any floating type.

    Raises:
        ValueError: A tensor is missing, of another shape or no floating type.
        OSError, SafetensorError: The file cannot be read.
    """
    saved = load_file(path)
    for name, module in _delta_linears(units):
        module.is_merged = f"{_BASE}{name}" in saved
    for name, tensor in _tensors(units):
        found = saved.get(name)
        if found is None or found.shape != tensor.shape or not found.is_floating_point():
            raise ValueError(f"{path.name} holds what another run trained")
        tensor.copy_(found)


def trained_digest(path: Path) -> str | None:
    """The digest that a file was written with.

    Raises:
        OSError, SafetensorError: It cannot be read.
    """
    with safe_open(path, framework="pt") as content:
        metadata: Mapping[str, str] = content.metadata() or {}
        return metadata.get(_DIGEST)


def check_trained(path: Path, sums: Sequence[Sequence[SummedPart]]) -> bool:
    """Refuse a file with which units of these parts cannot begin; returns whether a base has changed in it.

    Raises:
        ValueError: A tensor is missing or too many, of another size, of no floating type or not finite.
        OSError, SafetensorError: It cannot be read.
    """
    needed = {f"{unit}.{at}": part.numel for unit, parts in enumerate(sums) for at, part in enumerate(parts)}
    with safe_open(path, framework="pt") as content:
        names = set(content.keys())
        bases = {name for name in names if name.startswith(_BASE) and name.removeprefix(_BASE) in needed}
        if names - bases != set(needed):
            raise ValueError("it holds what another run trained")
        for name in sorted(names):
            tensor: torch.Tensor = content.get_tensor(name)
            if name in needed and tensor.numel() != needed[name]:
                raise ValueError(f"{name} has {tensor.numel()} values, not {needed[name]}")
            if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
                raise ValueError(f"{name} is no finite tensor")
    return bool(bases)


def _tensors(units: Sequence[Unit]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, target in _named(units):
        match target:
            case DeltaTarget():
                yield name, target.owner.delta_DE.detach()
            case ProjectedTarget():
                yield name, target.owner.weight_MN.detach()
            case _:
                yield name, target.leaf.detach()
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
