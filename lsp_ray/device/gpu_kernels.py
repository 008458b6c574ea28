"""Kernels that add deltas to weights on a GPU in one pass and one launch, compiled by Triton when first used.

They have the CPU kernels' interface (cpu_kernels.py) and give torch's bits: sums are taken in the same order, and no
multiplication is fused with an addition.

Legend: M rows (out), N columns (in), D × E what is sent, R non-zeros a row, K any number of elements.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from lsp_ray.device.noise import NOISE_ELEMENTS, Noise
from lsp_ray.projection.block_factor import BlockFactor
from lsp_ray.projection.sparse_projector import SparseProjector, UpdateSize

try:
    import triton
    import triton.language as tl
except ImportError:  # builds of torch for CPUs come without it
    triton = tl = None

_FLAT = 1024  # elements of a flat array for a program
_TILE_ROWS, _TILE_COLUMNS = 16, 128  # of a matrix; neighbouring columns lie side by side in every array
_EXACT = {"enable_fp_fusion": False}  # a · b + c rounded twice, as torch does it


def _compiled(function: Any) -> Any:
    """Decorate a kernel: compiled when it is first launched; left alone where there is no Triton."""
    # the start of the noise is any number: a variant for the round ones would only be compiled once more
    return function if triton is None else triton.jit(function, do_not_specialize=("start",))


def has_kernel(weight: torch.Tensor) -> bool:
    """Whether deltas can be added to this weight here."""
    return runs_on(weight.device)


@lru_cache(maxsize=8)
def runs_on(device: torch.device) -> bool:
    """Whether Triton can build kernels for this device: a GPU that is not too old, on a machine with a C compiler."""
    if triton is None or device.type != "cuda":
        return False
    try:
        one = torch.zeros(1, device=device)
        block = torch.zeros(1, dtype=torch.int16, device=device)
        add_dense_(one, one, Noise(block=block, start=0), 1.0)
    except Exception:  # noqa: BLE001  # of many kinds, from a missing compiler to the card's refusal
        return False
    return True


def add_dense_(weight_K: torch.Tensor, delta_K: torch.Tensor, noise: Noise, keep: float, first: int = 0) -> None:
    """weight ← keep · weight + delta; bfloat16 is rounded by the noise; all flat and contiguous.

    Args:
        weight_K: bfloat16 or float32.
        delta_K: float32.
        noise: Of the target.
        keep: Factor of the weight.
        first: Position of the weight's first element within the target.
    """
    num = weight_K.numel()
    grid = (triton.cdiv(num, _FLAT),)
    start = noise.start + first
    _add_dense[grid](weight_K, delta_K, noise.block, start, keep, num, SIZE=NOISE_ELEMENTS, BLOCK=_FLAT, **_EXACT)


def add_decompressed_(
    weight_MN: torch.Tensor,
    projector: SparseProjector,
    delta_DE: torch.Tensor,
    size: UpdateSize,
    noise: Noise,
    keep: float,
) -> None:
    """W ← keep · W + scale · P clamp(gain · δ) Qᵀ; bfloat16 is rounded by the noise.

    A program makes what it adds to its tile.

    Args:
        weight_MN: bfloat16 or float32, of any strides.
        projector: P and Q, on the GPU.
        delta_DE: δ, of any floating type.
        size: Gain, bound and scale of δ.
        noise: Of the target.
        keep: Factor of W.
    """
    left, right = projector.left, projector.right
    num_columns = right.num_rows
    tiles = triton.cdiv(left.group_rows + (left.long_groups > 0), _TILE_ROWS)
    _add_blocks[left.groups * tiles, triton.cdiv(num_columns, _TILE_COLUMNS)](
        weight_MN,
        *weight_MN.stride(),
        left.value_FR,
        right.value_FR,
        delta_DE,
        *delta_DE.stride(),
        size.gain,
        size.bound,
        size.scale,
        noise.block,
        noise.start,
        keep,
        num_columns,
        *_sizes(left),
        *_sizes(right),
        TILES=tiles,
        SIZE=NOISE_ELEMENTS,
        NNZ=left.nnz_per_row,
        ROWS=_TILE_ROWS,
        COLUMNS=_TILE_COLUMNS,
        **_EXACT,
    )


def _sizes(factor: BlockFactor) -> tuple[int, int]:
    return factor.group_rows, factor.long_groups


@_compiled
def _add_dense(weight, delta, block, start, keep, num, SIZE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_there = at < num
    exact = keep * tl.load(weight + at, mask=is_there).to(tl.float32) + tl.load(delta + at, mask=is_there)
    if weight.dtype.element_ty == tl.float32:
        tl.store(weight + at, exact, mask=is_there)
    else:
        drawn = tl.load(block + (start + at) % SIZE, mask=is_there).to(tl.int32) & 0xFFFF
        bits = exact.to(tl.int32, bitcast=True) + drawn
        tl.store(weight + at, (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True), mask=is_there)


@_compiled
def _add_blocks(  # type: ignore[no-untyped-def]
    weight,
    row_stride,
    column_stride,
    left,
    right,
    delta,
    delta_row_stride,
    delta_column_stride,
    gain,
    bound,
    scale,
    block,
    start,
    keep,
    num_columns,
    left_rows,
    left_long,
    right_rows,
    right_long,
    TILES: tl.constexpr,
    SIZE: tl.constexpr,
    NNZ: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A program adds to ROWS rows of one group and COLUMNS columns.

    The first `long` groups have one row more than `rows`, which tells a group's first row and a row's group.
    """
    group = tl.program_id(0) // TILES
    first = group * left_rows + tl.minimum(group, left_long)
    m = first + (tl.program_id(0) % TILES) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_row = m < first + left_rows + (group < left_long).to(tl.int32)
    is_column = n < num_columns
    border = right_long * (right_rows + 1)
    column_group = tl.where(n < border, n // (right_rows + 1), (n - right_long) // right_rows)
    total = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    for r in range(NNZ):
        row_of_delta = delta + (group * NNZ + r) * delta_row_stride
        spread = tl.full((COLUMNS,), 0.0, tl.float32)
        for k in range(NNZ):
            at = row_of_delta + (column_group * NNZ + k) * delta_column_stride
            sent = tl.load(at, mask=is_column, other=0.0).to(tl.float32) * gain
            sent = tl.minimum(tl.maximum(sent, -bound), bound) * scale
            spread += sent * tl.load(right + n * NNZ + k, mask=is_column, other=0.0).to(tl.float32)
        value = tl.load(left + m * NNZ + r, mask=is_row, other=0.0).to(tl.float32)
        total += value[:, None] * spread[None, :]
    is_there = is_row[:, None] & is_column[None, :]
    at = weight + m.to(tl.int64)[:, None] * row_stride + n[None, :] * column_stride
    exact = keep * tl.load(at, mask=is_there).to(tl.float32) + total
    if weight.dtype.element_ty == tl.float32:
        tl.store(at, exact, mask=is_there)
    else:
        position = start + m.to(tl.int64)[:, None] * num_columns + n[None, :]
        drawn = tl.load(block + position % SIZE, mask=is_there).to(tl.int32) & 0xFFFF
        bits = exact.to(tl.int32, bitcast=True) + drawn
        tl.store(at, (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True), mask=is_there)
