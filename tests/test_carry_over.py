"""An optimizer's state follows its matrices' projectors, block by block."""

from __future__ import annotations

import pytest
import torch

from lsp_ray.optim.adamw import AdamWState
from lsp_ray.optim.reproject import Reprojection
from lsp_ray.optim.shard import OptimizerShard

FIRST, LAYER = 7, 2
SHAPES = [((3, 4), (2, 5)), ((1, 6), (4, 3)), ((5, 1), (1, 8))]  # of blocks on each side: how many, how large


def reprojection(left: tuple[int, int], right: tuple[int, int]) -> Reprojection:
    generator = torch.Generator().manual_seed(0)
    sides = [torch.randn(count, size, size, generator=generator).double() for count, size in (left, right)]
    return Reprojection(first=FIRST, left_GRR=sides[0], right_HRR=sides[1])


def shard_of(change: Reprojection) -> OptimizerShard:
    """A shard whose layer has this matrix, and elements before and behind it."""
    numel = FIRST + change.shape[0] * change.shape[1] + 4
    generator = torch.Generator().manual_seed(1)
    exp_avg, exp_avg_sq, error = (torch.randn(numel, generator=generator) for _ in range(3))
    state = AdamWState(exp_avg=exp_avg, exp_avg_sq=exp_avg_sq.square(), step=torch.zeros(()), error=error)
    return OptimizerShard({LAYER: numel}, states={LAYER: state})


@pytest.mark.parametrize(("left", "right"), SHAPES)
def test_moments_and_what_was_not_sent_move_as_by_dense_matrices(left: tuple[int, int], right: tuple[int, int]) -> None:
    change = reprojection(left, right)
    shard = shard_of(change)
    before, after = shard.states[LAYER].clone().tensors(), shard.states[LAYER].tensors()
    shard.carry_over(LAYER, [change])
    left_AA, right_BB = (torch.block_diag(*blocks) for blocks in (change.left_GRR, change.right_HRR))
    numel = change.shape[0] * change.shape[1]
    for name in ("exp_avg", "exp_avg_sq", "error"):
        power = 2 if name == "exp_avg_sq" else 1
        old_AB = before[name][FIRST : FIRST + numel].view(change.shape).double()
        expected = before[name].clone()
        expected[FIRST : FIRST + numel] = (left_AA**power @ old_AB @ (right_BB**power).t()).float().view(-1)
        torch.testing.assert_close(after[name], expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(after[name][:FIRST], before[name][:FIRST])
        assert torch.equal(after[name][FIRST + numel :], before[name][FIRST + numel :])
    assert float(after["exp_avg_sq"].min()) >= 0


@pytest.mark.parametrize(("left", "right"), SHAPES)
def test_onto_the_same_projectors_every_bit_stays(left: tuple[int, int], right: tuple[int, int]) -> None:
    sides = [torch.eye(size).double().expand(count, size, size) for count, size in (left, right)]
    change = Reprojection(first=FIRST, left_GRR=sides[0], right_HRR=sides[1])
    shard = shard_of(change)
    before = shard.states[LAYER].clone().tensors()
    shard.carry_over(LAYER, [change])
    assert all(torch.equal(tensor, before[name]) for name, tensor in shard.states[LAYER].tensors().items())
