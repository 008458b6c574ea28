"""Kernels that change all of a unit's weights on a GPU in one launch, compiled by Triton when first used.

It gives torch's bits: sums are taken in the same order, and no multiplication is fused with an addition. What it has to
know of the weights lies in a table on the GPU, so a launch costs the host the same for one weight and for twenty.

Legend: M rows (out), N columns (in), D × E what is sent, R non-zeros a row, K any number of elements.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple, Self

import torch

from lsp_ray.device.addition import Addition
from lsp_ray.device.noise import NOISE_ELEMENTS
from lsp_ray.device.rounding import StepNoise
from lsp_ray.optim.adamw import AdamWHyper, AdamWState
from lsp_ray.projection.sparse_projector import SparseProjector

try:
    import triton
    import triton.language as tl
except ImportError:  # builds of torch for CPUs come without it
    triton = tl = None

_TILE_ROWS, _TILE_COLUMNS = 8, 256  # groups seldom have fewer rows; of a flat weight, a tile is their product
_VECTOR, _VECTOR_BYTES = 8, 16  # what a thread loads at once where it can: elements of bfloat16
_NO_TILE = (1 << 31) - 1
_EXACT = {"enable_fp_fusion": False}  # a · b + c rounded twice, as torch does it


def compiled(function: Any) -> Any:
    """Decorate a kernel: compiled when it is first launched; left alone where there is no Triton."""
    # the state of the noise is any number: a variant for the round ones would only be compiled once more
    return function if triton is None else triton.jit(function, do_not_specialize=("state",))


def has_kernel(weight: torch.Tensor) -> bool:
    """Whether deltas can be added to this weight here."""
    return weight.is_cuda and runs_on(weight.device)


@lru_cache(maxsize=8)
def runs_on(device: torch.device) -> bool:
    """Whether Triton can build kernels for this device: a GPU that is not too old, on a machine with a C compiler."""
    if triton is None or device.type != "cuda":
        return False
    try:
        one = torch.zeros(1, device=device)
        block = torch.zeros(1, dtype=torch.int16, device=device)
        Table([Addition(one)]).add_(one, StepNoise(block, 0), learning_rate=0.0, weight_decay=0.0)
    except Exception:  # noqa: BLE001  # of many kinds, from a missing compiler to the card's refusal
        return False
    return True


class Table:
    """What deltas are added to, and how: made once for weights that get one step after step.

    Args:
        additions: The weights, on one GPU. The table keeps their addresses and neither them nor their projectors.
    """

    def __init__(self, additions: Sequence[Addition]) -> None:
        self._identity = _identity(additions)
        firsts = [0, *accumulate(addition.numel for addition in additions)]
        self._numel = firsts.pop()
        rows = [
            _Row.of(addition, position=position, first=first)
            for position, (addition, first) in enumerate(zip(additions, firsts, strict=True))
        ]
        launches: dict[_Variant, list[_Row]] = {}
        for variant, row in zip(_variants(additions), rows, strict=True):
            launches.setdefault(variant, []).append(row)
        device = additions[0].weight.device
        self._launches = [_Launch(variant, rows, device) for variant, rows in launches.items()]

    def is_of(self, additions: Sequence[Addition]) -> bool:
        """Whether it was made of these weights and projectors, which are where they were then."""
        return self._identity == _identity(additions)

    def add_(self, delta_K: torch.Tensor, noise: StepNoise, learning_rate: float, weight_decay: float) -> None:
        """Add each weight its part of a delta; bfloat16 is rounded by the noise.

        Args:
            delta_K: All parts side by side: flat, float32 or bfloat16, on the GPU.
            noise: Its key 0 is the first weight's.
            learning_rate: Bounds what balanced projectors enlarge.
            weight_decay: Decoupled.
        """
        assert delta_K.numel() == self._numel, f"a delta of {delta_K.numel()} elements for {self._numel}"
        keep = 1.0 - learning_rate * weight_decay
        for launch in self._launches:
            launch.add_(delta_K, noise.block, _signed(noise.state), learning_rate, keep)

    def adamw_(
        self,
        gradient_K: torch.Tensor,
        state: AdamWState,
        noise: StepNoise,
        *,
        learning_rate: float,
        weight_decay: float,
        grad_scale: float,
        hyper: AdamWHyper,
    ) -> None:
        """Let AdamW step from the gradients of weights without projectors, in place; the step is in no memory.

        Args:
            gradient_K: All gradients side by side: flat, float32 or bfloat16, on the GPU.
            state: Of all of them, on the GPU; advances.
            noise: Its key 0 is the first weight's.
            learning_rate: Of the step.
            weight_decay: Decoupled.
            grad_scale: Factor of the gradients.
            hyper: AdamW's constants.
        """
        assert gradient_K.numel() == self._numel, f"a gradient of {gradient_K.numel()} elements for {self._numel}"
        numbers = (
            learning_rate,
            1.0 - learning_rate * weight_decay,
            grad_scale,
            *(hyper.beta1, hyper.beta2, 1.0 - hyper.beta1, 1.0 - hyper.beta2, hyper.eps),
            *(math.log(beta) if beta else -math.inf for beta in (hyper.beta1, hyper.beta2)),
        )
        moments = state.exp_avg, state.exp_avg_sq, state.step
        for launch in self._launches:
            launch.adamw_(gradient_K, *moments, noise.block, _signed(noise.state), *numbers)
        state.step += 1  # only now: every program has read it


def _signed(state: int) -> int:
    return state - ((state >> 63) << 64)  # always int64 to Triton


def _identity(additions: Sequence[Addition]) -> list[object]:
    """What no weight and no projector can change without it; addresses tell more than objects, and cost less."""
    identity: list[object] = []
    for weight, projector, scale, decays in additions:
        identity.append(weight.data_ptr())
        if projector is None:
            identity.append(decays)
        else:
            left, right = projector.left, projector.right
            identity += [scale, left.groups, right.groups, left.value_FR.data_ptr(), right.value_FR.data_ptr()]
    return identity


class _Variant(NamedTuple):
    """What the kernel is compiled for; weights that agree in it are in one launch."""

    weight: torch.dtype
    factor: torch.dtype
    nnz: int
    has_rows: bool  # whether a row's elements lie side by side


def _variants(additions: Sequence[Addition]) -> list[_Variant]:
    """The variant of each; a weight without a projector joins any that has its type."""
    found: dict[torch.dtype, _Variant] = {}
    for weight, projector, _, _ in additions:
        if projector is not None:
            found.setdefault(weight.dtype, _variant(weight, projector))
    return [
        found.setdefault(weight.dtype, _Variant(weight.dtype, weight.dtype, 1, True))
        if projector is None
        else _variant(weight, projector)
        for weight, projector, _, _ in additions
    ]


def _variant(weight_MN: torch.Tensor, projector: SparseProjector) -> _Variant:
    value_FR = projector.left.value_FR
    assert value_FR.is_contiguous()
    assert projector.right.value_FR.is_contiguous()
    return _Variant(weight_MN.dtype, value_FR.dtype, value_FR.shape[1], weight_MN.stride(1) == 1)


class _Row(NamedTuple):
    """What the kernel reads of a weight, all int64, in this order; a flat weight has no more than the first five."""

    position: int  # the key of its noise
    weight: int  # address
    delta_first: int  # of its part
    decays: int
    columns: int  # N, or all elements of a flat weight
    left: int = 0  # address; 0: the weight is flat
    right: int = 0
    row_stride: int = 0
    column_stride: int = 0
    delta_columns: int = 0  # E
    left_rows: int = 0
    left_long: int = 0
    left_groups: int = 0
    right_rows: int = 0
    right_long: int = 0
    gain: int = 0  # a float32's bits
    scale: int = 0  # a float32's bits
    is_bounded: int = 0

    @classmethod
    def of(cls, addition: Addition, *, position: int, first: int) -> Self:
        weight, projector, scale, decays = addition
        common = position, weight.data_ptr(), first, int(decays)
        if projector is None:
            assert weight.is_contiguous(), "a weight without a projector is seen as flat"
            return cls(*common, columns=weight.numel())
        left, right, size = projector.left, projector.right, projector.update_size(scale, learning_rate=1.0)
        return cls(
            *common,
            columns=right.num_rows,
            left=left.value_FR.data_ptr(),
            right=right.value_FR.data_ptr(),
            row_stride=weight.stride(0),
            column_stride=weight.stride(1),
            delta_columns=right.dim,
            left_rows=left.group_rows,
            left_long=left.long_groups,
            left_groups=left.groups,
            right_rows=right.group_rows,
            right_long=right.long_groups,
            gain=_bits(size.gain),
            scale=_bits(size.scale),
            is_bounded=int(math.isfinite(size.bound)),
        )

    @property
    def tiles(self) -> int:
        """Programs for it: of a matrix, a tile has rows of one group only."""
        if not self.left:
            return _blocks(self.columns, _TILE_ROWS * _TILE_COLUMNS)
        tiles_of_group = _blocks(self.left_rows + (self.left_long > 0), _TILE_ROWS)
        return self.left_groups * tiles_of_group * _blocks(self.columns, _TILE_COLUMNS)

    @property
    def is_aligned(self) -> bool:
        """Whether every thread's elements of the weight and of a flat delta lie where they can be loaded at once."""
        numbers = self.columns, self.row_stride, self.delta_first
        return self.weight % _VECTOR_BYTES == 0 and all(number % _VECTOR == 0 for number in numbers)


