"""Sparse factors and projectors against dense algebra.

Legend: M rows (out), N columns (in), D subspace, R non-zeros a row, F rows of a factor, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lsp_ray.errors import ConfigError
from lsp_ray.projection import sparse_projector
from lsp_ray.projection.sparse_factor import SparseFactor, random_positions, similar_positions
from lsp_ray.projection.sparse_projector import (
    BALANCED_GAIN,
    DENSE_DIM,
    SparseProjector,
    cpu_has_matrix_unit,
    subspace_dim_for,
)

EXACT = 1e-13  # float64 sums of at most some hundred terms
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    rows: int
    columns: int
    dim: int
    nnz_per_row: int
    seed: int

    @property
    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def projector(self) -> SparseProjector:
        return SparseProjector.random((self.rows, self.columns), self.dim, self.nnz_per_row, self.generator)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(self.seed + 1))


@st.composite
def sizes(draw: st.DrawFn) -> Size:
    dim = draw(st.integers(1, 12))
    return Size(
        rows=draw(st.integers(1, 30)),
        columns=draw(st.integers(1, 30)),
        dim=dim,
        nnz_per_row=draw(st.integers(1, min(dim, 4))),
        seed=draw(st.integers(0, 2**16)),
    )


SIZE = Size(rows=48, columns=40, dim=16, nnz_per_row=4, seed=0)


def dense(factor: SparseFactor) -> torch.Tensor:
    return factor.dense().double()


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@settings(deadline=None, max_examples=50)
@given(size=sizes())
def test_compress_is_the_adjoint_of_decompress(size: Size) -> None:
    projector = size.projector()
    grad_MN, delta_DD = size.normal(size.rows, size.columns), size.normal(size.dim, size.dim)
    compressed_DD, decompressed_MN = projector.compress(grad_MN), projector.decompress(delta_DD)
    norms = (projector.left.square_sum() * projector.right.square_sum()) ** 0.5
    bound = EXACT * float(grad_MN.norm() * delta_DD.norm()) * norms
    assert abs(float((compressed_DD * delta_DD).sum() - (grad_MN * decompressed_MN).sum())) <= bound


@settings(deadline=None, max_examples=50)
@given(size=sizes(), width=st.integers(1, 9))
def test_products_with_a_factor_equal_dense_products(size: Size, width: int) -> None:
    factor = size.projector().left
    table_FK, table_DK = size.normal(size.rows, width), size.normal(size.dim, width)
    torch.testing.assert_close(factor.times(table_DK), dense(factor) @ table_DK, rtol=EXACT, atol=EXACT * 100)
    expected_DK = dense(factor).t() @ table_FK
    torch.testing.assert_close(factor.transposed_times(table_FK), expected_DK, rtol=EXACT, atol=EXACT * 100)


@settings(deadline=None, max_examples=50)
@given(size=sizes(), first=st.integers(0, 29), count=st.integers(1, 30))
def test_a_range_of_rows_is_those_rows_of_the_whole_delta(size: Size, first: int, count: int) -> None:
    first = min(first, size.rows - 1)
    count = min(count, size.rows - first)
    projector, delta_DD = size.projector(), size.normal(size.dim, size.dim)
    whole_MN = projector.decompress(delta_DD)
    assert torch.equal(projector.decompress(delta_DD, first, count), whole_MN[first : first + count])


@settings(deadline=None, max_examples=50)
@given(size=sizes(), num_tokens=st.integers(1, 20))
def test_compressing_the_two_factors_equals_compressing_their_outer_product(size: Size, num_tokens: int) -> None:
    projector = size.projector()
    grad_output_TM, input_TN = size.normal(num_tokens, size.rows), size.normal(num_tokens, size.columns)
    expected_DD = dense(projector.left).t() @ grad_output_TM.t() @ input_TN @ dense(projector.right)
    grad_DD = projector.compress_outer(grad_output_TM, projector.project_input(input_TN))
    assert grad_DD.dtype == torch.float32
    # one rounding to float32, the only one
    torch.testing.assert_close(grad_DD.double(), expected_DD, rtol=1e-7, atol=1e-10)


def test_compress_and_decompress_equal_dense_products() -> None:
    projector = SIZE.projector()
    left_MD, right_ND = dense(projector.left), dense(projector.right)
    grad_MN, delta_DD = SIZE.normal(48, 40), SIZE.normal(16, 16)
    assert relative_error(projector.compress(grad_MN), left_MD.t() @ grad_MN @ right_ND) < EXACT
    assert relative_error(projector.decompress(delta_DD), left_MD @ delta_DD @ right_ND.t()) < EXACT


# a result is a sum of up to R·M/D + R·N/D rounded products, whose errors mostly cancel
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_products_keep_the_tables_dtype_and_its_accuracy(dtype: torch.dtype, tolerance: float) -> None:
    projector = SIZE.projector()
    grad_MN, delta_DD = SIZE.normal(48, 40).to(dtype), SIZE.normal(16, 16).to(dtype)
    compressed_DD, decompressed_MN = projector.compress(grad_MN), projector.decompress(delta_DD)
    assert (compressed_DD.dtype, decompressed_MN.dtype) == (dtype, dtype)
    assert relative_error(compressed_DD, projector.compress(grad_MN.double())) < tolerance
    assert relative_error(decompressed_MN, projector.decompress(delta_DD.double())) < tolerance


@pytest.mark.parametrize("dim", [DENSE_DIM, DENSE_DIM + 1])
@pytest.mark.parametrize("has_matrix_unit", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_a_gradient_is_compressed_alike_by_dense_products_and_by_gathers(
    dim: int, has_matrix_unit: bool, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse_projector, "cpu_has_matrix_unit", lambda: has_matrix_unit)
    made_dense: list[SparseFactor] = []
    transposed_dense = SparseFactor.transposed_dense

    def noted(factor: SparseFactor) -> torch.Tensor:
        made_dense.append(factor)
        return transposed_dense(factor)

    monkeypatch.setattr(SparseFactor, "transposed_dense", noted)
    generator = torch.Generator().manual_seed(0)
    exact = SparseProjector.random((600, 520), dim, 4, generator).to(torch.device("cpu"), dtype)
    grad_output_TM, input_TN = (torch.randn(30, side, generator=generator).to(dtype) for side in exact.shape)
    grad_DD = exact.compress_outer(grad_output_TM, exact.project_input(input_TN))
    expected_DD = exact.to(torch.device("cpu"), torch.float64).compress(grad_output_TM.double().t() @ input_TN.double())
    assert grad_DD.shape == (dim, dim)
    assert relative_error(grad_DD, expected_DD) < tolerance
    is_dense = has_matrix_unit and dtype == torch.bfloat16 and dim == DENSE_DIM
    assert made_dense == ([exact.right, exact.left] if is_dense else [])


@pytest.mark.parametrize(
    ("flags", "has_one"), [("flags : fpu avx512_bf16", False), ("flags : amx_bf16 amx_tile", True), (None, False)]
)
def test_linux_tells_of_a_matrix_unit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str | None, has_one: bool
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    if flags is not None:
        cpuinfo.write_text(flags)
    monkeypatch.setattr(sparse_projector, "_CPUINFO", cpuinfo)
    assert cpu_has_matrix_unit.__wrapped__() is has_one


def test_the_table_of_a_decompression_is_contiguous() -> None:
    projector, delta_DD = SIZE.projector(), SIZE.normal(16, 16)
    table_DN = projector.spread_columns(delta_DD)
    assert table_DN.is_contiguous()
    assert relative_error(table_DN, delta_DD @ dense(projector.right).t()) < EXACT


@settings(deadline=None, max_examples=50)
@given(size=sizes())
def test_positions_are_distinct_within_a_row_and_in_range(size: Size) -> None:
    index_FR = random_positions(size.rows, size.dim, size.nnz_per_row, size.generator)
    assert index_FR.dtype == torch.int32
    assert index_FR.shape == (size.rows, size.nnz_per_row)
    assert all(len(set(row)) == size.nnz_per_row and 0 <= min(row) <= max(row) < size.dim for row in index_FR.tolist())


@settings(deadline=None, max_examples=50)
@given(size=sizes())
def test_every_column_is_used_as_often_as_any_other_of_its_block(size: Size) -> None:
    index_FR = random_positions(size.rows, size.dim, size.nnz_per_row, size.generator)
    counts = torch.bincount(index_FR.reshape(-1), minlength=size.dim)
    smallest_block = size.dim // size.nnz_per_row
    largest_block = -(-size.dim // size.nnz_per_row)
    assert int(counts.min()) >= size.rows // largest_block
    assert int(counts.max()) <= -(-size.rows // smallest_block)


def test_positions_are_decided_by_the_generator() -> None:
    first, again, other = (
        random_positions(40, 16, 4, torch.Generator().manual_seed(seed)).tolist() for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_the_identity_changes_nothing() -> None:
    projector, grad_MN = SparseProjector.identity(12), SIZE.normal(12, 12)
    assert (projector.shape, projector.dim) == ((12, 12), 12)
    assert projector.update_scale == pytest.approx(1.0, rel=1e-6)
    assert torch.equal(projector.compress(grad_MN), grad_MN)
    assert torch.equal(projector.decompress(grad_MN), grad_MN)


def test_a_random_projectors_values_have_variance_one_over_r() -> None:
    projector = SparseProjector.random((1000, 1000), 64, 4, torch.Generator().manual_seed(0))
    values = torch.cat([projector.left.value_FR, projector.right.value_FR]).double()
    num = values.numel()  # the standard error of a variance is sqrt(2 / num) of it: 5 of them
    assert float(values.var()) == pytest.approx(0.25, rel=5 * (2 / num) ** 0.5)
    assert abs(float(values.mean())) < 5 * 0.5 / num**0.5


@pytest.mark.parametrize(("dim", "nnz_per_row"), [(8, 1), (32, 4), (64, 8)])
def test_a_scaled_update_is_as_large_as_a_full_one_at_any_dim_and_nnz(dim: int, nnz_per_row: int) -> None:
    generator = torch.Generator().manual_seed(dim)
    projector = SparseProjector.random((160, 96), dim, nnz_per_row, generator)
    squares = []
    for _ in range(200):
        signs_DD = torch.randint(0, 2, (dim, dim), generator=generator).double() * 2 - 1
        squares.append(float((projector.decompress(signs_DD) * projector.update_scale).square().mean()))
    # over random signs the mean square is exactly 1; its deviation is at most about 2 / dim a draw
    assert sum(squares) / len(squares) == pytest.approx(1.0, abs=5 * 2 / dim / 200**0.5)


def test_a_projector_of_zeros_makes_no_update() -> None:
    zeros = SparseFactor(torch.tensor([[0], [1], [0], [1]]), torch.zeros(4, 1), 2)
    assert SparseProjector(zeros, zeros).update_scale == 0.0


def test_factors_of_different_dims_make_no_projector() -> None:
    left, right = (SparseProjector.random((8, 8), dim, 2, SIZE.generator).left for dim in (4, 6))
    with pytest.raises(ConfigError, match=r"be the left factor's \(4\) on the right, got 6"):
        SparseProjector(left, right)


@pytest.mark.parametrize(("dtype", "value_bytes"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_device_memory_is_a_value_and_an_int16_for_each_non_zero_whatever_the_dim(
    dtype: torch.dtype, value_bytes: int
) -> None:
    rows, columns, nnz_per_row, index_bytes = 600, 400, 4, 2
    for dim in (8, 64, 200):
        projector = SparseProjector.random((rows, columns), dim, nnz_per_row, SIZE.generator).to(CPU, dtype)
        assert projector.nbytes == (rows + columns) * nnz_per_row * (value_bytes + index_bytes)
        held = [tensor for factor in (projector.left, projector.right) for tensor in vars(factor).values()]
        assert sum(tensor.nbytes for tensor in held if isinstance(tensor, torch.Tensor)) == projector.nbytes


def test_more_rows_than_int16_can_count_take_int32() -> None:
    factor = SparseFactor(random_positions(40_000, 8, 1, SIZE.generator), torch.ones(40_000, 1), 8)
    assert factor.nbytes == 40_000 * (4 + 4)
    table_DK = SIZE.normal(8, 2)
    assert torch.equal(factor.times(table_DK), table_DK[factor.index_FR[:, 0].long()])


def test_positions_that_do_not_keep_to_their_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="blocks of 2 columns"):
        SparseFactor(torch.tensor([[0], [0], [0], [1]]), torch.ones(4, 1), 2)


def test_a_converted_projector_has_the_same_values_in_the_other_dtype() -> None:
    projector = SIZE.projector()
    converted = projector.to(CPU, torch.bfloat16)
    assert torch.equal(converted.left.dense(), projector.left.dense().bfloat16())
    assert torch.equal(converted.right.dense(), projector.right.dense().bfloat16())
    assert torch.equal(projector.to(CPU).left.dense(), projector.left.dense())


@pytest.mark.parametrize(
    ("shape", "asked", "expected"), [((192, 576), 64, 64), ((192, 576), 512, 96), ((576, 193), 96, 96), ((7, 9), 4, 3)]
)
def test_the_dim_is_what_was_asked_for_up_to_half_of_the_smaller_side(
    shape: tuple[int, int], asked: int, expected: int
) -> None:
    assert subspace_dim_for(shape, asked) == expected


def test_similar_rows_share_a_column() -> None:
    """Two kinds of rows, mixed; with 8 columns for 32 rows no column needs to hold both kinds."""
    kinds_F = torch.randperm(32, generator=torch.Generator().manual_seed(0)) % 2
    target_FS = torch.eye(2)[kinds_F].repeat_interleave(3, dim=1)
    target_FS *= torch.where(torch.arange(32) % 3 == 0, -1.0, 1.0).unsqueeze(1)  # a value's sign is free
    index_FR = similar_positions(target_FS, 16, 2, torch.Generator().manual_seed(1))
    for column in range(16):
        assert len(set(kinds_F[(index_FR == column).any(dim=1)].tolist())) == 1


@given(rows=st.integers(1, 60), dim=st.integers(1, 40), nnz_per_row=st.integers(1, 6), seed=st.integers(0, 99))
def test_positions_by_similarity_keep_to_the_blocks(rows: int, dim: int, nnz_per_row: int, seed: int) -> None:
    dim = max(dim, nnz_per_row)
    generator = torch.Generator().manual_seed(seed)
    index_FR = similar_positions(torch.randn(rows, 5, generator=generator), dim, nnz_per_row, generator)
    factor = SparseFactor(index_FR, torch.ones(rows, nnz_per_row), dim)  # refuses other positions
    assert torch.equal(factor.index_FR, index_FR)


def test_a_balanced_projectors_update_is_larger_by_the_gain() -> None:
    plain = SIZE.projector()
    left, right = (part.scaled(torch.full((part.num_rows,), 3.0)) for part in (plain.left, plain.right))
    assert SparseProjector(left, right).update_scale == pytest.approx(BALANCED_GAIN * plain.update_scale / 9)
