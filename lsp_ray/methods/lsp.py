"""LSP: linears train in the subspace of their sparse projectors, everything else as it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from lsp_ray.config import LspConfig
from lsp_ray.device.delta_linear import DeltaLinear, DeltaTarget
from lsp_ray.device.projected_linear import InSubspace, ProjectedLinear, ProjectedTarget, set_projectors
from lsp_ray.device.rounding import mixed
from lsp_ray.device.unit import Target, Unit
from lsp_ray.errors import ConfigError
from lsp_ray.methods.units import as_units, raw_targets
from lsp_ray.models.layers import Layer, LinearSite
from lsp_ray.optim.sums import SummedPart
from lsp_ray.projection.sparse_projector import BALANCED_GAIN, ProjectorSizes, SparseProjector

MIN_SIDE_PER_NNZ = 4  # a matrix with a smaller side than this times r is sent as it is: a projector would not shrink it


def projector_sizes(layers: Sequence[Layer], lsp: LspConfig) -> dict[str, ProjectorSizes]:
    """Return what each projected linear sends and must find in a file of projectors, by name.

    Raises:
        ConfigError: `lsp.subspace_dim` fits no linear of the model.
    """
    sites = [site for layer in layers for site in layer.linears]
    largest = max(sites, key=lambda site: min(site.shape), default=None)
    bound = min(largest.shape) if largest else 0
    if largest is None:
        raise ConfigError("method", "be another one, as the model has no linear to project", "lsp")
    if lsp.dim > bound:
        shape = " × ".join(map(str, largest.shape))
        raise ConfigError(
            "lsp.subspace_dim",
            f"be at most {bound}, a side of the largest linear ({largest.name}, {shape})",
            lsp.dim,
            hint="half a side is the most that is used of each",
        )
    sizes = {
        site.name: ProjectorSizes.of(site.shape, lsp.dim, lsp.nnz_per_row) for site in sites if _is_projected(site, lsp)
    }
    if not sizes:
        raise ConfigError("lsp.nnz_per_row", f"be at most {bound // MIN_SIDE_PER_NNZ} for this model", lsp.nnz_per_row)
    return sizes


def _is_projected(site: LinearSite, lsp: LspConfig) -> bool:
    return min(site.shape) >= MIN_SIDE_PER_NNZ * lsp.nnz_per_row


def lsp_payload_parts(layers: Sequence[Layer], lsp: LspConfig, *, quantized: bool = False) -> list[list[SummedPart]]:
    """What each layer sends a step, target by target; from shapes alone, so a model on the meta device will do.

    Args:
        layers: The model's.
        lsp: Sizes.
        quantized: Whether the blocks' linears are to be quantised: those without a projector then stay as they are.
    """
    sizes = projector_sizes(layers, lsp)
    gain = BALANCED_GAIN if lsp.fit == "closed_form" and lsp.balance else 1.0

    def of_linear(site: LinearSite) -> SummedPart:
        if site.name in sizes:
            return SummedPart(numel=math.prod(sizes[site.name].dims), gain=gain, decays=True)
        return SummedPart(numel=math.prod(site.shape), gain=1.0, decays=True)

    def of_parameter(parameter: torch.Tensor) -> SummedPart:
        return SummedPart(numel=parameter.numel(), gain=1.0, decays=parameter.ndim > 1)

    def trained(layer: Layer) -> list[LinearSite]:
        return [site for site in layer.linears if not _stays(layer, site, sizes, quantized=quantized)]

    return [
        [*map(of_linear, trained(layer)), *(of_parameter(site.parameter) for site in layer.parameters)]
        for layer in layers
    ]


def lsp_payload_sizes(layers: Sequence[Layer], lsp: LspConfig, *, quantized: bool = False) -> list[int]:
    """Elements that each layer sends a step, see `lsp_payload_parts`."""
    return [sum(part.numel for part in parts) for parts in lsp_payload_parts(layers, lsp, quantized=quantized)]


def _stays(layer: Layer, site: LinearSite, sizes: Mapping[str, ProjectorSizes], *, quantized: bool) -> bool:
    """Whether a linear is not trained at all."""
    return quantized and layer.block is not None and site.name not in sizes


def frozen_linears(layers: Sequence[Layer], lsp: LspConfig, *, quantized: bool) -> list[tuple[int, list[LinearSite]]]:
    """Of every block, its layer's number and the linears whose weights do not change where updates are kept apart."""
    sizes = projector_sizes(layers, lsp)
    return [
        (index, [site for site in layer.linears if quantized or site.name in sizes])
        for index, layer in enumerate(layers)
        if layer.block is not None
    ]


