"""Applying a delta adds scale · P δ Qᵀ to the decayed weight.

Legend: M rows (out), N columns (in), D × E what is sent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lsp_ray.device.noise import MAX_ELEMENTS
from lsp_ray.device.projected_linear import ProjectedLinear, ProjectedTarget
from lsp_ray.device.rounding import Rounding
from lsp_ray.device.unit import Unit, Update
from lsp_ray.projection.sparse_projector import ProjectorSizes
from tests.linears import TRANSPOSED, D, M, N, R, normal, projector, wrapped


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    rows: int
    columns: int
    transposed: bool
    weight_decay: float
    dtype: torch.dtype = torch.float32


def unit_of(module: ProjectedLinear) -> Unit:
    return Unit(index=0, name="layers.0", targets=[ProjectedTarget(module)], readers=[], first_key=2)


def applied(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply a random delta; return the weight (M, N) afterwards and what it should be, in float64."""
    by = projector(sizes=ProjectorSizes.of((case.rows, case.columns), D, R))
    original: nn.Module = Conv1D(case.rows, case.columns) if case.transposed else nn.Linear(case.columns, case.rows)
    module = ProjectedLinear(original.to(case.dtype), transposed=case.transposed, projector=by)
    with torch.no_grad():
        module.weight.copy_(normal(*module.weight.shape))
    before_MN = module.weight_MN.detach().double().clone()
    delta_DE = normal(*by.dims, seed=1) * 1e-3
    update = Update(
        step=1, learning_rate=0.1, weight_decay=case.weight_decay, rounding=Rounding(3, torch.device("cpu"))
    )
    unit_of(module).apply(delta_DE.view(-1), update)
    full_MN = by.left.dense().double() @ delta_DE.double() @ by.right.dense().double().t()
    expected_MN = (1 - 0.1 * case.weight_decay) * before_MN + by.update_scale * full_MN
    return module.weight_MN.detach(), expected_MN


@TRANSPOSED
@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_a_delta_is_decompressed_scaled_and_added_to_the_decayed_weight(transposed: bool, weight_decay: float) -> None:
    actual, expected = applied(Case(rows=M, columns=N, transposed=transposed, weight_decay=weight_decay))
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-6)


@TRANSPOSED
def test_a_weight_above_the_limit_is_changed_a_few_rows_at_a_time_with_the_same_answer(transposed: bool) -> None:
    rows, columns = 1100, 1000  # above rounding.MAX_ELEMENTS: two parts
    actual, expected = applied(Case(rows=rows, columns=columns, transposed=transposed, weight_decay=0.5))
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-6)


@TRANSPOSED
def test_a_bfloat16_weight_is_rounded_to_a_neighbour_and_right_on_average(transposed: bool) -> None:
    actual, expected = applied(
        Case(rows=1100, columns=1000, transposed=transposed, weight_decay=0.0, dtype=torch.bfloat16)
    )
    error = actual.double() - expected
    spacing = 2.0 ** (torch.floor(torch.log2(expected.abs())) - 7)
    assert (error.abs() <= spacing * (1 + 1e-3)).all()
    # the error of an element has mean 0 and a deviation of at most half the spacing
    standard_error = float((spacing / 2).square().sum().sqrt()) / error.numel()
    assert abs(float(error.mean())) < 5 * standard_error
    assert not torch.equal(actual, expected.bfloat16())


def test_the_parts_of_a_weight_are_rounded_apart() -> None:
    columns = 1024
    second = MAX_ELEMENTS // columns  # the first row of the second of two equally large parts
    rows = 2 * second
    by = projector(sizes=ProjectorSizes.of((rows, columns), D, R))
    module = ProjectedLinear(nn.Linear(columns, rows).bfloat16(), transposed=False, projector=by)
    nn.init.ones_(module.weight)
    update = Update(step=1, learning_rate=1e-3, weight_decay=1.0, rounding=Rounding(3, torch.device("cpu")))
    unit_of(module).apply(torch.zeros(math.prod(by.dims)), update)
    # every element was to become 0.999: only the noise tells one from another
    assert not torch.equal(module.weight[second:], module.weight[:second])


def test_a_targets_leaf_is_its_modules_even_after_a_change_of_subspace() -> None:
    module = wrapped()
    target = ProjectedTarget(module)
    module.set_projector(projector(seed=9, sizes=ProjectorSizes.of((M, N), 8, 2)))
    assert target.leaf is module.leaf
    assert target.owner is module