def _blocks(num: int, size: int) -> int:
    return -(-num // size)


def _bits(number: float) -> int:
    return int.from_bytes(struct.pack("<f", number), "little", signed=True)


class _Launch:
    """One launch of the kernel: its part of the table, and what it is compiled for."""

    def __init__(self, variant: _Variant, rows: Sequence[_Row], device: torch.device) -> None:
        width = 1 << (len(rows) - 1).bit_length()
        *firsts, tiles = [0, *accumulate(row.tiles for row in rows)]
        firsts += [_NO_TILE] * (width - len(rows))
        numbers = [*firsts, *(number for row in rows for number in row)]
        self._table = torch.tensor(numbers, dtype=torch.int64).to(device)
        self._add, self._adamw = _add[(tiles,)], _adamw[(tiles,)]
        self._is_flat = not any(row.left for row in rows)
        self.common = {
            "WEIGHTS": width,
            "FIELDS": len(_Row._fields),
            "SIZE": NOISE_ELEMENTS,
            "ROWS": _TILE_ROWS,
            "COLUMNS": _TILE_COLUMNS,
            "WEIGHT": _triton_dtype(variant.weight),
            "VECTOR": _VECTOR if variant.has_rows and all(row.is_aligned for row in rows) else 1,
            **_EXACT,
        }
        self._projected = {
            "NNZ": variant.nnz,
            "FACTOR": _triton_dtype(variant.factor),
            "HAS_ROWS": variant.has_rows,
        }

    def add_(self, *arguments: torch.Tensor | float) -> None:
        self._add(self._table, *arguments, **self.common, **self._projected)

    def adamw_(self, *arguments: torch.Tensor | float) -> None:
        assert self._is_flat, "a weight with a projector has no gradient"
        self._adamw(self._table, *arguments, **self.common)


def _triton_dtype(dtype: torch.dtype) -> Any:
    return {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[dtype]


@compiled
def _add(  # type: ignore[no-untyped-def]
    table,
    delta,
    block,
    state,
    learning_rate,
    keep,
    WEIGHTS: tl.constexpr,
    FIELDS: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WEIGHT: tl.constexpr,
    VECTOR: tl.constexpr,
    NNZ: tl.constexpr,
    FACTOR: tl.constexpr,
    HAS_ROWS: tl.constexpr,
):
    """A program adds to one tile: of a flat weight, or ROWS rows of one group and COLUMNS columns of a matrix."""
    row, tile = _place(table, WEIGHTS, FIELDS)
    start = _start(state, tl.load(row), SIZE)
    weight = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(WEIGHT)), 2 * VECTOR)
    part = delta + tl.multiple_of(tl.load(row + 2), VECTOR)
    kept = tl.where(tl.load(row + 3) != 0, keep, 1.0)
    num = tl.multiple_of(tl.load(row + 4), VECTOR)
    if tl.load(row + 5) == 0:
        i = tile.to(tl.int64) * (ROWS * COLUMNS) + tl.arange(0, ROWS * COLUMNS)
        flat = tl.load(part + i, mask=i < num, other=0.0).to(tl.float32)
        _renew(weight + i, flat, i < num, kept, block, start + i, SIZE, WEIGHT)
    else:
        bound = tl.where(tl.load(row + 17) != 0, learning_rate, float("inf"))
        m, n, is_there, added = _decompressed(row, part, tile, num, bound, NNZ, ROWS, COLUMNS, FACTOR)
        row_stride = tl.multiple_of(tl.load(row + 7), VECTOR)
        column_stride = 1 if HAS_ROWS else tl.load(row + 8)
        m = m.to(tl.int64)
        at = (weight + m * row_stride)[:, None] + n[None, :] * column_stride
        position = ((start + m * num) % SIZE).to(tl.int32)[:, None] + n[None, :]
        _renew(at, added, is_there, kept, block, position, SIZE, WEIGHT)


