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
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lsp_ray.device import cpu_kernels, gpu_kernels, torch_kernels
from lsp_ray.device.addition import Addition
from lsp_ray.device.kernels import Adder, Kernels, kernels_for
from lsp_ray.device.noise import MAX_ELEMENTS, NOISE_ELEMENTS, Noise, noise_block
from lsp_ray.device.rounding import Rounding, StepNoise
from lsp_ray.optim.adamw import AdamWHyper, AdamWState, adamw_delta_
from lsp_ray.projection.block_factor import BlockFactor
from lsp_ray.projection.sparse_projector import SparseProjector, UpdateSize

BLOCK = noise_block(torch.Generator().manual_seed(0), torch.device("cpu"))
STARTS = st.one_of(st.integers(0, NOISE_ELEMENTS - 1), st.integers(NOISE_ELEMENTS - 3000, NOISE_ELEMENTS - 1))
DTYPES = st.sampled_from([torch.bfloat16, torch.float32])
KEEPS = st.sampled_from([1.0, 0.999, 0.5, 0.0])
RATES = st.sampled_from([1e-2, 0.0])
ROUNDING = Rounding(3, torch.device("cpu"))


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


@pytest.fixture(scope="module")
def on_gpu() -> Any:
    """gpu_kernels, interpreted."""
    return interpreted_copy()


