from __future__ import annotations

import pytest
import torch

from lsp_ray.methods.lsp_shard import carry_over, whiten
from lsp_ray.optim.shard import OptimizerShard
from lsp_ray.projection.reproject import Reprojection
from lsp_ray.projection.sparse_projector import SparseProjector
from lsp_ray.projection.whitening import RIDGE, Whitening

DIM, FIRST, LAYER = 12, 5, 3
NUMEL = FIRST + DIM * DIM + 4
PART = slice(FIRST, FIRST + DIM * DIM)


def projector(seed: int) -> SparseProjector:
    return SparseProjector.random((96, 80), DIM, 3, torch.Generator().manual_seed(seed))


def gradient(seed: int) -> torch.Tensor:
    return torch.randn(NUMEL, generator=torch.Generator().manual_seed(seed))


def updated(shard: OptimizerShard, grad: torch.Tensor) -> torch.Tensor:
    delta = torch.empty(NUMEL)
    shard.update(LAYER, grad, delta, learning_rate=1e-3)
    return delta


def test_whitened_columns_are_orthonormal() -> None:
    whitening = Whitening.of(projector(0))
    for factor, change_DD in ((projector(0).left, whitening.left_DD), (projector(0).right, whitening.right_DD)):
        columns = factor.dense() @ change_DD
        torch.testing.assert_close(columns.t() @ columns, torch.eye(DIM), rtol=0, atol=20 * RIDGE)


def test_the_step_is_adams_in_whitened_coordinates_brought_back() -> None:
    shard, plain = OptimizerShard({LAYER: NUMEL}), OptimizerShard({LAYER: NUMEL})
    whiten(shard, LAYER, [(FIRST, projector(0))])
    whitening = Whitening.of(projector(0))
    for step in range(3):
        grad = gradient(step)
        inside = grad.clone()
        inside[PART] = whitening.apply(grad[PART].view(DIM, DIM)).reshape(-1)
        expected = updated(plain, inside)
        expected[PART] = (whitening.apply(expected[PART].view(DIM, DIM)) * whitening.scale).reshape(-1)
        before = grad.clone()
        torch.testing.assert_close(updated(shard, grad), expected, rtol=1e-5, atol=1e-9)
        assert torch.equal(grad, before)


def test_an_update_is_as_large_as_without_whitening() -> None:
    sizes = []
    for fresh in (_plain, _fresh):
        deltas = [updated(fresh(), gradient(seed))[PART].view(DIM, DIM) for seed in range(40)]
        sizes.append(sum(float(projector(0).decompress(delta_DD).square().sum()) for delta_DD in deltas) ** 0.5)
    assert sizes[1] == pytest.approx(sizes[0], rel=0.15)


def _plain() -> OptimizerShard:
    return OptimizerShard({LAYER: NUMEL})


def _fresh() -> OptimizerShard:
    shard = OptimizerShard({LAYER: NUMEL})
    whiten(shard, LAYER, [(FIRST, projector(0))])
    return shard


def test_onto_the_same_projector_the_moments_stay() -> None:
    shard = _fresh()
    updated(shard, gradient(0))
    before = [moment.clone() for moment in shard.moments(LAYER, FIRST, DIM)]
    carry_over(shard, LAYER, [Reprojection(first=FIRST, old=projector(0), new=projector(0))])
    for ours, theirs in zip(shard.moments(LAYER, FIRST, DIM), before, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=float(theirs.abs().max()) * 20 * RIDGE)


def test_another_projector_takes_over_moments_and_coordinates() -> None:
    shard = _fresh()
    updated(shard, gradient(0))
    carry_over(shard, LAYER, [Reprojection(first=FIRST, old=projector(0), new=projector(1))])
    coordinates = shard.coordinates(LAYER, FIRST, DIM)
    assert isinstance(coordinates, Whitening)
    assert torch.equal(coordinates.left_DD, Whitening.of(projector(1)).left_DD)
    exp_avg_DD, exp_avg_sq_DD = shard.moments(LAYER, FIRST, DIM)
    assert torch.isfinite(exp_avg_DD).all()
    assert float(exp_avg_sq_DD.min()) >= 0


def balanced(seed: int) -> SparseProjector:
    plain = projector(seed)
    scales = (torch.rand(rows, generator=torch.Generator().manual_seed(9)) + 0.2 for rows in (96, 80))
    return SparseProjector(
        *(part.scaled(scale_F) for part, scale_F in zip((plain.left, plain.right), scales, strict=True))
    )


def test_a_balanced_projector_is_whitened_as_it_was_before_its_rows_were_scaled() -> None:
    torch.testing.assert_close(Whitening.of(balanced(0)).left_DD, Whitening.of(projector(0)).left_DD)


def test_a_balanced_projector_keeps_the_size_of_an_update() -> None:
    factor, whitening = balanced(0), Whitening.of(balanced(0))
    before = factor.left.dense().norm() * factor.right.dense().norm()
    after = (factor.left.dense() @ whitening.left_DD).norm() * (factor.right.dense() @ whitening.right_DD).norm()
    assert float(after * whitening.scale) == pytest.approx(float(before), rel=1e-4)


def test_onto_the_same_balanced_projector_the_moments_stay() -> None:
    shard = OptimizerShard({LAYER: NUMEL})
    whiten(shard, LAYER, [(FIRST, balanced(0))])
    updated(shard, gradient(0))
    before = [moment.clone() for moment in shard.moments(LAYER, FIRST, DIM)]
    carry_over(shard, LAYER, [Reprojection(first=FIRST, old=balanced(0), new=balanced(0))])
    for ours, theirs in zip(shard.moments(LAYER, FIRST, DIM), before, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=float(theirs.abs().max()) * 20 * RIDGE)
