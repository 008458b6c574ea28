"""What projectors learned on one data set lose on another: what a run pays that starts from an earlier one's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from lsp_ray.device.rounding import mixed
from lsp_ray.projection.sparse_projector import subspace_dim_for
from scripts.projection_bench.estimates import Score, balanced_score, whitened_score
from scripts.projection_bench.gradients import SEED, Gradients, Source
from scripts.projection_bench.measure import Point, fitted, sketched


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """Means over matrices of projectors learned on one data set's gradients and judged by another's held-out ones."""

    learned_on: str
    judged_by: str
    orthonormal: Score
    balanced: Score


def transfers(sources: Mapping[str, Source], layers: Sequence[int], point: Point) -> list[Transfer]:
    """Every pair of data sets, a data set with itself included; all sources have the same model's layers."""
    scores: dict[tuple[str, str], list[tuple[Score, Score]]] = {
        (learned_on, judged_by): [] for learned_on, judged_by in product(sources, repeat=2)
    }
    by_matrix = zip(*(source.gradients(layers) for source in sources.values()), strict=True)
    for key, matrices in enumerate(by_matrix):
        of_dataset = dict(zip(sources, matrices, strict=True))
        for learned_on, judged_by in scores:
            both = _scores(of_dataset[learned_on], of_dataset[judged_by], point, mixed(SEED, key))
            scores[learned_on, judged_by].append(both)
    return [
        Transfer(
            learned_on=learned_on,
            judged_by=judged_by,
            orthonormal=Score.mean(orthonormal for orthonormal, _ in held),
            balanced=Score.mean(balanced for _, balanced in held),
        )
        for (learned_on, judged_by), held in scores.items()
    ]


def _scores(learned_on: Gradients, judged_by: Gradients, point: Point, seed: int) -> tuple[Score, Score]:
    dim = subspace_dim_for(learned_on.shape, point.subspace_dim)
    sketch = sketched(learned_on, dim, seed)
    plain, balanced = (fitted(sketch, dim, point.nnz_per_row, seed, balanced=choice) for choice in (False, True))
    return whitened_score(plain, judged_by.held_out), balanced_score(balanced, judged_by.held_out)
