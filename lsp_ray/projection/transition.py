"""How coordinates in an old factor's bases become coordinates in a new one's. Paper, Algorithm 1, MAYBEUPDATE.

Legend: G groups, S rows of a group, R non-zeros a row.
"""

from __future__ import annotations

import torch

from lsp_ray.projection.block_factor import BlockFactor


def transition(old: BlockFactor, new: BlockFactor) -> torch.Tensor:
    """Return the blocks of T = U_newᵀ U_old, (G, R, R), float64 on the CPU; the identity where both are equal.

    Values that were rounded to bfloat16 are no longer quite orthonormal, which U_old's pseudo-inverse puts right.
    """
    assert (old.groups, old.value_FR.shape) == (new.groups, new.value_FR.shape), "factors of other blocks"
    if torch.equal(old.value_FR, new.value_FR):
        return torch.eye(old.nnz_per_row, dtype=torch.float64).repeat(old.groups, 1, 1)
    pairs = zip(old.split(old.unscaled, 0), new.split(new.unscaled, 0), strict=True)
    return torch.cat([_carried(old_GSR, new_GSR) for old_GSR, new_GSR in pairs])


def _carried(old_GSR: torch.Tensor, new_GSR: torch.Tensor) -> torch.Tensor:
    solved_GRR: torch.Tensor = torch.linalg.solve(old_GSR.mT @ old_GSR, old_GSR.mT @ new_GSR)
    return solved_GRR.mT
