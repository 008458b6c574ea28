"""LSP: linears train in the subspace of their sparse projectors, everything else as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from lsp_ray.config import LspConfig
from lsp_ray.device.projected_linear import ProjectedLinear, ProjectedTarget, set_projectors
from lsp_ray.device.rounding import mixed
from lsp_ray.device.unit import Target, Unit
from lsp_ray.errors import ConfigError
from lsp_ray.methods.units import as_units, raw_targets
from lsp_ray.models.layers import Layer, LinearSite
from lsp_ray.projection.sparse_projector import ProjectorSizes, SparseProjector

MIN_SIDE_PER_NNZ = 4  # a matrix with a smaller side than this times r is sent as it is: a projector would not shrink it


def projector_sizes(layers: Sequence[Layer], lsp: LspConfig) -> dict[str, ProjectorSizes]:
    """Return what each projected linear sends and must find in a file of projectors, by name.

    Raises:
        ConfigError: `lsp.subspace_dim` fits no linear of the model.
    """
    sites = [site for layer in layers for site in layer.linears]
    largest = max(sites, key=lambda site: min(site.shape), default=None)
    bound = min(largest.shape) if largest else 0
    if largest is None or lsp.dim > bound:
        where = f" for {largest.name} ({largest.shape[0]} × {largest.shape[1]}), the largest linear" if largest else ""
        where += "; above half a side it is cut to that" if largest else ""
        raise ConfigError("lsp.subspace_dim", f"be at most {bound}{where}", lsp.dim)
    sizes = {
        site.name: ProjectorSizes.of(site.shape, lsp.dim, lsp.nnz_per_row) for site in sites if _is_projected(site, lsp)
    }
    if not sizes:
        raise ConfigError("lsp.nnz_per_row", f"be at most {bound // MIN_SIDE_PER_NNZ} for this model", lsp.nnz_per_row)
    return sizes


def _is_projected(site: LinearSite, lsp: LspConfig) -> bool:
    return min(site.shape) >= MIN_SIDE_PER_NNZ * lsp.nnz_per_row


def lsp_payload_sizes(layers: Sequence[Layer], lsp: LspConfig) -> list[int]:
    """Elements that each layer sends a step; from shapes alone, so a model on the meta device will do."""
    sizes = projector_sizes(layers, lsp)

    def numel(site: LinearSite) -> int:
        rows, columns = sizes[site.name].dims if site.name in sizes else site.shape
        return rows * columns

    return [
        sum(map(numel, layer.linears)) + sum(site.parameter.numel() for site in layer.parameters) for layer in layers
    ]


def lsp_units(
    layers: Sequence[Layer], lsp: LspConfig, *, seed: int, shared: Sequence[Sequence[str]] = ()
) -> tuple[list[Unit], list[tuple[str, ProjectedLinear]]]:
    """Put a ProjectedLinear with random bases in the place of every linear that is large enough.

    Args:
        layers: The model's.
        lsp: Sizes.
        seed: Of the bases.
        shared: Groups of names of linears that read the same input (`shared_inputs`); in a layer they share Q.

    Returns:
        The units, and the new modules by name, in the order in which they stand in the model.
    """
    sizes = projector_sizes(layers, lsp)
    wrapped: list[tuple[str, ProjectedLinear]] = []
    targets_of_layer: list[list[Target]] = []
    for layer in layers:
        targets: list[Target] = []
        replaced: dict[int, ProjectedLinear] = {}
        inside: dict[str, ProjectedLinear] = {}
        for site in layer.linears:
            if site.name not in sizes:
                targets += raw_targets(site)
                continue
            module = _wrapped(site, sizes[site.name], mixed(seed, len(wrapped) + len(inside)))
            replaced[id(site.module)] = inside[site.name] = module
            targets.append(ProjectedTarget(module))
        for parameter_site in layer.parameters:
            targets += raw_targets(parameter_site, replaced.get(id(parameter_site.owner)))
        targets_of_layer.append(targets)
        for names in shared:
            _share([inside[name] for name in names if name in inside])
        wrapped += inside.items()
    return as_units(layers, targets_of_layer), wrapped


def take_projectors(linears: Sequence[tuple[str, ProjectedLinear]], projectors: Mapping[str, SparseProjector]) -> None:
    """Give every linear the projector of its name; those with one right factor share it."""
    groups: dict[int, list[tuple[ProjectedLinear, SparseProjector]]] = {}
    for name, module in linears:
        groups.setdefault(id(projectors[name].right), []).append((module, projectors[name]))
    for group in groups.values():
        set_projectors([module for module, _ in group], [projector for _, projector in group])


def _share(modules: Sequence[ProjectedLinear]) -> None:
    """Let them have the first one's right factor."""
    if len(modules) > 1:
        right = modules[0].projector.right
        set_projectors(modules, [SparseProjector(module.projector.left, right) for module in modules])


def _wrapped(site: LinearSite, sizes: ProjectorSizes, seed: int) -> ProjectedLinear:
    weight = site.module.get_parameter("weight")
    generator = torch.Generator().manual_seed(seed)
    projector = SparseProjector.random(sizes, generator).to(weight.device, weight.dtype)
    module = ProjectedLinear(site.module, transposed=site.transposed, projector=projector)
    setattr(site.parent, site.attribute, module)
    return module
