"""Products of several tables in one launch, run by Triton's interpreter: those of the dense matrices.

Legend: T tokens, F rows of a factor, D its columns, R non-zeros a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lsp_ray.device import gpu_products
from lsp_ray.projection.block_factor import BlockFactor
from tests.linears import generator, normal

pytest.importorskip("triton")

CPU = torch.device("cpu")
BOUND = {torch.float32: 1e-6, torch.bfloat16: 5e-3}  # relative: bfloat16 is rounded once, by 2⁻⁹ at most
SIZES = st.tuples(st.integers(1, 5), st.integers(0, 70), st.integers(0, 3))  # groups; rows of one above R; rows left


@pytest.fixture(scope="module", autouse=True)
def _interpreted() -> Iterator[None]:
    from triton.runtime.interpreter import InterpretedFunction

    with pytest.MonkeyPatch.context() as patch:
        for name in ("_project", "_project_group"):
            patch.setattr(gpu_products, name, InterpretedFunction(getattr(gpu_products, name).fn))
        yield


def factor_of(sizes: tuple[int, int, int], nnz: int, dtype: torch.dtype) -> BlockFactor:
    groups, rows, left = sizes
    return BlockFactor.random(groups * (rows + nnz) + min(left, groups - 1), groups, nnz, generator()).to(CPU, dtype)


@settings(deadline=None, max_examples=10)
@given(
    sizes=st.lists(SIZES, min_size=2, max_size=gpu_products.MOST),
    nnz=st.sampled_from([1, 4, 5]),
    num_tokens=st.sampled_from([1, 63, 130]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    strided=st.booleans(),
)
def test_products_in_one_launch_are_those_of_the_dense_matrices(
    sizes: list[tuple[int, int, int]], nnz: int, num_tokens: int, dtype: torch.dtype, strided: bool
) -> None:
    factors = [factor_of(each, nnz, dtype) for each in sizes]
    tables = [normal(num_tokens, factor.num_rows + 3 * strided).to(dtype)[:, : factor.num_rows] for factor in factors]
    found_KT = gpu_products.project(factors, tables)
    assert found_KT.dtype == dtype
    parts = [factor.dense().double().t() @ table.double().t() for factor, table in zip(factors, tables, strict=True)]
    error = (found_KT.double() - torch.cat(parts)).norm() / torch.cat(parts).norm()
    assert float(error) <= BOUND[dtype]


def test_the_operator_for_the_compiler_is_the_same_and_tells_its_size() -> None:
    factors = [factor_of(sizes, 4, torch.float32) for sizes in ((3, 9, 1), (2, 30, 0))]
    tables = [normal(17, factor.num_rows) for factor in factors]
    given = tables, [factor.value_FR for factor in factors], [factor.groups for factor in factors]
    torch.library.opcheck(gpu_products._operator, given, test_utils=("test_schema", "test_faketensor"))
    assert torch.equal(gpu_products._operator(*given), gpu_products.project(factors, tables))


def test_the_compiler_asks_once_and_outside_whether_there_is_a_kernel() -> None:
    gpu_products.know_compiler()
    factors = [factor_of((3, 9, 0), 4, torch.float32)] * 2
    tables = [normal(17, factors[0].num_rows)] * 2
    asked = torch.compile(partial(gpu_products.has_kernel, factors), backend="eager", fullgraph=True)
    assert asked(tables) is gpu_products.has_kernel(factors, tables) is False


def test_what_cannot_be_in_one_launch_is_told_before() -> None:
    plain, other = (factor_of((3, 9, 0), nnz, torch.float32) for nnz in (4, 2))
    table = normal(17, plain.num_rows)
    for factors, tables in (
        ([plain], [table]),
        ([plain, other], [table, normal(17, other.num_rows)]),
        ([plain, plain], [table, table.t().contiguous().t()]),
        ([plain, plain], [table, table.bfloat16()]),
        ([plain] * (gpu_products.MOST + 1), [table] * (gpu_products.MOST + 1)),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gpu_products, "_runs_on", lambda _device: True)
            assert gpu_products.has_kernel([plain, plain], [table, table])
            assert not gpu_products.has_kernel(factors, tables)
