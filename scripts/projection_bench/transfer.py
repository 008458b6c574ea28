"""What projectors learned on one data set lose on another: what a run pays that starts from an earlier one's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import fmean

from lsp_ray.device.rounding import mixed
from scripts.projection_bench.estimates import block_bias, scaled_bias
from scripts.projection_bench.gradients import SEED, Gradients, Source
from scripts.projection_bench.measure import Point, fitted, sketched


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """Mean biases of projectors learned on one data set's gradients and judged by another's held-out ones.

    `plain` and `balanced` are for G, `scaled` is of the balanced bases for S G Z.
    """

    learned_on: str
    judged_by: str
    plain: float
    balanced: float
    scaled: float


def transfers(sources: Mapping[str, Source], layers: Sequence[int], point: Point) -> list[Transfer]:
    """Every pair of data sets, a data set with itself included; all sources have the same model's layers."""
    biases: dict[tuple[str, str], list[tuple[float, float, float]]] = {
        (learned_on, judged_by): [] for learned_on, judged_by in product(sources, repeat=2)
    }
    by_matrix = zip(*(source.gradients(layers) for source in sources.values()), strict=True)
    for key, matrices in enumerate(by_matrix):
        of_dataset = dict(zip(sources, matrices, strict=True))
        for learned_on, judged_by in biases:
            found = _biases(of_dataset[learned_on], of_dataset[judged_by], point, mixed(SEED, key))
            biases[learned_on, judged_by].append(found)
    means = {pair: tuple(map(fmean, zip(*held, strict=True))) for pair, held in biases.items()}
    return [
        Transfer(learned_on=learned_on, judged_by=judged_by, plain=plain, balanced=balanced, scaled=scaled)
        for (learned_on, judged_by), (plain, balanced, scaled) in means.items()
    ]


def _biases(learned_on: Gradients, judged_by: Gradients, point: Point, seed: int) -> tuple[float, float, float]:
    sketch, sizes = sketched(learned_on, seed), point.sizes(learned_on.shape)
    (plain,), (balanced,) = (fitted([sketch], [sizes], balanced=choice) for choice in (False, True))
    return (
        block_bias(plain, judged_by.held_out),
        block_bias(balanced, judged_by.held_out),
        scaled_bias(balanced, judged_by.held_out),
    )
