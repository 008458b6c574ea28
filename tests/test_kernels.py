"""What adds deltas to weights, Numba, Triton and torch: equal bits, whatever the shape, the strides and the threads.

Triton's kernels are run by its interpreter.

Legend: M rows (out), N columns (in), D × E what is sent, R non-zeros a row.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numba
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lsp_ray.device import cpu_kernels, gpu_kernels, torch_kernels
from lsp_ray.device.kernels import Kernels, kernels_for
from lsp_ray.device.noise import MAX_ELEMENTS, NOISE_ELEMENTS, Noise, noise_block
from lsp_ray.device.rounding import Rounding
from lsp_ray.projection.block_factor import BlockFactor
from lsp_ray.projection.sparse_projector import SparseProjector, UpdateSize

BLOCK = noise_block(torch.Generator().manual_seed(0), torch.device("cpu"))
STARTS = st.one_of(st.integers(0, NOISE_ELEMENTS - 1), st.integers(NOISE_ELEMENTS - 3000, NOISE_ELEMENTS - 1))
DTYPES = st.sampled_from([torch.bfloat16, torch.float32])
KEEPS = st.sampled_from([1.0, 0.999, 0.5, 0.0])
EVERYWHERE = ("numba", "triton", "torch")


@contextmanager
def threads(num: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(num)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def interpreted_copy() -> ModuleType:
    """gpu_kernels once more, its kernels interpreted: Triton decides that where they are decorated."""
    pytest.importorskip("triton")
    spec = importlib.util.find_spec(gpu_kernels.__name__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=EVERYWHERE)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return {"numba": lambda: cpu_kernels, "torch": lambda: torch_kernels, "triton": interpreted_copy}[request.param]()


def rounded(weight: torch.Tensor, delta: torch.Tensor, start: int, keep: float, *, first: int = 0) -> torch.Tensor:
    """keep · weight + delta, one float32 operation after the other; the noise goes round."""
    exact = weight.float() * keep + delta
    if weight.dtype == torch.float32:
        return exact
    at = (start + first + torch.arange(weight.numel())) % NOISE_ELEMENTS
    drawn = (BLOCK.int() & 0xFFFF)[at].view(weight.shape)
    return (exact.view(torch.int32) + drawn).bitwise_and(-(1 << 16)).view(torch.float32).bfloat16()


def in_order(dense_FD: torch.Tensor, table_DK: torch.Tensor) -> torch.Tensor:
    """The product of a dense factor with a table, every sum taken in order of the columns; zeros change nothing."""
    total_FK = torch.zeros(dense_FD.shape[0], table_DK.shape[1])
    for column in range(dense_FD.shape[1]):
        total_FK = total_FK + dense_FD[:, column, None].float() * table_DK[column]
    return total_FK


@st.composite
def projectors(draw: st.DrawFn) -> SparseProjector:
    nnz = draw(st.integers(1, 6))
    sides = [draw(st.integers(2 * nnz, 150)) for _ in range(2)]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    factors = [
        BlockFactor.random(side, draw(st.integers(1, min(9, side // nnz))), nnz, generator).to(
            torch.device("cpu"), torch.bfloat16
        )
        for side in sides
    ]
    return SparseProjector(*factors)


@settings(max_examples=25)
@given(num=st.integers(1, 5000), dtype=DTYPES, keep=KEEPS, start=STARTS, num_threads=st.sampled_from([1, 3]))
def test_a_full_delta_is_added_in_float32_and_rounded_by_the_noise(
    kernels: Any, num: int, dtype: torch.dtype, keep: float, start: int, num_threads: int
) -> None:
    generator = torch.Generator().manual_seed(num)
    weight = torch.randn(num, generator=generator).to(dtype)
    delta = torch.randn(num, generator=generator) * 1e-2
    expected = rounded(weight, delta, start, keep, first=5)
    with threads(num_threads):
        kernels.add_dense_(weight, delta, Noise(block=BLOCK, start=start), keep, first=5)
    assert torch.equal(weight, expected)


@settings(max_examples=25, deadline=None)
@given(
    projector=projectors(),
    dtype=DTYPES,
    delta_dtype=DTYPES,
    bound=st.sampled_from([1e-2, math.inf]),
    is_transposed=st.booleans(),
    keep=KEEPS,
    start=STARTS,
    num_threads=st.sampled_from([1, 3]),
)
def test_a_projected_delta_is_added_as_its_sums_in_order_are(
    kernels: Any,
    projector: SparseProjector,
    dtype: torch.dtype,
    delta_dtype: torch.dtype,
    bound: float,
    is_transposed: bool,
    keep: float,
    start: int,
    num_threads: int,
) -> None:
    generator, size = torch.Generator().manual_seed(start), UpdateSize(3.0, bound, 1.7)
    delta_DE = (torch.randn(projector.dims, generator=generator) * 1e-2).to(delta_dtype)
    weight_MN = torch.randn(projector.shape, generator=generator).to(dtype)
    if is_transposed:
        weight_MN = weight_MN.t().contiguous().t()
    sent_DE = (delta_DE.float() * 3).clamp(-size.bound, size.bound) * 1.7
    table_DN = in_order(projector.right.dense(), sent_DE.t()).t()
    expected_MN = rounded(weight_MN, in_order(projector.left.dense(), table_DN), start, keep)
    with threads(num_threads):
        kernels.add_decompressed_(weight_MN, projector, delta_DE, size, Noise(block=BLOCK, start=start), keep)
    assert torch.equal(weight_MN, expected_MN)


@pytest.mark.parametrize("special", [float("inf"), float("-inf"), float("nan"), 3.38e38])
def test_a_weight_that_is_not_finite_stays_what_it_is(kernels: Any, special: float) -> None:
    weight = torch.full((1000,), special).bfloat16()
    before = weight.clone()
    kernels.add_dense_(weight, torch.zeros(1000), Noise(block=torch.full_like(BLOCK, -1), start=0), 1.0)
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
    assert kernels_for(weight) is torch_kernels
    rounding.add_(without, delta, keep=0.9, step=1, key=2)
    assert torch.equal(with_kernel, without)
    assert not torch.equal(without, weight)


def test_triton_runs_on_no_cpu() -> None:
    assert not gpu_kernels.runs_on(torch.device("cpu"))


def test_a_card_for_which_triton_builds_nothing_gets_torchs_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gpu:
        """Interpreted, tensors may lie anywhere."""

        type = "cuda"

    def fails(*_args: object) -> None:
        raise RuntimeError("Failed to find C compiler")

    module: Any = interpreted_copy()
    real_zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device, **options: real_zeros(*size, **options))
    assert module.runs_on(Gpu())
    monkeypatch.setattr(module, "add_dense_", fails)
    assert not module.runs_on(Gpu())


def test_a_weight_gets_the_kernels_of_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.zeros(4, dtype=torch.bfloat16)
    assert kernels_for(weight) is kernels_for(weight.float()) is cpu_kernels
    monkeypatch.setattr(cpu_kernels, "has_kernel", lambda _weight: False)
    assert kernels_for(weight) is torch_kernels  # it is on no GPU
    monkeypatch.setattr(gpu_kernels, "runs_on", lambda _device: True)
    assert kernels_for(weight) is kernels_for(weight.float()) is gpu_kernels
