"""What LSP adds to an optimizer shard: whitened coordinates, and moments that follow a projector's change."""

from __future__ import annotations

from collections.abc import Sequence

from lsp_ray.optim.shard import OptimizerShard
from lsp_ray.projection.reproject import Reprojection, reproject_moments_, transition
from lsp_ray.projection.sparse_projector import SparseProjector
from lsp_ray.projection.whitening import Whitening


def whiten(shard: OptimizerShard, unit: int, projectors: Sequence[tuple[int, SparseProjector]]) -> None:
    """Take Adam's steps of a unit's matrices in whitened coordinates; each comes with its first payload element."""
    for first, projector in projectors:
        shard.set_coordinates(unit, first, projector.dim, Whitening.of(projector))


def adopt(shard: OptimizerShard, unit: int, changes: Sequence[Reprojection]) -> None:
    """Take the coordinates of new projectors, if there are any, for moments that were carried over before."""
    for change in changes:
        if shard.coordinates(unit, change.first, change.new.dim) is not None:
            whiten(shard, unit, [(change.first, change.new)])


def go_back(shard: OptimizerShard, unit: int, changes: Sequence[Reprojection]) -> None:
    """Take the coordinates of the old projectors, for moments that were put back to what they were before them."""
    for change in changes:
        if shard.coordinates(unit, change.first, change.old.dim) is not None:
            whiten(shard, unit, [(change.first, change.old)])


def carry_over(shard: OptimizerShard, unit: int, changes: Sequence[Reprojection]) -> None:
    """Move the moments, and the coordinates if there are any, of matrices that have new projectors."""
    for change in changes:
        dim = change.new.dim
        old = shard.coordinates(unit, change.first, dim)
        if isinstance(old, Whitening):
            new = Whitening.of(change.new)
            left_DD, right_DD = new.transitions(old, change)
            shard.set_coordinates(unit, change.first, dim, new)
        else:
            left_DD = transition(change.old.left, change.new.left)
            right_DD = transition(change.old.right, change.new.right)
        exp_avg_DD, exp_avg_sq_DD = shard.moments(unit, change.first, dim)
        reproject_moments_(exp_avg_DD, exp_avg_sq_DD, left_DD, right_DD)
