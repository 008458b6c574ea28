"""Block factors and projectors against dense algebra.

Legend: F rows of a factor, D × E what is sent, G groups, R non-zeros a row, T, K any number of rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lsp_ray.projection.block_factor import BlockFactor
from lsp_ray.projection.sparse_projector import BALANCED_GAIN, ProjectorSizes, SparseProjector
from tests.linears import SIZES, M, N, R, balanced, generator, normal, projector, relative_error, scaled

CPU = torch.device("cpu")
EXACT = 1e-13  # float64 sums of at most some hundred terms
# of the norms that are multiplied: float32 sums of at most some hundred terms, rounded once more to 8 bits in bfloat16
ACCURACY = {torch.float64: EXACT, torch.float32: 1e-6, torch.bfloat16: 2.0**-8}
DTYPES = st.sampled_from(list(ACCURACY))
Product = Callable[[BlockFactor, torch.Tensor], torch.Tensor]


def by_columns(factor: BlockFactor, table_TF: torch.Tensor) -> torch.Tensor:
    """As a GPU has it."""
    projected_DT = factor.project_by_columns(table_TF)
    assert projected_DT.is_contiguous()
    return projected_DT.t()


PRODUCTS: list[Product] = [BlockFactor.project, by_columns, BlockFactor.spread]


@st.composite
def factors(draw: st.DrawFn) -> BlockFactor:
    """Float32, of any number of groups: it divides the rows or not."""
    nnz, groups = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    rows = draw(st.integers(groups * nnz, groups * nnz + 40))
    return BlockFactor.random(rows, groups, nnz, generator(draw(st.integers(0, 99))))


def dense(value_FR: torch.Tensor, groups: int) -> torch.Tensor:
    """Blocks on the diagonal, made by torch; `tensor_split` makes the first F mod G parts one longer, too."""
    blocks: torch.Tensor = torch.block_diag(*value_FR.tensor_split(groups))
    return blocks


def gradients(product: torch.Tensor, by: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return product, *torch.autograd.grad([product], inputs, [by])


@settings(deadline=None, max_examples=100)
@given(factor=factors(), width=st.integers(1, 9), dtype=DTYPES, product=st.sampled_from(PRODUCTS))
def test_products_and_their_gradients_are_those_of_the_dense_matrix(
    factor: BlockFactor, width: int, dtype: torch.dtype, product: Product
) -> None:
    spreads = product is BlockFactor.spread
    rows, dim = factor.num_rows, factor.dim
    table = normal(*((dim, width) if spreads else (width, rows)), seed=1).to(dtype).requires_grad_()
    value_FR = factor.value_FR.to(dtype).requires_grad_()
    blocks = BlockFactor(value_FR, factor.groups)
    exact, exact_value = (tensor.detach().double().requires_grad_() for tensor in (table, value_FR))
    dense_FD = dense(exact_value, factor.groups)
    by = normal(*((rows, width) if spreads else (width, dim)), seed=2).to(dtype)
    ours = gradients(product(blocks, table), by, table, value_FR)
    theirs = gradients(dense_FD @ exact if spreads else exact @ dense_FD, by.double(), exact, exact_value)
    table_size, factor_size, by_size = (float(tensor.detach().norm()) for tensor in (table, value_FR, by))
    sizes = (table_size * factor_size, by_size * factor_size, by_size * table_size)
    for our, their, size in zip(ours, theirs, sizes, strict=True):
        assert (our.shape, our.dtype) == (their.shape, dtype)
        assert float((our.double() - their).detach().norm()) <= ACCURACY[dtype] * size
    assert torch.equal(blocks.dense(), dense(value_FR, factor.groups))


@given(factor=factors())
def test_every_row_has_r_non_zeros_and_the_columns_are_orthonormal(factor: BlockFactor) -> None:
    dense_FD = factor.dense().double()
    assert (dense_FD != 0).sum(dim=1).tolist() == [factor.nnz_per_row] * factor.num_rows
    torch.testing.assert_close(dense_FD.t() @ dense_FD, torch.eye(factor.dim).double(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 8, 50])
def test_device_memory_is_a_value_for_each_non_zero_whatever_the_dim(dtype: torch.dtype, groups: int) -> None:
    factor = BlockFactor.random(600, groups, 4, generator()).to(CPU, dtype)
    held = [tensor for tensor in vars(factor).values() if isinstance(tensor, torch.Tensor)]
    assert factor.nbytes == sum(tensor.untyped_storage().nbytes() for tensor in held) == 600 * 4 * dtype.itemsize


@pytest.mark.parametrize("rows", [24, 26], ids=["equal groups", "long groups"])
@pytest.mark.parametrize("product", PRODUCTS)
def test_products_are_compiled_in_one_piece_with_their_gradients(product: Product, rows: int) -> None:
    torch.compiler.reset()
    factor = BlockFactor.random(rows, 4, 3, generator())
    factor.value_FR.requires_grad_()
    table = normal(*((5, rows) if product is not BlockFactor.spread else (factor.dim, 5))).requires_grad_()
    compiled = torch.compile(product, backend="aot_eager", fullgraph=True)
    expected = product(factor, table)
    by = torch.ones_like(expected)
    pairs = zip(
        gradients(compiled(factor, table), by, table, factor.value_FR),
        gradients(expected, by, table, factor.value_FR),
        strict=True,
    )
    for our, their in pairs:
        torch.testing.assert_close(our, their)


@given(side=st.tuples(st.integers(8, 300), st.integers(8, 300)), asked=st.integers(1, 200), nnz=st.integers(1, 4))
def test_what_is_sent_is_the_largest_multiple_of_r_up_to_what_was_asked_and_half_a_side(
    side: tuple[int, int], asked: int, nnz: int
) -> None:
    asked = max(asked, nnz)
    sizes = ProjectorSizes.of(side, asked, nnz)
    for rows, dim, groups in zip(side, sizes.dims, sizes.groups, strict=True):
        bound = min(asked, rows // 2)
        assert dim == max(number for number in range(bound + 1) if number % nnz == 0)
        assert groups * nnz == dim


def test_a_random_projector_has_the_sizes_asked_for_and_is_decided_by_its_generator() -> None:
    assert projector().sizes == SIZES
    assert projector().dims == SIZES.dims
    assert projector().nbytes == 4 * R * (M + N)
    assert torch.equal(projector(1).left.dense(), projector(1).left.dense())
    assert not torch.equal(projector(1).left.dense(), projector(2).left.dense())


@settings(deadline=None, max_examples=30)
@given(left=factors(), right=factors(), num_tokens=st.integers(1, 20))
def test_compressing_and_decompressing_are_dense_products(
    left: BlockFactor, right: BlockFactor, num_tokens: int
) -> None:
    by = SparseProjector(left, right).to(CPU, torch.float64)
    left_MD, right_NE = by.left.dense(), by.right.dense()
    grad_output_TM, input_TN = (normal(num_tokens, side).double() for side in by.shape)
    grad_MN, delta_DE = grad_output_TM.t() @ input_TN, normal(*by.dims).double()
    expected_DE = left_MD.t() @ grad_MN @ right_NE
    grad_DE = by.compress_outer(grad_output_TM, by.right.project(input_TN))
    size = float(grad_output_TM.norm() * input_TN.norm())
    torch.testing.assert_close(by.compress(grad_MN), expected_DE, rtol=0, atol=EXACT * size)
    assert grad_DE.dtype == torch.float32
    torch.testing.assert_close(grad_DE.double(), expected_DE, rtol=1e-7, atol=EXACT * size)  # rounded once
    torch.testing.assert_close(by.decompress(delta_DE), left_MD @ delta_DE @ right_NE.t(), rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize(("dim", "nnz_per_row"), [(8, 1), (32, 4), (40, 8)])
def test_a_scaled_update_is_as_large_as_a_full_one_at_any_dim_and_nnz(dim: int, nnz_per_row: int) -> None:
    by = projector(sizes=ProjectorSizes.of((160, 96), dim, nnz_per_row))
    signs_DE = normal(*by.dims).sign()
    update_MN = by.decompress(signs_DE) * by.update_scale
    assert float(update_MN.norm()) == pytest.approx(math.sqrt(160 * 96), rel=1e-5)


def test_a_balanced_projectors_entries_are_enlarged_up_to_the_learning_rate_and_a_plain_ones_kept() -> None:
    plain = projector()
    left, right = (
        side.with_bases(side.blocks(), torch.full((side.num_rows,), 3.0)) for side in (plain.left, plain.right)
    )
    balanced = SparseProjector(left, right)
    assert balanced.update_scale == pytest.approx(plain.update_scale / 9)
    delta_DE = normal(*plain.dims) * 1e-3
    entries_DE = balanced.update_size(2.0, 1e-3).applied(delta_DE)
    assert torch.equal(entries_DE, (delta_DE * BALANCED_GAIN).clamp(-1e-3, 1e-3) * 2.0)
    assert 0 < int((entries_DE.abs() == 2e-3).sum()) < entries_DE.numel()
    assert torch.equal(plain.update_size(2.0, 1e-3).applied(delta_DE), delta_DE * 2.0)


def test_a_scaled_factor_knows_what_its_bases_were_and_what_they_must_see() -> None:
    plain, factor = projector().right, scaled(projector().right)
    table_KF = normal(5, factor.num_rows)
    assert relative_error(factor.unscaled, plain.value_FR) < 1e-7
    assert relative_error(plain.project(factor.scale_columns(table_KF)), factor.project(table_KF)) < 1e-6
    assert plain.scale_columns(table_KF) is table_KF


def test_a_converted_projector_has_the_same_values_and_scales_in_the_other_dtype() -> None:
    before = balanced(projector())
    after = before.to(CPU, torch.bfloat16)
    assert after.sizes == before.sizes
    for one, other in ((before.left, after.left), (before.right, after.right)):
        assert torch.equal(other.value_FR, one.value_FR.bfloat16())
        assert one.scale_F is not None
        assert other.scale_F is not None
        assert torch.equal(other.scale_F, one.scale_F)