@compiled
def _decompressed(  # type: ignore[no-untyped-def]
    row,
    delta,
    tile,
    num_columns,
    bound,
    NNZ: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """The rows and columns of a tile, whether they are there, and scale · P clamp(gain · δ) Qᵀ.

    The first `long` groups have one row more than `rows`, which tells a group's first row and a column's group.
    """
    left, right = tl.load(row + 5).to(tl.pointer_type(FACTOR)), tl.load(row + 6).to(tl.pointer_type(FACTOR))
    delta_columns = tl.load(row + 9)
    left_rows, left_long = tl.load(row + 10).to(tl.int32), tl.load(row + 11).to(tl.int32)
    right_rows, right_long = tl.load(row + 13).to(tl.int32), tl.load(row + 14).to(tl.int32)
    gain = tl.load(row + 15).to(tl.int32).to(tl.float32, bitcast=True)
    scale = tl.load(row + 16).to(tl.int32).to(tl.float32, bitcast=True)

    tiles_across = (num_columns.to(tl.int32) + (COLUMNS - 1)) // COLUMNS
    tiles_of_group = (left_rows + (left_long > 0).to(tl.int32) + (ROWS - 1)) // ROWS
    tile_row = tile // tiles_across
    group = tile_row // tiles_of_group
    first = group * left_rows + tl.minimum(group, left_long)
    m = first + (tile_row % tiles_of_group) * ROWS + tl.arange(0, ROWS)
    n = (tile % tiles_across) * COLUMNS + tl.arange(0, COLUMNS)
    is_row = m < first + left_rows + (group < left_long).to(tl.int32)
    is_column = n < num_columns
    border = right_long * (right_rows + 1)
    column_group = tl.where(n < border, n // (right_rows + 1), (n - right_long) // right_rows)

    total = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    for r in range(NNZ):
        row_of_delta = delta + (group * NNZ + r) * delta_columns
        spread = tl.full((COLUMNS,), 0.0, tl.float32)
        for k in tl.static_range(NNZ):
            sent = tl.load(row_of_delta + (column_group * NNZ + k), mask=is_column, other=0.0).to(tl.float32) * gain
            sent = tl.minimum(tl.maximum(sent, -bound), bound) * scale
            spread += sent * tl.load(right + n * NNZ + k, mask=is_column, other=0.0).to(tl.float32)
        value = tl.load(left + m * NNZ + r, mask=is_row, other=0.0).to(tl.float32)
        total += value[:, None] * spread[None, :]
    return m, n, is_row[:, None] & is_column[None, :], total


@compiled
def _adamw(  # type: ignore[no-untyped-def]
    table,
    gradient,
    exp_avg,
    exp_avg_sq,
    step,
    block,
    state,
    learning_rate,
    keep,
    grad_scale,
    beta1,
    beta2,
    rest1,
    rest2,
    eps,
    log_beta1,
    log_beta2,
    WEIGHTS: tl.constexpr,
    FIELDS: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WEIGHT: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """A program steps with one tile of a flat weight; see `adamw_delta_`."""
    row, tile = _place(table, WEIGHTS, FIELDS)
    weight = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(WEIGHT)), 2 * VECTOR)
    kept = tl.where(tl.load(row + 3) != 0, keep, 1.0)
    num = tl.multiple_of(tl.load(row + 4), VECTOR)
    i = tile.to(tl.int64) * (ROWS * COLUMNS) + tl.arange(0, ROWS * COLUMNS)
    at = tl.multiple_of(tl.load(row + 2), VECTOR) + i
    grad = tl.load(gradient + at, mask=i < num, other=0.0).to(tl.float32) * grad_scale
    first = beta1 * tl.load(exp_avg + at, mask=i < num, other=0.0) + rest1 * grad
    second = beta2 * tl.load(exp_avg_sq + at, mask=i < num, other=0.0) + rest2 * grad * grad
    tl.store(exp_avg + at, first, mask=i < num)
    tl.store(exp_avg_sq + at, second, mask=i < num)
    # in double precision: after few steps, 1 - beta ** count is a difference of numbers that are nearly equal
    count = tl.load(step).to(tl.float64) + 1.0
    size = (learning_rate / (1.0 - tl.exp(count * log_beta1))).to(tl.float32)
    root = tl.sqrt(1.0 - tl.exp(count * log_beta2)).to(tl.float32)
    delta = -tl.div_rn(size * first, tl.div_rn(tl.sqrt_rn(second), root) + eps)
    _renew(weight + i, delta, i < num, kept, block, _start(state, tl.load(row), SIZE) + i, SIZE, WEIGHT)


@compiled
def _place(table, WEIGHTS: tl.constexpr, FIELDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where the program's weight has its _Row, read field by field, and which of its tiles is meant."""
    program = tl.program_id(0)
    place = tl.reduce((tl.load(table + tl.arange(0, WEIGHTS)) <= program).to(tl.int32), 0, _plus) - 1
    return table + WEIGHTS + place * FIELDS, program - tl.load(table + place).to(tl.int32)


@compiled
def _plus(one, other):  # type: ignore[no-untyped-def]
    return one + other


@compiled
def _start(state, key, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where a weight's noise starts; see `StepNoise.of`."""
    hashed = (state + key).to(tl.uint64, bitcast=True) + 0x9E3779B97F4A7C15
    hashed = (hashed ^ (hashed >> 30)) * 0xBF58476D1CE4E5B9
    hashed = (hashed ^ (hashed >> 27)) * 0x94D049BB133111EB
    hashed = hashed ^ (hashed >> 31)
    return ((hashed >> 1) % SIZE).to(tl.int64)


@compiled
def _renew(  # type: ignore[no-untyped-def]
    at, added, is_there, keep, block, position, SIZE: tl.constexpr, WEIGHT: tl.constexpr
):
    """weight ← keep · weight + added, rounded by the noise unless it is float32."""
    exact = keep * tl.load(at, mask=is_there, other=0.0).to(tl.float32) + added
    if tl.float32 == WEIGHT:
        tl.store(at, exact, mask=is_there)
    else:
        drawn = tl.load(block + (position & (SIZE - 1)), mask=is_there, other=0).to(tl.int32) & 0xFFFF
        bits = exact.to(tl.int32, bitcast=True) + drawn
        tl.store(at, (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True), mask=is_there)
