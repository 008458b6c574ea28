"""What the closed-form fit learns, and when it declines.

Legend: F rows of a factor, D columns, G groups, S rows of a group, R non-zeros a row, W width of a target, K rank.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lsp_ray.projection.block_factor import BlockFactor
from lsp_ray.projection.closed_form import fit_factor
from tests.linears import generator, normal, relative_error

F, G, R, W = 130, 8, 4, 24  # groups of 17 and 16 rows


def fitted(target_FW: torch.Tensor, groups: int = G, nnz_per_row: int = R, *, balanced: bool = False) -> BlockFactor:
    factor = fit_factor(target_FW, groups, nnz_per_row, balanced=balanced)
    assert factor is not None
    return factor


def kept(factor: BlockFactor, target_FW: torch.Tensor) -> float:
    """The share of a target's energy in the factor's columns, which are orthonormal."""
    inside_DW = factor.dense().double().t() @ target_FW.double()
    return float(inside_DW.square().sum() / target_FW.double().square().sum())


def most(target_FW: torch.Tensor, groups: int, nnz_per_row: int) -> float:
    """The largest share that any R directions a group can keep (Eckart and Young)."""
    parts = target_FW.double().tensor_split(groups)
    squares = [torch.linalg.svdvals(rows_SW)[:nnz_per_row].square().sum() for rows_SW in parts]
    return float(torch.stack(squares).sum() / target_FW.double().square().sum())


def assert_orthonormal(factor: BlockFactor) -> None:
    dense_FD = factor.dense().double()
    torch.testing.assert_close(dense_FD.t() @ dense_FD, torch.eye(factor.dim).double(), rtol=0, atol=1e-5)


@settings(deadline=None, max_examples=50)
@given(groups=st.integers(1, 5), nnz=st.integers(1, 5), more=st.integers(0, 60), width=st.integers(1, 40))
def test_no_blocks_keep_more_of_the_target(groups: int, nnz: int, more: int, width: int) -> None:
    target_FW = normal(groups * nnz + more, width, seed=more) * normal(groups * nnz + more, 1, seed=width).exp()
    factor = fitted(target_FW, groups, nnz)
    assert (factor.groups, factor.nnz_per_row) == (groups, nnz)
    assert kept(factor, target_FW) == pytest.approx(most(target_FW, groups, nnz), rel=1e-5)
    assert_orthonormal(factor)


def test_a_learned_factor_keeps_what_held_out_gradients_span() -> None:
    span_FK = normal(F, 3, seed=1)
    learned, held_out = (span_FK @ normal(3, W, seed=seed) + 0.1 * normal(F, W, seed=9 + seed) for seed in (2, 3))
    assert kept(fitted(learned), held_out) > 0.9
    assert kept(BlockFactor.random(F, G, R, generator()), held_out) < 0.5


@pytest.mark.parametrize("exponent", [0, -60, 40])
def test_a_fit_is_decided_by_its_target_and_not_by_the_targets_scale(exponent: int) -> None:
    target_FW = normal(F, W)
    again = fitted(target_FW * 2.0**exponent)  # a power of two changes no digit
    assert torch.equal(again.value_FR, fitted(target_FW).value_FR)


DEGENERATE = {
    "a group of zeros": torch.cat([torch.zeros(17, W), normal(F - 17, W)]),
    "only one row is not zero": torch.eye(F)[:, 60:61] * 1e-3,
    "fewer directions than r": normal(F, 1) @ normal(1, W),
    "all rows equal": torch.ones(F, W),
    "narrower than r": normal(F, 2),
    "very unequal groups": normal(F, W) * torch.logspace(-25, 0, F).unsqueeze(1),
}


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("name", DEGENERATE)
def test_a_target_with_too_few_directions_gives_whole_orthonormal_bases(name: str, balanced: bool) -> None:
    factor = fitted(DEGENERATE[name], balanced=balanced)
    assert torch.isfinite(factor.value_FR).all()
    assert_orthonormal(BlockFactor(factor.unscaled, G))
    if not balanced:
        assert kept(factor, DEGENERATE[name]) == pytest.approx(most(DEGENERATE[name], G, R), rel=1e-5)


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_there_is_nothing_to_learn_from_a_target_that_is_zero_or_not_finite(bad: float, balanced: bool) -> None:
    target_FW = torch.zeros(F, W)
    target_FW[3, 2] = bad
    assert fit_factor(target_FW, G, R, balanced=balanced) is None


def test_a_balanced_factor_scales_the_best_bases_of_the_rows_divided_by_the_root_of_their_norms() -> None:
    target_FW = normal(F, W) * torch.logspace(-3, 0, F).unsqueeze(1)  # the smallest count as a hundredth of the mean
    factor = fitted(target_FW, balanced=True)
    norm_F = target_FW.norm(dim=1) / target_FW.norm(dim=1).square().mean().sqrt()
    scale_F = norm_F.clamp(min=0.01).rsqrt()
    assert factor.scale_F is not None
    torch.testing.assert_close(factor.scale_F, scale_F)
    assert float(scale_F.max()) == pytest.approx(10.0)
    bases = BlockFactor(factor.unscaled, G)
    assert relative_error(factor.value_FR, bases.value_FR * scale_F.unsqueeze(1)) < 1e-6
    scaled_FW = target_FW * scale_F.unsqueeze(1)
    assert kept(bases, scaled_FW) == pytest.approx(most(scaled_FW, G, R), rel=1e-5)


def test_a_balanced_factor_changes_rows_of_small_and_large_gradients_alike() -> None:
    target_FW = normal(F, W)
    target_FW[::2] *= 0.1  # the even rows
    ratio = {}
    for balanced in (False, True):
        squares_F = fitted(target_FW, balanced=balanced).value_FR.square().sum(dim=1)
        ratio[balanced] = float(squares_F[1::2].mean() / squares_F[::2].mean())
    assert ratio[False] > 50
    assert ratio[True] < 4  # of squares; not 1, as these targets have more directions than are kept
