"""Bytes on the device by part, from the model's shapes: what a method keeps there between steps.

Legend: M rows (out), N columns (in), R non-zeros, K rank.
"""

from __future__ import annotations

from collections.abc import Mapping

from lsp_ray.config import GaloreConfig, LoraConfig, RunConfig
from lsp_ray.methods.lsp import subspace_dims
from lsp_ray.models.layers import find_layers
from lsp_ray.models.load import load_skeleton
from lsp_ray.models.resolve import resolve_model
from scripts.method_bench.tasks import METHOD_OPTIONS

PARTS = ("weights", "projectors, bases or adapters", "optimizer")
_ELEMENT_BYTES, _INDEX_BYTES = 2, 2


def bytes_by_part(method: str) -> Mapping[str, float]:
    """Of a method as the bench sets it, on SmolLM2-135M in bfloat16."""
    model = load_skeleton(resolve_model("smollm2-135m"), task="causal_lm")
    layers = find_layers(model)
    shapes = [site.shape for layer in layers for site in layer.linears]
    small = sum(site.parameter.numel() for layer in layers for site in layer.parameters)
    sides = sum(rows + columns for rows, columns in shapes)
    full = sum(rows * columns for rows, columns in shapes)
    added = optimizer = 0.0
    if method == "lsp":
        lsp = RunConfig().lsp
        assert len(subspace_dims(layers, lsp)) == len(shapes), "some linears are not projected"
        added = sides * lsp.nnz_per_row * (_ELEMENT_BYTES + _INDEX_BYTES)
    elif method == "lora":
        rank = LoraConfig(r=int(METHOD_OPTIONS["lora"]["--lora.r"])).r
        added, optimizer = 4.0 * rank * sides, 8.0 * rank * sides
    elif method == "galore":
        rank = GaloreConfig(rank=int(METHOD_OPTIONS["galore"]["--galore.rank"])).rank
        added = 4.0 * rank * sum(min(shape) for shape in shapes)
        optimizer = 8.0 * (rank * sum(max(shape) for shape in shapes) + small)
    elif method == "native":
        optimizer = 8.0 * (full + small)
    weights = float(_ELEMENT_BYTES * sum(parameter.numel() for parameter in model.parameters()))
    return dict(zip(PARTS, (weights, added, optimizer), strict=True))
