"""A unit splits its payload over its targets; a raw target adds a full delta."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lsp_ray.device.noise import MAX_ELEMENTS
from lsp_ray.device.rounding import Rounding
from lsp_ray.device.unit import RawTarget, Unit, Update

STEP = 4


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def update(*, weight_decay: float = 0.0) -> Update:
    rounding = Rounding(3, torch.device("cpu"))
    return Update(step=STEP, learning_rate=0.1, weight_decay=weight_decay, rounding=rounding)


def linear(dtype: torch.dtype = torch.float32) -> nn.Linear:
    module = nn.Linear(6, 4)
    with torch.no_grad():
        module.weight.copy_(normal(4, 6))
        module.bias.copy_(normal(4))
    return module.to(dtype)


class Recorder:
    """A target that remembers what it was given."""

    def __init__(self, numel: int) -> None:
        self.leaf = nn.Parameter(torch.zeros(numel))
        self.owner = nn.Module()
        self.given: list[tuple[list[float], int]] = []

    def apply(self, delta: torch.Tensor, update: Update, key: int) -> None:
        assert update.step == STEP
        self.given.append((delta.tolist(), key))


def test_a_matrix_decays_and_gets_its_delta_in_its_own_shape() -> None:
    module, delta = linear(), normal(24, seed=1)
    RawTarget(module.get_parameter("weight"), module).apply(delta, update(weight_decay=0.5), key=0)
    torch.testing.assert_close(module.weight.detach(), 0.95 * normal(4, 6) + delta.view(4, 6), rtol=1e-6, atol=1e-6)


def test_a_bias_has_no_decay() -> None:
    module, delta = linear(), normal(4, seed=1)
    RawTarget(module.get_parameter("bias"), module).apply(delta, update(weight_decay=0.5), key=0)
    assert torch.equal(module.bias.detach(), normal(4) + delta)


def test_a_targets_owner_and_leaf_are_what_it_was_made_of() -> None:
    module = linear()
    target = RawTarget(module.get_parameter("bias"), module)
    assert target.owner is module
    assert target.leaf is module.bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_parameter_above_the_limit_is_changed_in_parts(dtype: torch.dtype) -> None:
    numel = MAX_ELEMENTS + 100
    parameter = nn.Parameter(torch.ones(numel, dtype=dtype))
    RawTarget(parameter, nn.Module()).apply(torch.full((numel,), 0.5), update(), key=0)
    assert torch.equal(parameter.detach(), torch.full((numel,), 1.5, dtype=dtype))


def test_a_unit_gives_each_target_its_part_and_a_key_of_its_own() -> None:
    targets = [Recorder(2), Recorder(3), Recorder(1)]
    unit = Unit(index=1, name="layers.1", targets=targets, readers=[], first_key=10)
    assert unit.numel == 6
    unit.apply(torch.arange(6.0), update())
    assert [target.given for target in targets] == [[([0, 1], 10)], [([2, 3, 4], 11)], [([5], 12)]]


def test_equal_targets_of_a_unit_are_rounded_apart() -> None:
    modules = [linear(torch.bfloat16) for _ in range(2)]
    targets = [RawTarget(module.get_parameter("weight"), module) for module in modules]
    unit = Unit(index=0, name="layers.0", targets=targets, readers=modules, first_key=0)
    unit.apply(torch.cat([normal(24, seed=1)] * 2) * 1e-2, update())
    assert not torch.equal(modules[0].weight, modules[1].weight)
    torch.testing.assert_close(modules[0].weight, modules[1].weight, rtol=2.0**-7, atol=0)


def test_a_payload_of_another_length_is_refused() -> None:
    unit = Unit(index=0, name="layers.0", targets=[Recorder(2)], readers=[], first_key=0)
    with pytest.raises(RuntimeError, match="split_with_sizes"):
        unit.apply(torch.zeros(3), update())
