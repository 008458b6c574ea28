"""Every method on every matrix of a sample, at points (r, d)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

import torch

from lsp_ray.device.fits import ClosedFormFit, GradientSketch
from lsp_ray.device.rounding import mixed
from lsp_ray.projection.paper_fit import fit_paper
from lsp_ray.projection.sparse_projector import ProjectorSizes, SparseProjector
from scripts.projection_bench.estimates import (
    DenseBases,
    block_bias,
    one_sided_rank,
    projector_bytes,
    scaled_bias,
    two_sided_rank,
    values_sent,
)
from scripts.projection_bench.gradients import SEED, Gradients

METHODS = (
    "blocks",
    "blocks_balanced",
    "paper",
    "random",
    "galore_one_sided",
    "galore_two_sided",
    "dense_floor",
)
SCALED = "blocks_balanced_scaled"  # of S G Z: not the others' question, so in no ranking
FITS = ("closed_form", "paper")
PAPER_STEPS = 60

Shape = tuple[int, int]


@dataclass(frozen=True, slots=True, order=True)
class Point:
    """r and d as asked for; each side of a matrix takes at most half of itself for d."""

    nnz_per_row: int
    subspace_dim: int

    def sizes(self, shape: Shape) -> ProjectorSizes:
        """Of a matrix's projector."""
        return ProjectorSizes.of(shape, self.subspace_dim, self.nnz_per_row)

    def __str__(self) -> str:
        """What pages call it."""
        return f"r={self.nnz_per_row} d={self.subspace_dim}"


@dataclass(slots=True)
class Measured:
    """What was measured on one data set. Grows while measuring.

    `biases` are a matrix's each, by point and method; `shapes` those of the matrices in the same order; `fit_s` the
    seconds of each fit, by its name and the matrix's shape, at the main point.
    """

    biases: dict[Point, dict[str, list[float]]] = field(default_factory=dict)
    shapes: dict[Point, list[Shape]] = field(default_factory=dict)
    fit_s: dict[str, dict[Shape, list[float]]] = field(default_factory=dict)

    def merged(self, other: Measured, point: Point) -> Measured:
        """The two samples' matrices as one, at one point."""
        merged = Measured()
        merged.biases[point] = {name: held + other.biases[point][name] for name, held in self.biases[point].items()}
        merged.shapes[point] = self.shapes[point] + other.shapes[point]
        for fit, by_shape in self.fit_s.items():
            more = other.fit_s[fit]
            merged.fit_s[fit] = {shape: by_shape.get(shape, []) + more.get(shape, []) for shape in {*by_shape, *more}}
        return merged

    def num_matrices(self, point: Point) -> int:
        """How many matrices were measured at this point."""
        return len(self.shapes[point])

    def mean(self, point: Point, method: str) -> float:
        """Bias, mean over the matrices measured at this point."""
        return fmean(self.biases[point][method])

    def mean_bytes(self, point: Point) -> float:
        """Bytes of a matrix's projector, mean over those measured."""
        return fmean(projector_bytes(shape, point.nnz_per_row) for shape in self.shapes[point])

    def mean_sent(self, point: Point, method: str) -> float:
        """Values of a matrix's compressed gradient, mean over those measured."""
        return fmean(values_sent(method, point.sizes(shape)) for shape in self.shapes[point])

    def fit_seconds(self, fit: str, counts: dict[Shape, int]) -> float:
        """Seconds for a whole model: median of each shape times how many the model has of it."""
        return sum(median(self.fit_s[fit][shape]) * count for shape, count in counts.items())


def measure(
    matrices: Iterable[Gradients],
    points: Sequence[Point],
    timed: Point,
    *,
    clock: Callable[[], float],
    on_done: Callable[[str], None],
) -> Measured:
    """Judge every method on every matrix at every point; keep the seconds of the two fits at `timed`."""
    measured = Measured()
    for key, gradients in enumerate(matrices):
        bases = DenseBases(gradients, _widest(gradients.shape, points))
        known: dict[ProjectorSizes, dict[str, float]] = {}  # a small matrix has the same sizes at several points
        for point in points:
            sizes = point.sizes(gradients.shape)
            if sizes not in known:
                known[sizes], fit_s = _all_methods(gradients, bases, sizes, mixed(SEED, key), clock)
                for fit, seconds in fit_s.items() if point == timed else ():
                    measured.fit_s.setdefault(fit, {}).setdefault(gradients.shape, []).append(seconds)
            by_method = measured.biases.setdefault(point, defaultdict(list))
            for method, bias in known[sizes].items():
                by_method[method].append(bias)
            measured.shapes.setdefault(point, []).append(gradients.shape)
        on_done(gradients.name)
    return measured


def _all_methods(
    gradients: Gradients, bases: DenseBases, sizes: ProjectorSizes, seed: int, clock: Callable[[], float]
) -> tuple[dict[str, float], dict[str, float]]:
    """Return every method's bias and the seconds of the two fits, made one right after the other."""
    begin_s = clock()
    sketch = sketched(gradients, seed)
    (plain,) = fitted([sketch], [sizes], balanced=False)
    between_s = clock()
    paper = fit_paper(
        [gradients.calibration],
        [sizes],
        _generator(seed, 1),
        max_bias=0.0,
        timeout_s=math.inf,
        max_steps=PAPER_STEPS,
    )
    end_s = clock()
    (balanced,) = fitted([sketch], [sizes], balanced=True)
    assert paper is not None, f"{gradients.name} has no gradient"
    rank = two_sided_rank(sizes.nnz_per_row)
    biases = {
        "blocks": block_bias(plain, gradients.held_out),
        "blocks_balanced": block_bias(balanced, gradients.held_out),
        SCALED: scaled_bias(balanced, gradients.held_out),
        "paper": block_bias(paper[0], gradients.held_out),
        "random": block_bias(SparseProjector.random(sizes, _generator(seed, 1)), gradients.held_out),
        "galore_one_sided": bases.one_sided(one_sided_rank(sizes.shape, sizes.nnz_per_row)),
        "galore_two_sided": bases.two_sided(rank, rank),
        "dense_floor": bases.two_sided(*sizes.dims),
    }
    return biases, dict(zip(FITS, (between_s - begin_s, end_s - between_s), strict=True))


def sketched(gradients: Gradients, seed: int) -> GradientSketch:
    """What a run sees of one linear before its first step."""
    sketch = GradientSketch(gradients.shape, _generator(seed, 0))
    for grad_MN in gradients.calibration:
        sketch.add_full(grad_MN)
    return sketch


def fitted(
    sketches: Sequence[GradientSketch], sizes: Sequence[ProjectorSizes], *, balanced: bool
) -> list[SparseProjector]:
    """The closed form's projectors of linears that share Q."""
    fit = ClosedFormFit(balanced=balanced)
    projectors = fit.learn(sketches, sizes, torch.Generator(), torch.device("cpu"))
    assert projectors is not None, "a matrix has no gradient"
    return projectors


def _widest(shape: Shape, points: Sequence[Point]) -> int:
    """Of all dense bases that are looked at."""
    return max(max(one_sided_rank(shape, point.nnz_per_row), *point.sizes(shape).dims) for point in points)


def _generator(seed: int, key: int) -> torch.Generator:
    return torch.Generator().manual_seed(mixed(seed, key))
