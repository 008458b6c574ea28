"""Triton where it is, and a factor's dense form, which a GPU makes in one launch.

Legend: F rows of the factor, D columns, S slots (see `SparseFactor`).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # builds of torch for CPUs come without it
    triton = tl = None

__all__ = ["compiled", "runs_on", "tl", "transposed_dense", "triton"]

_FLAT = 1024  # elements at a time


def compiled(function: Any) -> Any:
    """Decorate a kernel: compiled when it is first launched; left alone where there is no Triton."""
    # the start of the noise is any number: a variant for the round ones would only be compiled once more
    return function if triton is None else triton.jit(function, do_not_specialize=("start",))


@lru_cache(maxsize=8)
def runs_on(device: torch.device) -> bool:
    """Whether Triton can build kernels for this device: a GPU that is not too old, on a machine with a C compiler."""
    if triton is None or device.type != "cuda":
        return False
    try:
        one_S = torch.zeros(1, dtype=torch.int32, device=device)
        transposed_dense(one_S, one_S, one_S, num_rows=1)
    except Exception:  # noqa: BLE001  # of many kinds, from a missing compiler to the card's refusal
        return False
    return True


def transposed_dense(row_S: torch.Tensor, starts_D: torch.Tensor, value_S: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Return the transpose (D, F) of a factor with its zeros, in the values' dtype.

    Args:
        row_S: Rows of the slots, column by column.
        starts_D: Every column's first slot.
        value_S: The non-zeros.
        num_rows: F.
    """
    dim, num_slots = starts_D.numel(), row_S.numel()
    dense_DF = value_S.new_empty(dim, num_rows)
    most = -(-num_rows // (dim * num_rows // num_slots))  # slots of a column: F over the columns of the smallest block
    blocks = {"ROW_BLOCKS": triton.cdiv(num_rows, _FLAT), "SLOT_BLOCKS": triton.cdiv(most, _FLAT)}
    _scatter[(dim,)](row_S, starts_D, value_S, dense_DF, num_rows, dim, num_slots, **blocks, BLOCK=_FLAT)
    return dense_DF


@compiled
def _scatter(  # type: ignore[no-untyped-def]
    row,
    starts,
    value,
    dense,
    num_rows,
    dim,
    num_slots,
    ROW_BLOCKS: tl.constexpr,
    SLOT_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program writes a column's zeros, and then, once they are all there, its non-zeros."""
    d = tl.program_id(0)
    out = dense + d.to(tl.int64) * num_rows
    for block in range(ROW_BLOCKS):
        at = block * BLOCK + tl.arange(0, BLOCK)
        tl.store(out + at, tl.full((BLOCK,), 0.0, dense.dtype.element_ty), mask=at < num_rows)
    tl.debug_barrier()
    begin = tl.load(starts + d)
    end = tl.load(starts + d + 1, mask=d + 1 < dim, other=num_slots)
    for block in range(SLOT_BLOCKS):
        slot = begin + block * BLOCK + tl.arange(0, BLOCK)
        is_there = slot < end
        at = tl.load(row + slot, mask=is_there, other=0).to(tl.int32)
        tl.store(out + at, tl.load(value + slot, mask=is_there), mask=is_there)