@pytest.fixture(scope="module", params=["numba", "torch"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    """Those that add one delta at a time."""
    by_name: dict[str, Kernels] = {"numba": cpu_kernels, "torch": torch_kernels}
    return by_name[request.param]


def rounded(weight: torch.Tensor, delta: torch.Tensor, start: int, keep: float) -> torch.Tensor:
    """keep · weight + delta, one float32 operation after the other; the noise goes round."""
    exact = weight.float() * keep + delta
    if weight.dtype == torch.float32:
        return exact
    at = (start + torch.arange(weight.numel())) % NOISE_ELEMENTS
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
    expected = rounded(weight, delta, start, keep)
    with threads(num_threads):
        kernels.add_dense_(weight, delta, Noise(block=BLOCK, start=start), keep)
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


def balanced(projector: SparseProjector) -> SparseProjector:
    left = projector.left
    return SparseProjector(BlockFactor(left.value_FR, left.groups, torch.ones(left.num_rows)), projector.right)


@st.composite
def additions(draw: st.DrawFn, dtypes: st.SearchStrategy[torch.dtype] = DTYPES) -> list[Addition]:
    """A unit's weights: matrices with and without projectors, norms and biases, in any order."""
    dtype, generator = draw(dtypes), torch.Generator().manual_seed(draw(st.integers(0, 99)))
    made = []
    for kind in draw(st.lists(st.sampled_from(["flat", "rows", "columns", "float32"]), min_size=1, max_size=4)):
        if kind in ("flat", "float32"):
            numel = draw(st.sampled_from([1, 7, 64, 2048, 4100]))
            weight = torch.randn(numel, generator=generator).to(dtype if kind == "flat" else torch.float32)
            made.append(Addition(weight, decays=draw(st.booleans())))
            continue
        projector = draw(projectors())
        if draw(st.booleans()):
            projector = balanced(projector)
        weight_MN = torch.randn(projector.shape, generator=generator).to(dtype)
        if kind == "columns":
            weight_MN = weight_MN.t().contiguous().t()
        made.append(Addition(weight_MN, projector, projector.update_scale))
    return made


def aligned() -> list[Addition]:
    """Weights of a unit in which every row can be loaded in whole vectors."""
    made = []
    for rows, columns in ((24, 520), (40, 64)):
        factors = [
            BlockFactor.random(side, side // 16, 4, torch.Generator().manual_seed(side)).to(
                torch.device("cpu"), torch.bfloat16
            )
            for side in (rows, columns)
        ]
        projector = SparseProjector(*factors)
        made.append(Addition(torch.randn(rows, columns).bfloat16(), projector, projector.update_scale))
    return [*made, Addition(torch.randn(128).bfloat16(), decays=False)]


def check_a_step(table: Any, on_cpu: list[Addition], delta: torch.Tensor, *, step: int, rate: float = 1e-2) -> None:
    """Add a delta by the table, and one by one to weights of their own: with equal bits."""
    twins = [addition._replace(weight=addition.weight.clone()) for addition in on_cpu]
    noise, decay = ROUNDING.of_step(step), 0.5
    table.add_(delta, noise.after(7), rate, decay)
    Adder().add_(twins, delta, noise, first_key=7, learning_rate=rate, weight_decay=decay)
    for addition, twin in zip(on_cpu, twins, strict=True):
        assert torch.equal(addition.weight, twin.weight)


def random_delta(of: list[Addition], seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    numel = sum(addition.numel for addition in of)
    return (torch.randn(numel, generator=torch.Generator().manual_seed(seed)) * 1e-2).to(dtype)


@settings(max_examples=10, deadline=None)
@given(unit=additions(), delta_dtype=DTYPES, step=st.integers(0, 10**6), rate=RATES)
def test_a_gpu_adds_a_units_deltas_with_the_cpus_bits(
    on_gpu: Any, unit: list[Addition], delta_dtype: torch.dtype, step: int, rate: float
) -> None:
    check_a_step(on_gpu.Table(unit), unit, random_delta(unit, step, delta_dtype), step=step, rate=rate)


def test_a_unit_is_added_in_one_launch_whose_rows_are_loaded_in_vectors(on_gpu: Any) -> None:
    unit = aligned()
    table = on_gpu.Table(unit)
    assert [launch.common["VECTOR"] for launch in table._launches] == [on_gpu._VECTOR]
    for step in (0, 1):  # 10⁶ steps on the table would be the same
        check_a_step(table, unit, random_delta(unit, step), step=step)


@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_gpu_makes_adamws_step_in_place_with_the_bits_of_its_formula(
    on_gpu: Any, dtype: torch.dtype, grad_dtype: torch.dtype
) -> None:
    generator, hyper = torch.Generator().manual_seed(0), AdamWHyper()
    unit = [Addition(torch.randn(num, generator=generator).to(dtype), decays=num > 64) for num in (40, 2100, 64)]
    expected = [addition._replace(weight=addition.weight.clone()) for addition in unit]
    numel = sum(addition.numel for addition in unit)
    state, by_torch = AdamWState.zeros(numel), AdamWState.zeros(numel)
    first, second, table = torch.zeros(numel), torch.zeros(numel), on_gpu.Table(unit)
    options = {"learning_rate": 1e-2, "weight_decay": 0.5}
    for step in range(3):
        gradient, noise = random_delta(unit, step, grad_dtype), ROUNDING.of_step(step)
        table.adamw_(gradient, state, noise.after(7), grad_scale=0.5, hyper=hyper, **options)
        seen = gradient.float() * 0.5
        first = first * 0.9 + seen * (1 - 0.9)
        second = second * 0.999 + seen * (1 - 0.999) * seen
        size, root = 1e-2 / (1 - 0.9 ** (step + 1)), math.sqrt(1 - 0.999 ** (step + 1))
        denominator = np.sqrt(second.numpy()) / np.float32(root) + np.float32(1e-8)  # torch's are an ulp off here
        delta = torch.from_numpy(-(first.numpy() * np.float32(size) / denominator))
        reference = torch.empty(numel)
        adamw_delta_(reference, seen, by_torch, learning_rate=1e-2, hyper=hyper)
        torch.testing.assert_close(delta, reference, rtol=1e-5, atol=1e-9)
        Adder().add_(expected, delta, noise, first_key=7, learning_rate=1e-2, weight_decay=0.5)
        assert torch.equal(state.exp_avg, first)
        assert torch.equal(state.exp_avg_sq, second)
        for addition, twin in zip(unit, expected, strict=True):
            assert torch.equal(addition.weight, twin.weight)
    assert float(state.step) == 3


@pytest.mark.parametrize("special", [float("inf"), float("-inf"), float("nan"), 3.38e38])
def test_a_weight_on_a_gpu_that_is_not_finite_stays_what_it_is(on_gpu: Any, special: float) -> None:
    weight = torch.full((1000,), special).bfloat16()
    before, noise = weight.clone(), StepNoise(torch.full_like(BLOCK, -1), 0)
    on_gpu.Table([Addition(weight)]).add_(torch.zeros(1000), noise, 0.0, 0.0)
    assert torch.equal(weight, before) or (special != special and weight.isnan().all())


def test_a_table_is_of_its_weights_and_projectors_as_long_as_they_are_where_they_were(on_gpu: Any) -> None:
    unit = aligned()
    table, first = on_gpu.Table(unit), unit[0]
    assert first.projector is not None
    assert table.is_of([addition._replace() for addition in unit])
    moved = first._replace(weight=first.weight.clone())
    refitted = first._replace(
        projector=SparseProjector(first.projector.left.to(torch.device("cpu"), torch.float32), first.projector.right)
    )
    for other in (moved, refitted, first._replace(scale=2.0)):
        assert not table.is_of([other, *unit[1:]])
    assert not table.is_of(unit[1:])
    # what is in a projector's memory may change
    first.projector.left.value_FR.mul_(0.5)
    assert table.is_of(unit)
    check_a_step(table, unit, random_delta(unit, 0), step=0)


def test_an_adder_makes_a_table_once_and_again_when_a_weight_has_moved(
    on_gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []

    def table(unit: list[Addition]) -> Any:
        made.append(on_gpu.Table(unit))
        return made[-1]

    monkeypatch.setattr(gpu_kernels, "has_kernel", lambda _weight: True)
    monkeypatch.setattr(gpu_kernels, "Table", table)
    weights, adder = [torch.ones(100), torch.ones(100)], Adder()
    for weight in (weights[0], weights[0], weights[1]):
        adder.add_(
            [Addition(weight)],
            torch.ones(100),
            ROUNDING.of_step(0),
            first_key=0,
            learning_rate=0.0,
            weight_decay=0.0,
        )
    assert [float(weight[0]) for weight in weights] == [3.0, 2.0]
    assert len(made) == 2


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
    generator = torch.Generator().manual_seed(0)
    weight, delta = torch.randn(num, generator=generator).bfloat16(), torch.randn(num, generator=generator)
    with_kernel, without, noise = weight.clone(), weight.clone(), ROUNDING.noise(step=1, key=2)
    kernels_for(weight).add_dense_(with_kernel, delta, noise, 0.9)
    monkeypatch.setattr(cpu_kernels, "numba", None)
    assert kernels_for(weight) is torch_kernels
    kernels_for(weight).add_dense_(without, delta, noise, 0.9)
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
    monkeypatch.setattr(module, "Table", fails)
    assert not module.runs_on(Gpu())


def test_a_weight_gets_the_kernels_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.zeros(4, dtype=torch.bfloat16)
    assert kernels_for(weight) is kernels_for(weight.float()) is cpu_kernels
    monkeypatch.setattr(cpu_kernels, "has_kernel", lambda _weight: False)
    assert kernels_for(weight) is torch_kernels
    assert not gpu_kernels.has_kernel(weight)
