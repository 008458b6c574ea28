from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lsp_ray.device.projected_linear import BiasProbe, ProjectedLinear
from lsp_ray.methods.projected_matrix import ProjectedMatrix
from lsp_ray.projection.bias import grad_square_sum, relative_bias
from lsp_ray.projection.sparse_projector import SparseProjector
from tests.linears import M, N, balanced, leaf_grad, normal, plain, projector

SEEDS = st.integers(0, 10_000)


def diagonals(by: SparseProjector) -> tuple[torch.Tensor, torch.Tensor]:
    """S and Z in full; ones where the projector is not balanced."""
    scales = [torch.ones(side.num_rows) if side.scale_F is None else side.scale_F for side in (by.left, by.right)]
    return scales[0].double().diag(), scales[1].double().diag()


def lost(by: SparseProjector, grad_MN: torch.Tensor) -> float:
    """‖U Uᵀ H V Vᵀ − H‖ / ‖H‖ with H = S G Z, as it is defined."""
    left_MM, right_NN = diagonals(by)
    left_MD = torch.linalg.solve(left_MM, by.left.dense().double())
    right_NE = torch.linalg.solve(right_NN, by.right.dense().double())
    seen_MN = left_MM @ grad_MN.double() @ right_NN
    return float((left_MD @ left_MD.t() @ seen_MN @ right_NE @ right_NE.t() - seen_MN).norm() / seen_MN.norm())


@settings(deadline=None, max_examples=40)
@given(seed=SEEDS, tokens=st.integers(1, 40), is_balanced=st.booleans(), scale=st.floats(1e-3, 1e3))
def test_the_bias_from_parts_is_that_of_the_definition(seed: int, tokens: int, is_balanced: bool, scale: float) -> None:
    by = balanced(projector(seed), seed) if is_balanced else projector(seed)
    grad_output_TM, input_TN = scale * normal(tokens, M, seed=seed), normal(tokens, N, seed=seed + 1)
    grad_MN = grad_output_TM.t() @ input_TN
    left_MM, right_NN = diagonals(by)
    square_sum = float(grad_square_sum(by, grad_output_TM, input_TN))
    assert square_sum == pytest.approx(float((left_MM @ grad_MN.double() @ right_NN).square().sum()), rel=1e-5)
    compressed_DE = by.compress(grad_MN)
    assert relative_bias(compressed_DE, square_sum) == pytest.approx(lost(by, grad_MN), rel=1e-4)
    matrix = ProjectedMatrix.fresh(by, torch.device("cpu"))  # the drop-in optimizer's way
    assert matrix.relative_bias(grad_MN, compressed_DE) == pytest.approx(lost(by, grad_MN), rel=1e-4)


def test_a_gradient_within_the_projectors_span_has_no_bias() -> None:
    grad_MN = projector().decompress(normal(*projector().dims))
    found = relative_bias(projector().compress(grad_MN), float(grad_MN.square().sum()))
    assert found == pytest.approx(0.0, abs=2e-3)  # the root of a rounding error


def test_a_norm_is_summed_in_parts_with_the_same_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    grad_output_TM, input_TN = normal(50, M), normal(50, N, seed=1)
    whole = grad_square_sum(projector(), grad_output_TM, input_TN)
    monkeypatch.setattr("lsp_ray.projection.bias.CHUNK_ELEMENTS", 7 * 50)
    torch.testing.assert_close(grad_square_sum(projector(), grad_output_TM, input_TN), whole)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_a_gradient_that_is_zero_or_not_finite_has_no_bias(value: float) -> None:
    grad_MN = torch.full((M, N), value)
    assert relative_bias(projector().compress(grad_MN), float(grad_MN.square().sum())) is None


@pytest.mark.parametrize("is_balanced", [False, True])
def test_a_probe_sees_the_bias_of_the_gradient_that_trains_and_changes_nothing(is_balanced: bool) -> None:
    by = balanced(projector()) if is_balanced else projector()
    module = ProjectedLinear(plain(), transposed=False, projector=by)
    module.probe = BiasProbe()
    assert module.probe.read() is None
    input_TN, grad_output_TM = normal(20, N, seed=2), normal(20, M, seed=3)
    module(input_TN).backward(grad_output_TM)
    observed = leaf_grad(module)
    assert module.probe.read() == pytest.approx(lost(by, grad_output_TM.t() @ input_TN), rel=1e-4)
    module.probe, module.leaf.grad = None, None
    module(input_TN).backward(grad_output_TM)
    assert torch.equal(observed, leaf_grad(module))
