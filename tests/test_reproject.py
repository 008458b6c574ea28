from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lsp_ray.projection.reproject import reproject_moments_ as move_
from lsp_ray.projection.reproject import transition
from lsp_ray.projection.sparse_projector import SparseProjector

DIM = 12


def reproject_moments_(
    exp_avg_DD: torch.Tensor, exp_avg_sq_DD: torch.Tensor, old: SparseProjector, new: SparseProjector
) -> None:
    move_(exp_avg_DD, exp_avg_sq_DD, transition(old.left, new.left), transition(old.right, new.right))


def projector(seed: int) -> SparseProjector:
    return SparseProjector.random((96, 80), DIM, 3, torch.Generator().manual_seed(seed))


def moments(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(DIM, DIM, generator=generator), torch.rand(DIM, DIM, generator=generator)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10_000))
def test_onto_the_same_projector_it_is_the_identity(seed: int) -> None:
    exp_avg, exp_avg_sq = moments(seed)
    before = exp_avg.clone(), exp_avg_sq.clone()
    reproject_moments_(exp_avg, exp_avg_sq, projector(seed), projector(seed))
    torch.testing.assert_close(exp_avg, before[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(exp_avg_sq, before[1], rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=20)
@given(old=st.integers(0, 10_000), new=st.integers(0, 10_000))
def test_v_stays_non_negative(old: int, new: int) -> None:
    exp_avg, exp_avg_sq = moments(old)
    reproject_moments_(exp_avg, exp_avg_sq, projector(old), projector(new))
    assert float(exp_avg_sq.min()) >= 0
    assert torch.isfinite(exp_avg).all()


def test_the_first_moment_of_a_gradient_in_both_subspaces_is_carried_exactly() -> None:
    old, new = projector(0), projector(1)
    core_DD, _ = moments(2)
    grad_MN = old.left.dense() @ core_DD @ old.right.dense().t()  # lies in the old subspace
    exp_avg, exp_avg_sq = old.compress(grad_MN), torch.zeros(DIM, DIM)
    reproject_moments_(exp_avg, exp_avg_sq, old, new)
    torch.testing.assert_close(exp_avg, new.compress(grad_MN), rtol=1e-4, atol=1e-3)


def test_orthonormal_columns_give_the_papers_formula() -> None:
    old, new = SparseProjector.identity(DIM).left, SparseProjector.identity(DIM).left
    paper_DD = new.dense().t() @ old.dense()
    torch.testing.assert_close(transition(old, new).float(), paper_DD, rtol=1e-6, atol=1e-6)


def test_columns_that_depend_on_each_other_do_not_blow_up_the_moments() -> None:
    old = projector(0)
    values = old.left.value_FR.clone()
    values[old.left.index_FR == 1] = 1e-6  # nearly no column
    nearly = SparseProjector(old.left.with_values(values), old.right)
    exp_avg, exp_avg_sq = (
        nearly.compress(torch.randn(96, 80, generator=torch.Generator().manual_seed(0))),
        moments(0)[1],
    )
    size = float(exp_avg.norm())
    reproject_moments_(exp_avg, exp_avg_sq, nearly, nearly)
    assert float(exp_avg.norm()) == pytest.approx(size, rel=0.1)
