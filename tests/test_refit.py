"""Refits by groups of linears that share Q: sampled, measured, taught and renewed together, and saved in between."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from lsp_ray.device.fits import ClosedFormFit
from lsp_ray.device.projected_linear import ProjectedLinear, ProjectedTarget, set_projectors
from lsp_ray.device.refit import Refitter
from lsp_ray.device.refit_file import load_refits, save_refits
from lsp_ray.device.unit import Unit
from lsp_ray.optim.reproject import Reprojection
from lsp_ray.projection.sparse_projector import SparseProjector
from lsp_ray.projection.transition import transition
from tests.linears import D, E, N, backward, normal, sharing, wrapped

EVERY, NUM_SKETCHED = 6, 2  # of a period: measured in 0, lessons in 1 and 2, taken over in 3
LAST = EVERY + 3  # of the first period with a refit


def unit_of(*group_sizes: int, index: int = 0) -> Unit:
    """Linears that share Q in groups of these sizes."""
    modules: list[ProjectedLinear] = []
    for size in group_sizes:
        group = [wrapped() for _ in range(size)]
        set_projectors(group, sharing(size, seed=10 * index + len(modules)))
        modules += group
    targets = [ProjectedTarget(module) for module in modules]
    return Unit(index=index, name=f"unit {index}", targets=targets, readers=modules, first_key=100 * index)


def modules_of(*units: Unit) -> list[ProjectedLinear]:
    return [target.owner for unit in units for target in unit.targets if isinstance(target, ProjectedTarget)]


def refitter_of(*units: Unit, max_bias: float = 0.0, seed: int = 0) -> Refitter:
    options: dict[str, Any] = {"check_every": EVERY, "num_sketched": NUM_SKETCHED, "seed": seed}
    return Refitter(units, ClosedFormFit(balanced=True), max_bias=max_bias, **options)


def backward_pass(step: int, *units: Unit) -> None:
    """A step's gradients; linears of a group read the same tensor."""
    for unit in units:
        input_TN = normal(16, N, seed=step)
        backward(torch.stack([module(input_TN).square().sum() for module in modules_of(unit)]).sum())


def run(refitter: Refitter, steps: Sequence[int], *units: Unit) -> dict[int, tuple[Reprojection, ...]]:
    """Steps as a worker makes them; returns what switched, by unit."""
    switched: dict[int, tuple[Reprojection, ...]] = {}
    for step in steps:
        refitter.before_step(step)
        switched |= {unit.index: refitter.switch(unit.index) for unit in units if refitter.has_new(unit.index)}
        backward_pass(step, *units)
        refitter.after_step(step)
    return switched


def test_linears_that_share_q_are_measured_and_learn_and_take_over_together() -> None:
    unit = unit_of(3)
    refitter, modules = refitter_of(unit), modules_of(unit)
    olds = [module.projector for module in modules]
    run(refitter, range(EVERY), unit)
    assert all(module.probe is None and module.lesson is None for module in modules)
    refitter.before_step(EVERY)
    assert all(module.probe is not None for module in modules)
    backward_pass(EVERY, unit)
    report = refitter.after_step(EVERY)
    assert report is not None
    assert (report.num_measured, report.num_refitted, list(report.relative_by_unit)) == (3, 3, [0])
    assert 0.0 < report.relative == report.relative_by_unit[0] <= 1.0
    assert all(module.probe is None and module.lesson is not None for module in modules)
    assert run(refitter, (EVERY + 1, EVERY + 2), unit) == {}
    assert [module.projector for module in modules] == olds
    places = [module.projector.left.value_FR.data_ptr() for module in modules]
    olds = [copy.deepcopy(old) for old in olds]
    refitter.before_step(LAST)
    assert refitter.has_new(0)
    changes = refitter.switch(0)
    assert not refitter.has_new(0)
    assert refitter.switch(0) == ()
    assert [change.first for change in changes] == [0, D * E, 2 * D * E]
    assert len({id(module.projector.right) for module in modules}) == 1
    assert len({id(module.input_projection) for module in modules}) == 1
    assert [module.projector.left.value_FR.data_ptr() for module in modules] == places  # where graphs read them
    for change, module, old in zip(changes, modules, olds, strict=True):
        assert change.shape == module.projector.dims == (D, E)
        assert not torch.equal(module.projector.left.value_FR, old.left.value_FR)
        assert torch.equal(change.left_GRR, transition(old.left, module.projector.left))
        assert torch.equal(change.right_HRR, transition(old.right, module.projector.right))


