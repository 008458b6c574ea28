"""The CPU's kernels give the bits of torch's operators, whatever the shape, the strides and the number of threads.

Legend: M rows (out), N columns (in), D subspace, R non-zeros a row, K rows of a part.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numba
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lsp_ray.device import cpu_kernels
from lsp_ray.device.cpu_kernels import add_decompressed_, add_dense_
from lsp_ray.device.noise import MAX_ELEMENTS, NOISE_ELEMENTS, Noise, noise_block
from lsp_ray.device.rounding import Rounding
from lsp_ray.projection.sparse_projector import SparseProjector


@contextmanager
def threads(num: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(num)
    try:
        yield
    finally:
        torch.set_num_threads(before)


BLOCK = noise_block(torch.Generator().manual_seed(0), torch.device("cpu"))
STARTS = st.one_of(st.integers(0, NOISE_ELEMENTS - 1), st.integers(NOISE_ELEMENTS - 3000, NOISE_ELEMENTS - 1))


def rounded(weight: torch.Tensor, delta: torch.Tensor, noise: Noise, keep: float, *, first: int = 0) -> torch.Tensor:
    """keep · weight + delta by torch's operators, one float32 operation after the other; the noise goes round."""
    exact = weight.float() * keep + delta
    at = (noise.start + first + torch.arange(weight.numel())) % NOISE_ELEMENTS
    drawn = noise.block.to(torch.int32)[at].view(weight.shape)
    return (exact.view(torch.int32) + drawn).bitwise_and(-(1 << 16)).view(torch.float32).bfloat16()


def decompressed(projector: SparseProjector, delta_DD: torch.Tensor) -> torch.Tensor:
    """P δ Qᵀ, each sum taken in order of the columns; float32."""
    transposed_ND = summed(projector.right.index_FR, projector.right.value_FR, delta_DD.t())
    return summed(projector.left.index_FR, projector.left.value_FR, transposed_ND.t())


def summed(index_FR: torch.Tensor, value_FR: torch.Tensor, table_DK: torch.Tensor) -> torch.Tensor:
    total_FK = torch.zeros(len(index_FR), table_DK.shape[1])
    for position in range(index_FR.shape[1]):
        total_FK = total_FK + value_FR[:, position, None].float() * table_DK[index_FR[:, position].long()]
    return total_FK


@given(
    num=st.integers(1, 5000),
    keep=st.sampled_from([1.0, 0.999, 0.5, 0.0]),
    num_threads=st.sampled_from([1, 3]),
    start=STARTS,
    seed=st.integers(0, 99),
)
def test_a_full_delta_is_added_as_torch_adds_it(num: int, keep: float, num_threads: int, start: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight, delta = torch.randn(num, generator=generator).bfloat16(), torch.randn(num, generator=generator) * 1e-2
    noise = Noise(block=BLOCK, start=start)
    expected = rounded(weight, delta, noise, keep, first=5)
    with threads(num_threads):
        add_dense_(weight, delta, noise, keep, first=5)
    assert torch.equal(weight, expected)


@given(
    shape=st.tuples(st.integers(12, 150), st.integers(12, 150)),
    nnz=st.integers(1, 6),
    dim=st.integers(6, 12),
    is_transposed=st.booleans(),
    num_threads=st.sampled_from([1, 3]),
    start=STARTS,
    seed=st.integers(0, 99),
)
def test_a_projected_delta_is_added_as_torch_adds_it(
    shape: tuple[int, int], nnz: int, dim: int, is_transposed: bool, num_threads: int, start: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    projector = SparseProjector.random(shape, dim, nnz, generator).to(torch.device("cpu"), torch.bfloat16)
    delta_DD = torch.randn(dim, dim, generator=generator) * 1e-2
    weight_MN = torch.randn(shape, generator=generator).bfloat16()
    if is_transposed:
        weight_MN = weight_MN.t().contiguous().t()
    noise = Noise(block=BLOCK, start=start)
    expected_MN = rounded(weight_MN, decompressed(projector, delta_DD), noise, 0.999)
    with threads(num_threads):
        add_decompressed_(weight_MN, projector, delta_DD, noise, 0.999)
    assert torch.equal(weight_MN, expected_MN)


@pytest.mark.parametrize("special", [float("inf"), float("-inf"), float("nan"), 3.38e38])
def test_a_weight_that_is_not_finite_stays_what_it_is(special: float) -> None:
    weight = torch.full((1000,), special).bfloat16()
    before = weight.clone()
    add_dense_(weight, torch.zeros(1000), Noise(block=torch.full_like(BLOCK, (1 << 16) - 1), start=0), 1.0)
    assert torch.equal(weight, before) or (special != special and weight.isnan().all())


def test_code_that_may_be_kept_nowhere_is_compiled_for_this_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    compile_ = numba.njit

    def njit(*args: Any, cache: bool = False, **options: Any) -> Any:
        asked.append(cache)
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return compile_(*args, **options)

    monkeypatch.setattr(numba, "njit", njit)
    cpu_kernels._compiled(lambda: None)
    assert asked == [True, False]


@pytest.mark.parametrize(
    "num", [3000, MAX_ELEMENTS + 100, 3 * MAX_ELEMENTS]
)  # in one part, in two, once round the noise
def test_where_numba_is_missing_torchs_operators_give_the_same_bits(monkeypatch: pytest.MonkeyPatch, num: int) -> None:
    rounding, generator = Rounding(3, torch.device("cpu")), torch.Generator().manual_seed(0)
    weight, delta = torch.randn(num, generator=generator).bfloat16(), torch.randn(num, generator=generator)
    with_kernel, without = weight.clone(), weight.clone()
    rounding.add_(with_kernel, delta, keep=0.9, step=1, key=2)
    monkeypatch.setattr(cpu_kernels, "numba", None)
    assert not cpu_kernels.has_kernel(weight)
    rounding.add_(without, delta, keep=0.9, step=1, key=2)
    assert torch.equal(with_kernel, without)
    assert not torch.equal(without, weight)
