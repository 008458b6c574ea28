from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lsp_ray.device.projected_linear import BiasProbe, ProjectedLinear
from lsp_ray.methods.projected_matrix import ProjectedMatrix
from lsp_ray.projection.bias import bias_of, grad_square_sum
from lsp_ray.projection.sparse_projector import SparseProjector


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_projector(seed: int, shape: tuple[int, int] = (48, 32), dim: int = 12) -> SparseProjector:
    return SparseProjector.random(shape, dim, 3, torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), scale=st.floats(1e-3, 1e3))
def test_the_bias_from_parts_is_that_of_the_definition(seed: int, scale: float) -> None:
    projector, grad_MN = random_projector(seed), scale * normal(48, 32, seed=seed)
    left, right = projector.left.dense().double(), projector.right.dense().double()
    approximation = left @ left.t() @ grad_MN.double() @ right @ right.t()
    found = bias_of(projector, projector.compress(grad_MN), float(grad_MN.square().sum()))
    assert found is not None
    norm = grad_MN.double().norm()
    assert found.raw == pytest.approx(float((approximation - grad_MN).norm() / norm), rel=1e-4)
    along = float((approximation * grad_MN).sum())
    assert found.cosine == pytest.approx(along / float(approximation.norm() * norm), rel=1e-4)
    best = along / float(approximation.square().sum())
    assert found.relative == pytest.approx(float((best * approximation - grad_MN).norm() / norm), rel=1e-4)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000))
def test_the_whitened_bias_is_that_of_orthonormal_bases_of_the_columns(seed: int) -> None:
    projector, grad_MN = random_projector(seed), normal(48, 32, seed=seed)
    left, _ = torch.linalg.qr(projector.left.dense().double())
    right, _ = torch.linalg.qr(projector.right.dense().double())
    approximation = left @ left.t() @ grad_MN.double() @ right @ right.t()
    expected = float((approximation - grad_MN).norm() / grad_MN.double().norm())
    square_sum = float(grad_MN.square().sum())
    found = bias_of(projector, projector.compress(grad_MN), square_sum, whitened=True)
    plain = bias_of(projector, projector.compress(grad_MN), square_sum)
    assert found is not None
    assert plain is not None
    assert (found.raw, found.relative) == pytest.approx((expected, expected), rel=1e-4)
    assert found.relative <= plain.relative + 1e-6


def test_the_identity_has_no_bias() -> None:
    grad_MN = normal(16, 16, seed=0)
    found = bias_of(SparseProjector.identity(16), grad_MN, float(grad_MN.square().sum()))
    assert found is not None
    assert (found.raw, found.relative, found.cosine) == pytest.approx((0.0, 0.0, 1.0), abs=1e-3)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_a_gradient_that_is_zero_or_not_finite_has_no_bias(value: float) -> None:
    grad_MN = torch.full((48, 32), value)
    projector = random_projector(0)
    assert bias_of(projector, projector.compress(grad_MN), float(grad_MN.square().sum())) is None


def balanced(projector: SparseProjector, seed: int) -> tuple[SparseProjector, torch.Tensor, torch.Tensor]:
    """S P̂ and Z Q̂ for these P̂ and Q̂; S and Z as diagonal matrices."""
    scales = [torch.rand(rows, generator=torch.Generator().manual_seed(seed)) + 0.1 for rows in projector.shape]
    factors = (projector.left.scaled(scales[0]), projector.right.scaled(scales[1]))
    return SparseProjector(*factors), scales[0].double().diag(), scales[1].double().diag()


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10_000), whitened=st.booleans())
def test_a_balanced_projector_is_judged_by_what_it_was_fitted_to(seed: int, whitened: bool) -> None:
    unscaled, grad_MN = random_projector(seed), normal(48, 32, seed=seed)
    projector, left_MM, right_NN = balanced(unscaled, seed)
    fitted_MN = left_MM @ grad_MN.double() @ right_NN
    square_sum = float(fitted_MN.square().sum())
    expected = bias_of(unscaled, unscaled.compress(fitted_MN.float()), square_sum, whitened=whitened)
    found = bias_of(projector, projector.compress(grad_MN), square_sum, whitened=whitened)
    assert found is not None
    assert expected is not None
    assert (found.raw, found.relative) == pytest.approx((expected.raw, expected.relative), rel=1e-3)


@pytest.mark.parametrize("whiten", [False, True])
def test_a_matrix_of_the_drop_in_optimizer_is_judged_alike(whiten: bool) -> None:
    projector, left_MM, right_NN = balanced(random_projector(2), 2)
    grad_MN = normal(48, 32, seed=3)
    compressed_DD, square_sum = projector.compress(grad_MN), float((left_MM @ grad_MN.double() @ right_NN).norm() ** 2)
    expected = bias_of(projector, compressed_DD, square_sum, whitened=whiten)
    matrix = ProjectedMatrix.fresh(projector, torch.device("cpu"), whiten=whiten)
    assert expected is not None
    assert matrix.relative_bias(grad_MN, compressed_DD) == pytest.approx(expected.relative, rel=1e-5)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10_000), tokens=st.integers(1, 40))
def test_a_gradients_norm_needs_no_gradient(seed: int, tokens: int) -> None:
    grad_output_TM, input_TN = normal(tokens, 48, seed=seed), normal(tokens, 32, seed=seed + 1)
    grad_MN = grad_output_TM.t().double() @ input_TN.double()
    plain = random_projector(seed)
    assert float(grad_square_sum(plain, grad_output_TM, input_TN)) == pytest.approx(
        float(grad_MN.square().sum()), rel=1e-5
    )
    projector, left_MM, right_NN = balanced(plain, seed)
    expected = float((left_MM @ grad_MN @ right_NN).square().sum())
    assert float(grad_square_sum(projector, grad_output_TM, input_TN)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("is_balanced", [False, True])
def test_a_probe_sees_the_bias_of_the_gradient_that_trains_and_changes_nothing(is_balanced: bool) -> None:
    projector, linear = random_projector(1), torch.nn.Linear(32, 48, bias=False)
    left_MM, right_NN = torch.eye(48).double(), torch.eye(32).double()
    if is_balanced:
        projector, left_MM, right_NN = balanced(projector, 1)
    module = ProjectedLinear(linear, transposed=False, projector=projector)
    module.probe = BiasProbe()
    assert module.probe.read(projector) is None
    input_TN, grad_output_TM = normal(20, 32, seed=2), normal(20, 48, seed=3)
    module(input_TN).backward(grad_output_TM)
    observed = module.leaf.grad
    seen = module.probe.read(projector)
    grad_MN = grad_output_TM.t() @ input_TN
    square_sum = float((left_MM @ grad_MN.double() @ right_NN).square().sum())
    expected = bias_of(projector, projector.compress(grad_MN), square_sum)
    assert seen is not None
    assert expected is not None
    assert seen.relative == pytest.approx(expected.relative, rel=1e-4)
    module.probe, module.leaf.grad = None, None
    module(input_TN).backward(grad_output_TM)
    assert observed is not None
    assert module.leaf.grad is not None
    assert torch.equal(observed, module.leaf.grad)