def test_what_is_learned_loses_less_of_the_gradients_than_what_was_drawn() -> None:
    unit = unit_of(3)
    refitter = refitter_of(unit)
    reports = []
    for step in range(2 * EVERY + 1):
        refitter.before_step(step)
        refitter.switch(0)
        backward_pass(0, unit)  # the same gradients again and again
        reports.append(refitter.after_step(step))
    drawn, learned = reports[EVERY], reports[2 * EVERY]
    assert drawn is not None
    assert learned is not None
    assert learned.relative < drawn.relative - 0.1


def test_an_eighth_of_the_groups_is_sampled_whole_and_by_the_seed_alone() -> None:
    units = [unit_of(3, 1, 2, 1, index=index) for index in range(4)]  # 16 groups
    sampled = set()
    for seed in range(6):
        measured = []
        for refitter in (refitter_of(*units, seed=seed), refitter_of(*units, seed=seed)):
            refitter.before_step(EVERY)
            measured.append([module for module in modules_of(*units) if module.probe is not None])
            for module in modules_of(*units):
                module.probe = None
        assert measured[0] == measured[1]
        rights = [id(module.projector.right) for module in modules_of(*units)]
        groups = {id(module.projector.right) for module in measured[0]}
        assert len(groups) == 2
        assert len(measured[0]) == sum(right in groups for right in rights)
        sampled |= groups
    assert len(sampled) > 4


def test_below_the_bound_nothing_is_learned() -> None:
    unit = unit_of(2)
    refitter = refitter_of(unit, max_bias=1.0)
    assert run(refitter, range(2 * EVERY), unit) == {}
    assert not refitter.state().fitted
    assert not refitter.state().lessons


def test_a_group_with_a_gradient_of_zeros_keeps_its_projectors() -> None:
    unit = unit_of(2)
    refitter, modules = refitter_of(unit), modules_of(unit)
    olds = [module.projector for module in modules]
    for step in range(LAST + 1):
        refitter.before_step(step)
        assert not refitter.has_new(0)
        backward(modules[0](normal(4, N)).square().sum() + 0.0 * modules[1](normal(4, N)).sum())
        refitter.after_step(step)
    assert [module.projector for module in modules] == olds


def values(projectors: Sequence[SparseProjector]) -> list[torch.Tensor]:
    factors = [factor for each in projectors for factor in (each.left, each.right)]
    assert all(factor.scale_F is not None for factor in factors)
    return [tensor for factor in factors for tensor in (factor.value_FR, factor.scale_F) if tensor is not None]


@pytest.mark.parametrize("in_files", [False, True])
@pytest.mark.parametrize("stop", range(EVERY, LAST))  # before the lessons, amid them, and while projectors wait
def test_what_is_under_way_goes_on_elsewhere_bit_for_bit(stop: int, in_files: bool, tmp_path: Path) -> None:
    whole, first, second = (unit_of(3, 2) for _ in range(3))
    seed = next(seed for seed in count() if len(sampled_by(seed)) == 3)
    expected = run(refitter_of(whole, seed=seed), range(LAST + 1), whole)
    refitter, resumed = (refitter_of(unit, seed=seed) for unit in (first, second))
    run(refitter, range(stop + 1), first)
    if in_files:
        save_refits(tmp_path, refitter.state())
        load_refits(tmp_path, resumed, field="resume_from")
    else:
        resumed.restore(refitter.state())
    found = run(resumed, range(stop + 1, LAST + 1), second)
    for our, their in zip(found[0], expected[0], strict=True):
        assert our.first == their.first
        assert torch.equal(our.left_GRR, their.left_GRR)
        assert torch.equal(our.right_HRR, their.right_HRR)
    ours, theirs = (values([module.projector for module in modules_of(unit)[:3]]) for unit in (second, whole))
    assert all(map(torch.equal, ours, theirs))
    assert len({id(module.projector.right) for module in modules_of(second)[:3]}) == 1


def sampled_by(seed: int) -> list[ProjectedLinear]:
    unit = unit_of(3, 2)
    refitter_of(unit, seed=seed).before_step(EVERY)
    return [module for module in modules_of(unit) if module.probe is not None]


def test_a_state_of_linears_that_shared_other_inputs_is_refused() -> None:
    unit = unit_of(2)
    refitter = refitter_of(unit)
    run(refitter, range(EVERY + 1), unit)
    with pytest.raises(ValueError, match="linears that shared an input no longer do"):
        refitter_of(unit_of(3)).restore(refitter.state())
    with pytest.raises(ValueError, match="there is no matrix 7"):
        refitter.projector(7)
