"""Every method on every matrix of a sample, at points (r, d)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

import torch

from lsp_ray.device.fits import GradientSketch
from lsp_ray.device.rounding import mixed
from lsp_ray.projection.closed_form import fit_projector
from lsp_ray.projection.paper_fit import fit_paper
from lsp_ray.projection.sparse_projector import SparseProjector, subspace_dim_for
from scripts.projection_bench.estimates import (
    DenseBases,
    Score,
    balanced_score,
    one_sided_rank,
    projector_bytes,
    sparse_score,
    two_sided_rank,
    values_sent,
    whitened_score,
)
from scripts.projection_bench.gradients import SEED, Gradients

METHODS = (
    "closed_form",
    "closed_form_gram",
    "closed_form_balanced",
    "paper",
    "random",
    "galore_one_sided",
    "galore_two_sided",
    "dense_floor",
)
PAPER_STEPS = 60

Shape = tuple[int, int]


@dataclass(frozen=True, slots=True, order=True)
class Point:
    """r and d as asked for; a matrix takes at most half of its smaller side for d."""

    nnz_per_row: int
    subspace_dim: int


@dataclass(slots=True)
class Measured:
    """What was measured on one data set. Grows while measuring.

    `scores` are a matrix's each, by point and method; `shapes` those of the matrices in the same order; `fit_s` the
    seconds of each fit, by method and shape of the matrix, at the main point.
    """

    scores: dict[Point, dict[str, list[Score]]] = field(default_factory=dict)
    shapes: dict[Point, list[Shape]] = field(default_factory=dict)
    fit_s: dict[str, dict[Shape, list[float]]] = field(default_factory=dict)

    def merged(self, other: Measured, point: Point) -> Measured:
        """The two samples' matrices as one, at one point."""
        merged = Measured()
        merged.scores[point] = {name: held + other.scores[point][name] for name, held in self.scores[point].items()}
        merged.shapes[point] = self.shapes[point] + other.shapes[point]
        for method, by_shape in self.fit_s.items():
            more = other.fit_s[method]
            merged.fit_s[method] = {
                shape: by_shape.get(shape, []) + more.get(shape, []) for shape in {*by_shape, *more}
            }
        return merged

    def num_matrices(self, point: Point) -> int:
        """How many matrices were measured at this point."""
        return len(self.shapes[point])

    def mean(self, point: Point, method: str) -> Score:
        """Mean over the matrices measured at this point."""
        return Score.mean(self.scores[point][method])

    def mean_bytes(self, point: Point) -> float:
        """Bytes of a matrix's projector, mean over those measured."""
        return fmean(projector_bytes(shape, point.nnz_per_row) for shape in self.shapes[point])

    def mean_sent(self, point: Point, method: str) -> float:
        """Values of a matrix's compressed gradient, mean over those measured."""
        return fmean(
            values_sent(method, shape, point.nnz_per_row, subspace_dim_for(shape, point.subspace_dim))
            for shape in self.shapes[point]
        )

    def fit_seconds(self, method: str, counts: dict[Shape, int]) -> float:
        """Seconds for a whole model: median of each shape times how many the model has of it."""
        return sum(median(self.fit_s[method][shape]) * count for shape, count in counts.items())


def measure(
    matrices: Iterable[Gradients],
    points: Sequence[Point],
    timed: Point,
    *,
    clock: Callable[[], float],
    on_done: Callable[[str], None],
) -> Measured:
    """Score every method on every matrix at every point; keep the seconds of the two fits at `timed`."""
    measured = Measured()
    for key, gradients in enumerate(matrices):
        bases = DenseBases(gradients, _widest(gradients.shape, points))
        known: dict[tuple[int, int], dict[str, Score]] = {}  # a small matrix has the same d at several points
        for point in points:
            dim = subspace_dim_for(gradients.shape, point.subspace_dim)
            if (point.nnz_per_row, dim) not in known:
                scores, fit_s = _all_methods(gradients, bases, point.nnz_per_row, dim, mixed(SEED, key), clock)
                known[point.nnz_per_row, dim] = scores
                for method, seconds in fit_s.items() if point == timed else ():
                    by_shape = measured.fit_s.setdefault(method, {})
                    by_shape.setdefault(gradients.shape, []).append(seconds)
            by_method = measured.scores.setdefault(point, defaultdict(list))
            for method, score in known[point.nnz_per_row, dim].items():
                by_method[method].append(score)
            measured.shapes.setdefault(point, []).append(gradients.shape)
        on_done(gradients.name)
    return measured


def _all_methods(
    gradients: Gradients, bases: DenseBases, nnz_per_row: int, dim: int, seed: int, clock: Callable[[], float]
) -> tuple[dict[str, Score], dict[str, float]]:
    """Return every method's score and the seconds of the two fits, made one right after the other."""
    begin_s = clock()
    sketch = sketched(gradients, dim, seed)
    closed = fitted(sketch, dim, nnz_per_row, seed, balanced=False)
    between_s = clock()
    paper = fit_paper(
        gradients.calibration,
        dim,
        nnz_per_row,
        _generator(seed, 1),
        max_bias=0.0,
        timeout_s=math.inf,
        max_steps=PAPER_STEPS,
    )
    end_s = clock()
    balanced = fitted(sketch, dim, nnz_per_row, seed, balanced=True)
    assert paper is not None, f"{gradients.name} has no gradient"
    drawn = SparseProjector.random(gradients.shape, dim, nnz_per_row, _generator(seed, 1))
    scores = {
        "closed_form": sparse_score(closed, gradients.held_out),
        "closed_form_gram": whitened_score(closed, gradients.held_out),
        "closed_form_balanced": balanced_score(balanced, gradients.held_out),
        "paper": sparse_score(paper, gradients.held_out),
        "random": sparse_score(drawn, gradients.held_out),
        "galore_one_sided": bases.one_sided(one_sided_rank(gradients.shape, nnz_per_row)),
        "galore_two_sided": bases.two_sided(two_sided_rank(gradients.shape, nnz_per_row)),
        "dense_floor": bases.two_sided(dim),
    }
    return scores, {"closed_form": between_s - begin_s, "paper": end_s - between_s}


def sketched(gradients: Gradients, width: int, seed: int) -> GradientSketch:
    """What a run sees before its first step; its own sketches, fed with G = G I or I G."""
    sketch = GradientSketch(gradients.shape, width, _generator(seed, 0))
    rows, columns = gradients.shape
    eye = torch.eye(min(rows, columns))
    for grad_MN in gradients.calibration:
        # the product of the two arguments is dYᵀX: put the identity on the shorter side
        sketch.add(*((grad_MN.t(), eye) if rows >= columns else (eye, grad_MN)))
    return sketch


def fitted(sketch: GradientSketch, dim: int, nnz_per_row: int, seed: int, *, balanced: bool) -> SparseProjector:
    """The closed form's projector."""
    generator = _generator(seed, 1)
    projector = fit_projector(sketch.left_MS, sketch.right_NS, dim, nnz_per_row, generator, balanced=balanced)
    assert projector is not None, "a matrix has no gradient"
    return projector


def _widest(shape: Shape, points: Sequence[Point]) -> int:
    ranks = [
        max(one_sided_rank(shape, point.nnz_per_row), two_sided_rank(shape, point.nnz_per_row)) for point in points
    ]
    dims = [subspace_dim_for(shape, point.subspace_dim) for point in points]
    return min(min(shape), max(*ranks, *dims))


def _generator(seed: int, key: int) -> torch.Generator:
    return torch.Generator().manual_seed(mixed(seed, key))
