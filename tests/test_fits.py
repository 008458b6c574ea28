"""What each way to learn projectors remembers, and what it makes of it.

Legend: M rows (out), N columns (in), D subspace.
"""

from __future__ import annotations

import pytest
import torch

from lsp_ray.device.fits import ClosedFormFit, Fit, Lesson, PaperFit
from lsp_ray.projection.bias import bias_of
from lsp_ray.projection.sparse_projector import SparseProjector
from tests.linears import TRANSPOSED, D, M, N, R, backward, gradient_MN, normal, plain, square_loss, wrapped

CPU = torch.device("cpu")
PAPER = PaperFit(max_bias=0.8, timeout_s=60.0)  # ends at the bias; the time is for a busy machine
PLAIN = ClosedFormFit(balanced=False)
FIT = pytest.mark.parametrize("fit", [PLAIN, PAPER], ids=["closed_form", "paper"])


def taught(fit: Fit, *, transposed: bool = False) -> Lesson:
    module = wrapped(transposed=transposed)
    module.lesson = fit.lesson((M, N), D, torch.Generator().manual_seed(0))
    for seed in range(3):
        backward(square_loss(module, normal(4, N, seed=seed)))
    return module.lesson


def bias(projector: SparseProjector, *, transposed: bool) -> float:
    """The relative bias for the gradient of the last of the inputs."""
    reference = plain(transposed=transposed)
    backward(square_loss(reference, normal(4, N, seed=2)))
    grad_MN = gradient_MN(reference, transposed=transposed)
    measured = bias_of(projector, projector.compress(grad_MN), float(grad_MN.square().sum()))
    assert measured is not None
    return measured.relative


@FIT
@TRANSPOSED
def test_what_is_learned_estimates_the_gradients_better_than_a_random_projector(fit: Fit, transposed: bool) -> None:
    learned = taught(fit, transposed=transposed).learn(D, R, torch.Generator().manual_seed(1), CPU)
    assert learned is not None
    drawn = SparseProjector.random((M, N), D, R, torch.Generator().manual_seed(1))
    assert bias(learned, transposed=transposed) < bias(drawn, transposed=transposed) - 0.05


@FIT
def test_an_empty_lesson_teaches_nothing(fit: Fit) -> None:
    lesson = fit.lesson((M, N), D, torch.Generator().manual_seed(0))
    assert lesson.learn(D, R, torch.Generator().manual_seed(1), CPU) is None


@FIT
def test_a_gradient_that_is_not_finite_teaches_nothing(fit: Fit) -> None:
    lesson = fit.lesson((M, N), D, torch.Generator().manual_seed(0))
    lesson.add(torch.full((2, M), float("nan")), torch.ones(2, N))
    assert lesson.learn(D, R, torch.Generator().manual_seed(1), CPU) is None


def test_the_papers_fit_ends_at_once_where_the_bias_is_small_enough() -> None:
    learned = taught(PaperFit(max_bias=1e9, timeout_s=60.0)).learn(D, R, torch.Generator().manual_seed(1), CPU)
    start = SparseProjector.random((M, N), D, R, torch.Generator().manual_seed(1))
    assert learned is not None
    assert torch.equal(learned.left.dense(), start.left.dense())


def test_only_the_papers_fit_needs_more_memory_for_more_batches() -> None:
    sizes = [[fit.host_bytes((M, N), D, batches) for batches in (1, 4)] for fit in (PLAIN, PAPER)]
    assert sizes == [[4 * (M + N) * D] * 2, [4 * M * N, 16 * M * N]]
