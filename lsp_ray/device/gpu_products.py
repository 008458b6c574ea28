"""Products of several gradients with a factor each in one launch on a GPU, compiled by Triton when first used.

Torch has no product of groups that differ in size, so q, k and v would take three launches and their calls.

Legend: T tokens, F rows of a factor, D its columns, G groups, R non-zeros a row, K the columns of all factors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lsp_ray.device import gpu_kernels
from lsp_ray.device.gpu_kernels import compiled
from lsp_ray.projection.block_factor import BlockFactor

try:
    import triton.language as tl
except ImportError:  # builds of torch for CPUs come without it
    tl = None

MOST = 3  # tables of a launch
_TOKENS, _LEAST, _CHUNK = 64, 16, 32  # of a tile: tokens; rows of a factor at a time, as tensor cores want them


def has_kernel(factors: Sequence[BlockFactor], tables: Sequence[torch.Tensor]) -> bool:
    """Whether these products can be made in one launch."""
    value_FR = factors[0].value_FR
    return (
        1 < len(factors) <= MOST
        and all(factor.nnz_per_row == factors[0].nnz_per_row for factor in factors)
        and all(table.dtype == value_FR.dtype and table.stride(1) == 1 for table in tables)
        and value_FR.dtype in (torch.bfloat16, torch.float32)
        and _runs_on(tables[0].device)
    )


def project(factors: Sequence[BlockFactor], tables: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return each (T, F) table's product with its factor, (D, T), one below the other: contiguous, of the tables' type.

    Sums are taken in float32. Asks for `has_kernel`.
    """
    values, groups = [factor.value_FR for factor in factors], [factor.groups for factor in factors]
    if torch.compiler.is_compiling():
        joined_KT: torch.Tensor = _operator(tables, values, groups)
        return joined_KT
    return _projected(tables, values, groups)


def know_compiler() -> None:
    """To be called before torch compiles what is projected here; imports its compiler, which takes seconds."""
    torch.compiler.assume_constant_result(_runs_on)


def _runs_on(device: torch.device) -> bool:
    return gpu_kernels.runs_on(device)


def _projected(tables: Sequence[torch.Tensor], values: Sequence[torch.Tensor], groups: Sequence[int]) -> torch.Tensor:
    num, num_tokens, nnz = len(groups), tables[0].shape[0], values[0].shape[1]
    joined_KT = tables[0].new_empty(sum(groups) * nnz, num_tokens)
    places = [min(index, num - 1) for index in range(MOST)]  # a place that is left over has no groups
    sizes = [divmod(value.shape[0], number) for value, number in zip(values, groups, strict=True)]
    longest = max(rows for rows, _ in sizes) + 1
    grid = (-(-num_tokens // _TOKENS), sum(groups))
    _project[grid](
        joined_KT,
        num_tokens,
        *[tables[place] for place in places],
        *[values[place] for place in places],
        *[tables[place].stride(0) for place in places],
        *[sizes[place][0] for place in places],
        *[sizes[place][1] for place in places],
        groups[0],
        groups[0] + groups[1],
        NNZ=nnz,
        WIDTH=max(_LEAST, 1 << (nnz - 1).bit_length()),
        CHUNK=min(_CHUNK, max(_LEAST, 1 << (longest - 1).bit_length())),
        TOKENS=_TOKENS,
        PRECISION="tf32" if joined_KT.dtype == torch.bfloat16 else "ieee",  # which holds bfloat16 exactly
    )
    return joined_KT


@torch.library.custom_op("lsp_ray::project_together", mutates_args=())
def _operator(tables: list[torch.Tensor], values: list[torch.Tensor], groups: list[int]) -> torch.Tensor:
    """What torch's compiler calls, without looking inside."""
    return _projected(tables, values, groups)


@_operator.register_fake
def _(tables: list[torch.Tensor], values: list[torch.Tensor], groups: list[int]) -> torch.Tensor:
    return tables[0].new_empty(sum(groups) * values[0].shape[1], tables[0].shape[0])


@compiled
def _project(  # type: ignore[no-untyped-def]
    out,
    num_tokens,
    table0,
    table1,
    table2,
    value0,
    value1,
    value2,
    stride0,
    stride1,
    stride2,
    rows0,
    rows1,
    rows2,
    long0,
    long1,
    long2,
    first1,
    first2,
    NNZ: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program makes the NNZ columns of one group of one factor for TOKENS tokens."""
    place = tl.program_id(1)
    if place < first1:
        _project_group(
            out, num_tokens, table0, value0, stride0, rows0, long0, place, place, NNZ, WIDTH, CHUNK, TOKENS, PRECISION
        )
    elif place < first2:
        group = place - first1
        _project_group(
            out, num_tokens, table1, value1, stride1, rows1, long1, group, place, NNZ, WIDTH, CHUNK, TOKENS, PRECISION
        )
    else:
        group = place - first2
        _project_group(
            out, num_tokens, table2, value2, stride2, rows2, long2, group, place, NNZ, WIDTH, CHUNK, TOKENS, PRECISION
        )


@compiled
def _project_group(  # type: ignore[no-untyped-def]
    out,
    num_tokens,
    table,
    value,
    stride,
    rows,
    long,
    group,
    place,
    NNZ: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The first `long` groups have one row more than `rows`. More columns than NNZ are zeros, for tensor cores."""
    first = group * rows + tl.minimum(group, long)
    end = first + rows + (group < long).to(tl.int32)
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    r, f = tl.arange(0, WIDTH), first + tl.arange(0, CHUNK)
    rows_of_tokens = table + t.to(tl.int64)[None, :] * stride
    total = tl.full((WIDTH, TOKENS), 0.0, tl.float32)
    for begin in range(0, end - first, CHUNK):
        at = f + begin
        is_there = (at[:, None] < end) & (t[None, :] < num_tokens)
        part = tl.load(rows_of_tokens + at[:, None], mask=is_there, other=0.0).to(tl.float32)
        is_value = (r[:, None] < NNZ) & (at[None, :] < end)
        block = tl.load(value + at[None, :] * NNZ + r[:, None], mask=is_value, other=0.0).to(tl.float32)
        total = tl.dot(block, part, total, input_precision=PRECISION)
    to = out + (place * NNZ + r).to(tl.int64)[:, None] * num_tokens + t[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=(r[:, None] < NNZ) & (t[None, :] < num_tokens))
