"""What the closed-form fit learns, and when it declines.

Legend: M rows (out), N columns (in), D subspace, R non-zeros a row, F rows of a factor, S width of a target.
"""

from __future__ import annotations

import pytest
import torch

from lsp_ray.projection.closed_form import fit_factor, fit_projector, fit_values
from lsp_ray.projection.sparse_factor import SparseFactor, random_positions
from lsp_ray.projection.sparse_projector import SparseProjector


def dense(factor: SparseFactor) -> torch.Tensor:
    return factor.dense().double()


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


class Gradients:
    """Noisy gradients that share a column space and a row space of `rank` dimensions."""

    def __init__(self, seed: int, shape: tuple[int, int] = (128, 96), rank: int = 6) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.left_MK = self.normal(shape[0], rank)
        self.right_KN = self.normal(rank, shape[1])

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def draw(self) -> torch.Tensor:
        rank = self.right_KN.shape[0]
        signal_MN = self.left_MK @ self.normal(rank, rank) @ self.right_KN / rank
        return signal_MN + 0.1 * self.normal(*signal_MN.shape)

    def targets(self, width: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
        left_MS = torch.zeros(self.left_MK.shape[0], width)
        right_NS = torch.zeros(self.right_KN.shape[1], width)
        for _ in range(4):
            grad_MN = self.draw()
            left_MS += grad_MN @ self.normal(grad_MN.shape[1], width)
            right_NS += grad_MN.t() @ self.normal(grad_MN.shape[0], width)
        return left_MS, right_NS


def relative_bias(projector: SparseProjector, grad_MN: torch.Tensor) -> float:
    """‖c · P Pᵀ G Q Qᵀ − G‖ / ‖G‖ at the best scalar c: both fits are judged by direction, not by scale."""
    estimate_MN = projector.decompress(projector.compress(grad_MN))
    cosine = float((estimate_MN * grad_MN).sum() / (estimate_MN.norm() * grad_MN.norm()))
    return float((1 - cosine**2) ** 0.5)


def residual(factor: SparseFactor, target_FS: torch.Tensor) -> float:
    """The share of the target outside the factor's column space."""
    basis_FD = dense(factor)
    inside_FS = basis_FD @ torch.linalg.pinv(basis_FD) @ target_FS.double()
    return relative_error(inside_FS, target_FS)


def fitted(targets: tuple[torch.Tensor, torch.Tensor], dim: int, nnz_per_row: int, seed: int = 5) -> SparseProjector:
    projector = fit_projector(*targets, dim, nnz_per_row, torch.Generator().manual_seed(seed))
    assert projector is not None
    return projector


@pytest.mark.parametrize("seed", range(3))
def test_a_learned_projector_estimates_a_held_out_gradient_better_than_a_random_one(seed: int) -> None:
    gradients = Gradients(seed)
    learned = fitted(gradients.targets(), 32, 4)
    drawn = SparseProjector.random((128, 96), 32, 4, torch.Generator().manual_seed(5))
    held_out_MN = gradients.draw()
    assert relative_bias(learned, held_out_MN) < relative_bias(drawn, held_out_MN) - 0.05


@pytest.mark.parametrize("seed", range(3))
def test_a_learned_factor_holds_what_held_out_gradients_span(seed: int) -> None:
    gradients = Gradients(seed)
    learned = fitted(gradients.targets(), 32, 4)
    drawn = SparseProjector.random((128, 96), 32, 4, torch.Generator().manual_seed(5))
    for side, target_FS in (("left", gradients.left_MK), ("right", gradients.right_KN.t())):
        assert residual(getattr(learned, side), target_FS) < 0.5 * residual(getattr(drawn, side), target_FS)


@pytest.mark.parametrize(("nnz_per_row", "rank"), [(2, 1), (4, 1), (4, 2), (8, 4)])
def test_a_target_that_the_positions_can_reach_is_recovered(nnz_per_row: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    target_FS = torch.randn(96, rank, generator=generator) @ torch.randn(rank, 40, generator=generator)
    # the ridge, 1e-4, is what keeps the residual from zero
    assert residual(fit_factor(target_FS / target_FS.norm(), 24, nnz_per_row, generator), target_FS) < 1e-3


def test_learned_columns_have_unit_length() -> None:
    projector = fitted(Gradients(0).targets(), 32, 4)
    for factor in (projector.left, projector.right):
        torch.testing.assert_close(factor.dense().norm(dim=0), torch.ones(32), rtol=1e-5, atol=0)


def test_a_row_of_zeros_in_the_target_becomes_a_row_of_zeros() -> None:
    left_MS, right_NS = Gradients(0).targets()
    left_MS[3:9] = 0
    learned = fitted((left_MS, right_NS), 32, 4).left
    assert not learned.value_FR[3:9].any()
    assert learned.value_FR.isfinite().all()


def test_columns_that_only_rows_of_zeros_use_have_length_one_so_that_no_row_gets_the_update_of_all() -> None:
    left_MS, right_NS = Gradients(0).targets()
    left_MS[1:] = 0
    learned = fitted((left_MS, right_NS), 32, 4)
    assert learned.left.dense().norm(dim=0).tolist() == pytest.approx([1.0] * 32, abs=1e-5)


def test_a_fit_is_decided_by_the_generator() -> None:
    targets = Gradients(0).targets()
    first, again, other = (fitted(targets, 32, 4, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.left.dense(), again.left.dense())
    assert torch.equal(first.right.dense(), again.right.dense())
    assert not torch.equal(first.left.dense(), other.left.dense())


def test_a_fit_does_not_depend_on_the_targets_scale() -> None:
    left_MS, right_NS = Gradients(0).targets()
    plain, tiny = fitted((left_MS, right_NS), 32, 4), fitted((left_MS * 2.0**-60, right_NS * 2.0**-60), 32, 4)
    assert relative_error(tiny.left.dense(), plain.left.dense()) < 1e-4
    assert relative_error(tiny.right.dense(), plain.right.dense()) < 1e-4


def test_a_wide_target_is_solved_in_chunks_of_rows_with_the_same_answer() -> None:
    rows, width = 70, 1 << 17  # 4 · 2^17 elements a row: 64 rows fill a chunk
    core_FK = torch.randn(rows, 3, generator=torch.Generator().manual_seed(0))
    wide_FS = torch.zeros(rows, width)
    wide_FS[:, :3] = core_FK / core_FK.norm()
    index_FR = random_positions(rows, 12, 4, torch.Generator().manual_seed(1))
    wide, narrow = (
        fit_values(index_FR, target_FS, 12, torch.Generator().manual_seed(2))
        for target_FS in (wide_FS, core_FK / core_FK.norm())
    )
    # float32 sums of another length, amplified by systems of condition 1/ridge: measured 3e-4
    assert relative_error(wide.dense(), narrow.dense()) < 5e-3


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("side", [0, 1])
def test_there_is_nothing_to_learn_from_a_target_that_is_zero_or_not_finite(bad: float, side: int) -> None:
    targets = list(Gradients(0).targets())
    if bad == 0.0:
        targets[side].zero_()
    else:
        targets[side][2, 3] = bad
    assert fit_projector(targets[0], targets[1], 32, 4, torch.Generator().manual_seed(0)) is None


def test_a_balanced_projector_changes_rows_of_small_and_large_gradients_alike() -> None:
    gradients = Gradients(0)
    left_MS, right_NS = gradients.targets()
    left_MS[:64] *= 0.1
    spread = {}
    for balanced in (False, True):
        generator = torch.Generator().manual_seed(5)
        projector = fit_projector(left_MS, right_NS, 32, 4, generator, balanced=balanced)
        assert projector is not None
        squares_M = dense(projector.left).square().sum(dim=1)
        spread[balanced] = float(squares_M[64:].mean() / squares_M[:64].mean())
    assert spread[False] > 10
    assert 0.5 < spread[True] < 2


def test_balancing_keeps_rows_without_a_gradient_trainable() -> None:
    left_MS, right_NS = Gradients(0).targets()
    left_MS[:100] = 0.0
    projector = fit_projector(left_MS, right_NS, 32, 4, torch.Generator().manual_seed(5), balanced=True)
    assert projector is not None
    assert torch.isfinite(projector.left.dense()).all()
    assert float(dense(projector.left).square().sum(dim=0).min()) > 0
