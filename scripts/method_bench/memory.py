"""Bytes on the device by part, from a model's shapes, and ranks at which methods keep equally many there.

Legend: M rows (out), N columns (in), K rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import count

from transformers import PreTrainedModel

from lsp_ray.config import GaloreConfig, LoraConfig, LspConfig, Task
from lsp_ray.methods.lsp import MIN_SIDE_PER_NNZ, projector_sizes
from lsp_ray.models.layers import Layer, find_layers
from lsp_ray.models.load import load_skeleton
from lsp_ray.models.resolve import resolve_model

TOLERANCE = 0.02
PARTS = ("weights", "projectors, bases or adapters", "optimizer", "gradients of a step")
_WEIGHT_BYTES, _FLOAT_BYTES, _MOMENT_BYTES = 2, 4, 8  # weights are bfloat16; two moments in float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes:
    """What a model's layers are made of: (M, N) of its linears and of a classifier's head, and counts of elements."""

    layers: tuple[Layer, ...]
    linears: tuple[tuple[int, int], ...]
    head: tuple[tuple[int, int], ...]
    num_head: int
    num_small: int
    num_weights: int

    @property
    def num_trained(self) -> int:
        """Elements that full fine-tuning changes."""
        return sum(rows * columns for rows, columns in self.linears + self.head) + self.num_small


@cache
def shapes_of(model_name: str, task: Task) -> Shapes:
    """Read a model's config.json."""
    return shapes_in(load_skeleton(resolve_model(model_name), task=task))


def shapes_in(model: PreTrainedModel) -> Shapes:
    """Of a model, whose embeddings are frozen from then on."""
    layers = tuple(find_layers(model))
    sites = [site for layer in layers for site in layer.linears]
    in_head = {site.name for site in sites if not site.name.startswith(f"{model.base_model_prefix}.")}
    return Shapes(
        layers=layers,
        linears=tuple(site.shape for site in sites if site.name not in in_head),
        head=tuple(site.shape for site in sites if site.name in in_head),
        num_head=sum(own.numel() for site in sites if site.name in in_head for own in site.module.parameters()),
        num_small=sum(site.parameter.numel() for layer in layers for site in layer.parameters),
        num_weights=sum(parameter.numel() for parameter in model.parameters()),
    )


def bytes_by_part(shapes: Shapes, method: str, options: Mapping[str, str]) -> Mapping[str, int]:
    """What a method keeps on the device between steps, and its gradients, which come and go.

    `lsp` and `zero_offload` send theirs off layer by layer, so that seldom all of them are there.
    """
    added, optimizer, gradients = _PARTS_OF[method](shapes, options)
    parts = (_WEIGHT_BYTES * shapes.num_weights, added, optimizer, gradients)
    return dict(zip(PARTS, parts, strict=True))


def equal_ranks(shapes: Shapes) -> Mapping[str, Mapping[str, str]]:
    """Options of lsp, lora and galore at which they keep the same bytes beside the weights, to TOLERANCE.

    The fewest non-zeros of a projector's row from the default on for which the others have a rank that fits.
    """
    most = min(min(shape) for shape in shapes.linears) // MIN_SIDE_PER_NNZ
    for nnz in range(LspConfig().nnz_per_row, most + 1):
        lsp = {"--lsp.nnz_per_row": str(nnz)}
        budget = kept_bytes(shapes, "lsp", lsp)
        lora = _nearest(
            shapes, "lora", budget, lambda rank: {"--lora.r": f"{rank}", "--lora.lora_alpha": f"{2 * rank}"}
        )
        galore = _nearest(shapes, "galore", budget, lambda rank: {"--galore.rank": f"{rank}"})
        others = {"lora": lora, "galore": galore}
        if all(abs(kept_bytes(shapes, name, own) / budget - 1) <= TOLERANCE for name, own in others.items()):
            return {"lsp": lsp, **others}
    raise ValueError(f"no ranks keep the same bytes to {TOLERANCE:.0%}")


def kept_bytes(shapes: Shapes, method: str, options: Mapping[str, str]) -> int:
    """Bytes between steps, beside the weights."""
    return sum(_PARTS_OF[method](shapes, options)[:2])


def _nearest(
    shapes: Shapes, method: str, budget: int, options_of: Callable[[int], Mapping[str, str]]
) -> Mapping[str, str]:
    """At the rank whose bytes are nearest; they grow with it."""
    below = above = options_of(1)
    for rank in count(1):
        below, above = above, options_of(rank)
        if kept_bytes(shapes, method, above) >= budget:
            break
    return min(below, above, key=lambda options: abs(kept_bytes(shapes, method, options) - budget))


def _lsp(shapes: Shapes, options: Mapping[str, str]) -> tuple[int, int, int]:
    nnz = int(options.get("--lsp.nnz_per_row", LspConfig().nnz_per_row))
    lsp = LspConfig(subspace_dim=int(options.get("--lsp.subspace_dim", LspConfig().dim)), nnz_per_row=nnz)
    sizes = projector_sizes(shapes.layers, lsp).values()
    projected = [size.shape for size in sizes]
    raw = shapes.num_trained - _numel(projected)
    added = nnz * _sides(projected) * _WEIGHT_BYTES  # a right factor that linears share is counted for each of them
    return added, 0, _FLOAT_BYTES * (_numel(size.dims for size in sizes) + raw)


def _lora(shapes: Shapes, options: Mapping[str, str]) -> tuple[int, int, int]:
    adapters = int(options.get("--lora.r", LoraConfig().r)) * _sides(shapes.linears)
    # peft keeps adapters in float32, and a copy of the head
    added = _FLOAT_BYTES * adapters + _WEIGHT_BYTES * shapes.num_head
    return added, _MOMENT_BYTES * (adapters + shapes.num_head), added


def _galore(shapes: Shapes, options: Mapping[str, str]) -> tuple[int, int, int]:
    rank = int(options.get("--galore.rank", GaloreConfig().rank))
    projected = [shape for shape in shapes.linears + shapes.head if min(shape) > rank]
    bases = rank * sum(min(shape) for shape in projected)
    seen = rank * sum(max(shape) for shape in projected) + shapes.num_trained - _numel(projected)
    return _FLOAT_BYTES * bases, _MOMENT_BYTES * seen, _WEIGHT_BYTES * shapes.num_trained


def _native(shapes: Shapes, _options: Mapping[str, str]) -> tuple[int, int, int]:
    return 0, _MOMENT_BYTES * shapes.num_trained, _WEIGHT_BYTES * shapes.num_trained


def _zero_offload(shapes: Shapes, _options: Mapping[str, str]) -> tuple[int, int, int]:
    return 0, 0, _WEIGHT_BYTES * shapes.num_trained


_PARTS_OF = {"lsp": _lsp, "zero_offload": _zero_offload, "native": _native, "lora": _lora, "galore": _galore}


def _sides(shapes: Iterable[tuple[int, int]]) -> int:
    return sum(rows + columns for rows, columns in shapes)


def _numel(shapes: Iterable[tuple[int, int]]) -> int:
    return sum(rows * columns for rows, columns in shapes)
