"""The GPU's kernels, run by Triton's interpreter on the CPU, give the sums of torch's operators to the bit.

Legend: M rows (out), N columns (in), D subspace, K rows of a part.
"""

from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lsp_ray.device import cpu_kernels, gpu_kernels
from lsp_ray.device.kernels import kernels_for
from lsp_ray.device.noise import Noise
from lsp_ray.device.rounding import Rounding
from lsp_ray.projection import sparse_factor, triton_kernel
from lsp_ray.projection.sparse_factor import SparseFactor, random_positions
from lsp_ray.projection.sparse_projector import SparseProjector
from tests.test_cpu_kernels import BLOCK as BLOCK_16
from tests.test_cpu_kernels import STARTS, decompressed, rounded

BLOCK = BLOCK_16.to(torch.int32)  # as on a GPU


def interpreted_copy(name: str) -> ModuleType:
    """The module once more, its kernels interpreted: Triton decides that where they are decorated."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def interpreted() -> ModuleType:
    pytest.importorskip("triton")
    return interpreted_copy(gpu_kernels.__name__)


@pytest.fixture(scope="module")
def interpreted_dense() -> ModuleType:
    pytest.importorskip("triton")
    return interpreted_copy(triton_kernel.__name__)


@settings(max_examples=20)
@given(num=st.integers(1, 3000), keep=st.sampled_from([1.0, 0.999, 0.0]), start=STARTS, seed=st.integers(0, 99))
def test_a_full_delta_is_added_as_torch_adds_it(interpreted: Any, num: int, keep: float, start: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight, delta = torch.randn(num, generator=generator).bfloat16(), torch.randn(num, generator=generator) * 1e-2
    noise = Noise(block=BLOCK, start=start)
    expected = rounded(weight, delta, noise, keep, first=5)
    interpreted.add_dense_(weight, delta, noise, keep, first=5)
    assert torch.equal(weight, expected)


@settings(max_examples=20)
@given(
    shape=st.tuples(st.integers(12, 150), st.integers(12, 150)),
    nnz=st.integers(1, 6),
    dim=st.integers(6, 12),
    is_transposed=st.booleans(),
    start=STARTS,
    seed=st.integers(0, 99),
)
def test_a_projected_delta_is_added_as_torch_adds_it(
    interpreted: Any, shape: tuple[int, int], nnz: int, dim: int, is_transposed: bool, start: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    projector = SparseProjector.random(shape, dim, nnz, generator).to(torch.device("cpu"), torch.bfloat16)
    delta_DD = torch.randn(dim, dim, generator=generator) * 1e-2
    weight_MN = torch.randn(shape, generator=generator).bfloat16()
    if is_transposed:
        weight_MN = weight_MN.t().contiguous().t()
    noise = Noise(block=BLOCK, start=start)
    expected_MN = rounded(weight_MN, decompressed(projector, delta_DD), noise, 0.999)
    interpreted.add_decompressed_(weight_MN, projector, delta_DD.t().contiguous().t(), noise, 0.999)
    assert torch.equal(weight_MN, expected_MN)


@settings(max_examples=20)
@given(
    num_rows=st.integers(12, 1500),
    nnz=st.integers(1, 6),
    dim=st.integers(6, 12),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_the_dense_form_is_the_factors(
    interpreted_dense: Any, num_rows: int, nnz: int, dim: int, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    values_FR = torch.randn(num_rows, nnz, generator=generator).to(dtype)
    factor = SparseFactor(random_positions(num_rows, dim, nnz, generator), values_FR, dim)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse_factor, "runs_on", lambda _device: True)
        patch.setattr(sparse_factor, "transposed_dense", interpreted_dense.transposed_dense)
        found_DF = factor.transposed_dense()
    assert torch.equal(found_DF, factor.dense().t())
    assert torch.equal(factor.transposed_dense(), factor.dense().t())


@pytest.mark.parametrize("special", [float("inf"), float("-inf"), float("nan"), 3.38e38])
def test_a_weight_that_is_not_finite_stays_what_it_is(interpreted: Any, special: float) -> None:
    weight = torch.full((1000,), special).bfloat16()
    before = weight.clone()
    interpreted.add_dense_(weight, torch.zeros(1000), Noise(block=torch.full_like(BLOCK, (1 << 16) - 1), start=0), 1.0)
    assert torch.equal(weight, before) or (special != special and weight.isnan().all())


def test_triton_runs_on_no_cpu() -> None:
    assert not triton_kernel.runs_on(torch.device("cpu"))


def test_a_card_for_which_triton_builds_nothing_gets_torchs_operators(
    interpreted_dense: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gpu:
        """Interpreted, tensors may lie anywhere."""

        type = "cuda"

    def fails(*_args: object) -> None:
        raise RuntimeError("Failed to find C compiler")

    real_zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device, dtype: real_zeros(*size, dtype=dtype))
    assert interpreted_dense.runs_on(Gpu())
    monkeypatch.setattr(interpreted_dense, "transposed_dense", fails)
    assert not interpreted_dense.runs_on(Gpu())


def test_a_weight_gets_the_kernels_of_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.zeros(4, dtype=torch.bfloat16)
    assert kernels_for(weight) is cpu_kernels
    assert kernels_for(weight.float()) is None
    monkeypatch.setattr(cpu_kernels, "has_kernel", lambda _weight: False)
    assert kernels_for(weight) is None  # it is on no GPU
    monkeypatch.setattr(gpu_kernels, "runs_on", lambda _device: True)
    assert kernels_for(weight) is gpu_kernels
    assert kernels_for(weight.float()) is None


def test_rounding_takes_the_gpus_kernels_where_they_are(interpreted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rounding, generator = Rounding(3, torch.device("cpu")), torch.Generator().manual_seed(0)
    weight, delta = torch.randn(3000, generator=generator).bfloat16(), torch.randn(3000, generator=generator)
    on_cpu, on_gpu = weight.clone(), weight.clone()
    rounding.add_(on_cpu, delta, keep=0.9, step=1, key=2)
    monkeypatch.setattr(cpu_kernels, "has_kernel", lambda _weight: False)
    monkeypatch.setattr(gpu_kernels, "runs_on", lambda _device: True)
    monkeypatch.setattr(gpu_kernels, "add_dense_", interpreted.add_dense_)
    rounding.add_(on_gpu, delta, keep=0.9, step=1, key=2)
    assert torch.equal(on_cpu, on_gpu)
    assert not torch.equal(on_gpu, weight)
