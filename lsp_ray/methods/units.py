"""From layers and targets to units; what the methods share."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lsp_ray.device.unit import RawTarget, StartedTarget, SummedUnit, Target, Unit
from lsp_ray.models.layers import Layer, LinearSite, ParameterSite


def raw_targets(
    site: LinearSite | ParameterSite, owner: nn.Module | None = None, *, summed: bool = False
) -> list[Target]:
    """The site's parameter trained as it is; `owner` stands in for a module that was replaced."""
    kind = StartedTarget if summed else RawTarget
    if isinstance(site, LinearSite):
        return [kind(site.module.get_parameter("weight"), owner or site.module)]
    return [kind(site.parameter, owner or site.owner)]


def as_units(
    layers: Sequence[Layer], targets_of_layer: Sequence[Sequence[Target]], *, summed: bool = False
) -> list[Unit]:
    """One unit a layer; the block reads it, or, outside the blocks, the modules that own its targets."""
    kind = SummedUnit if summed else Unit
    units: list[Unit] = []
    first_key = 0
    for index, (layer, targets) in enumerate(zip(layers, targets_of_layer, strict=True)):
        owners = list(dict.fromkeys(target.owner for target in targets))
        readers = owners if layer.block is None else [layer.block]
        units.append(kind(index=index, name=layer.name, targets=targets, readers=readers, first_key=first_key))
        first_key += len(targets)
    return units


def full_units(layers: Sequence[Layer]) -> list[Unit]:
    """Every trained parameter as it is: zero_offload and native."""
    targets = []
    for layer in layers:
        sites: list[LinearSite | ParameterSite] = [*layer.linears, *layer.parameters]
        targets.append([target for site in sites for target in raw_targets(site)])
    return as_units(layers, targets)


def full_payload_sizes(layers: Sequence[Layer]) -> list[int]:
    """Float32 elements that each layer sends a step when everything is sent."""
    return [
        sum(site.shape[0] * site.shape[1] for site in layer.linears)
        + sum(site.parameter.numel() for site in layer.parameters)
        for layer in layers
    ]
