"""How coordinates in old bases become coordinates in new ones, against dense matrices.

Legend: G groups, R non-zeros a row, D columns of a factor.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lsp_ray.projection.block_factor import BlockFactor
from lsp_ray.projection.transition import transition
from tests.linears import balanced, normal, projector, relative_error

DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def unscaled(factor: BlockFactor) -> torch.Tensor:
    return BlockFactor(factor.unscaled, factor.groups).dense()


@settings(deadline=None, max_examples=30)
@given(old=st.integers(0, 999), new=st.integers(0, 999), old_scale=st.booleans(), new_scale=st.booleans())
def test_it_is_the_papers_product_of_the_bases_whatever_their_scales(
    old: int, new: int, old_scale: bool, new_scale: bool
) -> None:
    before = (balanced if old_scale else lambda by: by)(projector(old)).right
    after = (balanced if new_scale else lambda by: by)(projector(new)).right
    found_GRR = transition(before, after)
    assert (found_GRR.shape, found_GRR.dtype) == ((3, 4, 4), torch.float64)
    assert relative_error(torch.block_diag(*found_GRR), unscaled(after).t() @ unscaled(before)) < 1e-5


@DTYPE
@pytest.mark.parametrize("is_balanced", [False, True])
def test_between_equal_factors_it_is_the_identity(dtype: torch.dtype, is_balanced: bool) -> None:
    by = balanced(projector()) if is_balanced else projector()
    factor = by.right.to(torch.device("cpu"), dtype)
    twin = BlockFactor(factor.value_FR.clone(), factor.groups, factor.scale_F)
    assert torch.equal(transition(factor, twin), torch.eye(4, dtype=torch.float64).repeat(3, 1, 1))


@DTYPE
def test_a_change_within_the_old_span_is_carried_exactly(dtype: torch.dtype) -> None:
    old = projector().left.to(torch.device("cpu"), dtype)
    turned_GRR = torch.linalg.qr(normal(4, 4, 4).double()).Q
    blocks = BlockFactor(old.value_FR.double(), old.groups)
    (basis_GSR,) = blocks.blocks()
    new = blocks.with_bases(iter([basis_GSR @ turned_GRR]))
    gradient_F = unscaled(old) @ normal(16, seed=3).double()  # in both spans
    carried_D = torch.block_diag(*transition(old, new)) @ unscaled(old).t() @ gradient_F
    assert relative_error(carried_D, unscaled(new).t() @ gradient_F) < 1e-10  # though bfloat16 is hardly orthonormal


def test_factors_of_other_blocks_have_no_transition() -> None:
    with pytest.raises(AssertionError, match="other blocks"):
        transition(projector().left, projector().right)