def lsp_units(
    layers: Sequence[Layer],
    lsp: LspConfig,
    *,
    seed: int,
    shared: Sequence[Sequence[str]] = (),
    dtype: torch.dtype | None = None,
    quantized: bool = False,
    device: torch.device | None = None,
) -> tuple[list[Unit], list[tuple[str, InSubspace]]]:
    """Put a module with projectors of random bases in the place of every linear that is large enough.

    A ProjectedLinear, or where `lsp.delta` says that updates are kept apart a DeltaLinear.

    Args:
        layers: The model's.
        lsp: Sizes.
        seed: Of the bases.
        shared: Groups of names of linears that read the same input (`shared_inputs`); in a layer they share Q.
        dtype: Of the activations, where that is not the weights'.
        quantized: See `lsp_payload_parts`.
        device: Where the linears compute; default: where their weights are.

    Returns:
        The units, and the new modules by name, in the order in which they stand in the model.
    """
    sizes = projector_sizes(layers, lsp)
    wrapped: list[tuple[str, InSubspace]] = []
    targets_of_layer: list[list[Target]] = []
    for layer in layers:
        targets: list[Target] = []
        owners: dict[int, InSubspace] = {}  # of biases whose linear is no more
        inside: dict[str, InSubspace] = {}
        for site in layer.linears:
            if _stays(layer, site, sizes, quantized=quantized):
                continue
            if site.name not in sizes:
                targets += raw_targets(site, summed=lsp.is_apart)
                continue
            projector = _drawn(site, sizes[site.name], mixed(seed, len(wrapped) + len(inside)), dtype, device)
            if lsp.is_apart:
                apart = DeltaLinear(site.module, transposed=site.transposed, projector=projector)
                targets.append(DeltaTarget(apart))
                inside[site.name] = apart
            else:
                module = ProjectedLinear(site.module, transposed=site.transposed, projector=projector)
                targets.append(ProjectedTarget(module))
                inside[site.name] = owners[id(site.module)] = module
            setattr(site.parent, site.attribute, inside[site.name])
        for parameter_site in layer.parameters:
            targets += raw_targets(parameter_site, owners.get(id(parameter_site.owner)), summed=lsp.is_apart)
        targets_of_layer.append(targets)
        for names in shared:
            _share([inside[name] for name in names if name in inside])
        wrapped += inside.items()
    return as_units(layers, targets_of_layer, summed=lsp.is_apart), wrapped


def take_projectors(linears: Sequence[tuple[str, InSubspace]], projectors: Mapping[str, SparseProjector]) -> None:
    """Give every linear the projector of its name; those with one right factor share it."""
    groups: dict[int, list[tuple[InSubspace, SparseProjector]]] = {}
    for name, module in linears:
        groups.setdefault(id(projectors[name].right), []).append((module, projectors[name]))
    for group in groups.values():
        set_projectors([module for module, _ in group], [projector for _, projector in group])


def merged_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state of the model without deltas kept apart that computes the same: W + P D Qᵀ."""
    state = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, DeltaLinear):
            for key in module.base.state_dict():
                state[f"{name}.{key}"] = state.pop(f"{name}.base.{key}")
            state[f"{name}.weight"] = module.merged()
    return state


def _share(modules: Sequence[InSubspace]) -> None:
    """Let them have the first one's right factor."""
    if len(modules) > 1:
        right = modules[0].projector.right
        set_projectors(modules, [SparseProjector(module.projector.left, right) for module in modules])


def _drawn(
    site: LinearSite, sizes: ProjectorSizes, seed: int, dtype: torch.dtype | None, device: torch.device | None
) -> SparseProjector:
    generator = torch.Generator().manual_seed(seed)
    drawn = SparseProjector.random(sizes, generator)
    return drawn.to(device or site.device, dtype or site.module.get_parameter("weight").dtype)
