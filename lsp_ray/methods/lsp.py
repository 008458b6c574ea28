"""LSP: linears train in the subspace of their sparse projectors, everything else as it is."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lsp_ray.config import LspConfig
from lsp_ray.device.projected_linear import ProjectedLinear, ProjectedTarget
from lsp_ray.device.rounding import mixed
from lsp_ray.device.unit import Target, Unit
from lsp_ray.errors import ConfigError
from lsp_ray.methods.units import as_units, raw_targets
from lsp_ray.models.layers import Layer, LinearSite
from lsp_ray.projection.projector_file import ProjectedShape
from lsp_ray.projection.sparse_projector import SparseProjector, subspace_dim_for

MIN_SIDE_PER_NNZ = 4  # a matrix with a smaller side than this times r is sent as it is: a projector would not shrink it


def subspace_dims(layers: Sequence[Layer], lsp: LspConfig) -> dict[str, int]:
    """Return the subspace dimension of every linear that is projected, by name.

    Raises:
        ConfigError: `lsp.subspace_dim` fits no linear of the model.
    """
    sites = [site for layer in layers for site in layer.linears]
    largest = max(sites, key=lambda site: min(site.shape), default=None)
    bound = min(largest.shape) if largest else 0
    if largest is None or lsp.dim > bound:
        where = f" for {largest.name} ({largest.shape[0]} × {largest.shape[1]}), the largest linear" if largest else ""
        raise ConfigError("lsp.subspace_dim", f"be at most {bound}{where}", lsp.dim)
    dims = {site.name: subspace_dim_for(site.shape, lsp.dim) for site in sites if _is_projected(site, lsp)}
    if not dims:
        raise ConfigError("lsp.nnz_per_row", f"be at most {bound // MIN_SIDE_PER_NNZ} for this model", lsp.nnz_per_row)
    return dims


def _is_projected(site: LinearSite, lsp: LspConfig) -> bool:
    return min(site.shape) >= MIN_SIDE_PER_NNZ * lsp.nnz_per_row


def projected_shapes(layers: Sequence[Layer], lsp: LspConfig) -> dict[str, ProjectedShape]:
    """What a file of projectors must hold for these layers, by name of the linear."""
    dims = subspace_dims(layers, lsp)
    sites = [site for layer in layers for site in layer.linears if site.name in dims]
    return {site.name: ProjectedShape(shape=site.shape, dim=dims[site.name]) for site in sites}


def lsp_payload_sizes(layers: Sequence[Layer], lsp: LspConfig) -> list[int]:
    """Float32 elements that each layer sends a step; from shapes alone, so a model on the meta device will do."""
    dims = subspace_dims(layers, lsp)
    return [
        sum(dims[site.name] ** 2 if site.name in dims else site.shape[0] * site.shape[1] for site in layer.linears)
        + sum(site.parameter.numel() for site in layer.parameters)
        for layer in layers
    ]


def lsp_units(
    layers: Sequence[Layer], lsp: LspConfig, *, seed: int
) -> tuple[list[Unit], list[tuple[str, ProjectedLinear]]]:
    """Put a ProjectedLinear with a random projector in the place of every linear that is large enough.

    Returns the units and the wrapped linears by name, in the order in which they stand in the model.
    """
    dims = subspace_dims(layers, lsp)
    wrapped: list[tuple[str, ProjectedLinear]] = []
    targets_of_layer: list[list[Target]] = []
    for layer in layers:
        targets: list[Target] = []
        replaced: dict[int, ProjectedLinear] = {}
        for site in layer.linears:
            if site.name not in dims:
                targets += raw_targets(site)
                continue
            module = _wrapped(site, dims[site.name], lsp.nnz_per_row, mixed(seed, len(wrapped)))
            replaced[id(site.module)] = module
            wrapped.append((site.name, module))
            targets.append(ProjectedTarget(module))
        for parameter_site in layer.parameters:
            targets += raw_targets(parameter_site, replaced.get(id(parameter_site.owner)))
        targets_of_layer.append(targets)
    return as_units(layers, targets_of_layer), wrapped


def _wrapped(site: LinearSite, dim: int, nnz_per_row: int, seed: int) -> ProjectedLinear:
    weight = site.module.get_parameter("weight")
    generator = torch.Generator().manual_seed(seed)
    projector = SparseProjector.random(site.shape, dim, nnz_per_row, generator).to(weight.device, weight.dtype)
    module = ProjectedLinear(site.module, transposed=site.transposed, projector=projector)
    setattr(site.parent, site.attribute, module)
    return module
