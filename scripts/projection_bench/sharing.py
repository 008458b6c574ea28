"""What one Q for linears that read the same input costs in bias; it is learned from their sketches side by side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from lsp_ray.device.rounding import mixed
from lsp_ray.projection.sparse_projector import SparseProjector
from scripts.projection_bench.estimates import block_bias, scaled_bias
from scripts.projection_bench.gradients import SEED, Gradients
from scripts.projection_bench.measure import Point, fitted, sketched


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """Mean biases over the linears of one kind: each with a Q of its own, and with the shared one, as a run has it.

    `plain` is for G, `scaled` of the balanced bases for S G Z; the pairs are own and shared.
    """

    kind: str
    num_matrices: int
    plain: tuple[float, float]
    scaled: tuple[float, float]


def shared_biases(matrices: Iterable[Gradients], groups: Sequence[Sequence[str]], point: Point) -> list[Shared]:
    """By kind, the last part of a linear's name; `groups` are names of linears that read the same input."""
    group_of = {name: position for position, names in enumerate(groups) for name in names}
    found: dict[str, list[tuple[float, float, float, float]]] = {}
    waiting: dict[int, list[Gradients]] = {}
    for gradients in matrices:
        position = group_of.get(gradients.name)
        if position is None:
            continue
        group = waiting.setdefault(position, [])
        group.append(gradients)
        if len(group) == len(groups[position]):
            for each, biases in zip(group, _biases(group, point), strict=True):
                found.setdefault(each.name.rpartition(".")[2], []).append(biases)
            del waiting[position]
    return [_mean(kind, biases) for kind, biases in found.items()]


def _biases(group: Sequence[Gradients], point: Point) -> list[tuple[float, float, float, float]]:
    sketches = [sketched(gradients, mixed(SEED, key)) for key, gradients in enumerate(group)]
    sizes = [point.sizes(gradients.shape) for gradients in group]

    def learned(*, balanced: bool, together: bool) -> list[SparseProjector]:
        if together:
            return fitted(sketches, sizes, balanced=balanced)
        pairs = zip(sketches, sizes, strict=True)
        return [fitted([sketch], [size], balanced=balanced)[0] for sketch, size in pairs]

    by_choice = [
        learned(balanced=balanced, together=together) for balanced in (False, True) for together in (False, True)
    ]
    return [
        (
            block_bias(own, gradients.held_out),
            block_bias(shared, gradients.held_out),
            scaled_bias(balanced, gradients.held_out),
            scaled_bias(balanced_shared, gradients.held_out),
        )
        for gradients, own, shared, balanced, balanced_shared in zip(group, *by_choice, strict=True)
    ]


def _mean(kind: str, biases: Sequence[tuple[float, float, float, float]]) -> Shared:
    own, shared, scaled, scaled_shared = (fmean(column) for column in zip(*biases, strict=True))
    return Shared(kind=kind, num_matrices=len(biases), plain=(own, shared), scaled=(scaled, scaled_shared))
