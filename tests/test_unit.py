"""A unit splits its payload over its targets; a raw target adds a full delta."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lsp_ray.device.noise import MAX_ELEMENTS
from lsp_ray.device.rounding import Rounding
from lsp_ray.device.unit import RawTarget, Target, Unit, Update
from lsp_ray.optim.adamw import AdamWHyper, AdamWState
from lsp_ray.optim.shard import OptimizerShard

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


def unit_of(*targets: Target, first_key: int = 0) -> Unit:
    return Unit(index=0, name="layers.0", targets=targets, readers=[], first_key=first_key)


def test_a_matrix_decays_and_gets_its_delta_in_its_own_shape() -> None:
    module, delta = linear(), normal(24, seed=1)
    unit_of(RawTarget(module.get_parameter("weight"), module)).apply(delta, update(weight_decay=0.5))
    torch.testing.assert_close(module.weight.detach(), 0.95 * normal(4, 6) + delta.view(4, 6), rtol=1e-6, atol=1e-6)


def test_a_bias_has_no_decay() -> None:
    module, delta = linear(), normal(4, seed=1)
    unit_of(RawTarget(module.get_parameter("bias"), module)).apply(delta, update(weight_decay=0.5))
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
    unit_of(RawTarget(parameter, nn.Module())).apply(torch.full((numel,), 0.5), update())
    assert torch.equal(parameter.detach(), torch.full((numel,), 1.5, dtype=dtype))


def test_a_unit_gives_each_target_its_part_and_a_key_of_its_own() -> None:
    parameters = [nn.Parameter(normal(size, seed=size).bfloat16()) for size in (20, 30, 10)]
    one_by_one = [nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    delta = normal(60, seed=1) * 1e-2
    unit = unit_of(*(RawTarget(parameter, nn.Module()) for parameter in parameters), first_key=10)
    assert unit.numel == 60
    unit.apply(delta, update())
    for key, (parameter, part) in enumerate(zip(one_by_one, delta.split([20, 30, 10]), strict=True), 10):
        unit_of(RawTarget(parameter, nn.Module()), first_key=key).apply(part, update())
    assert all(torch.equal(one, other) for one, other in zip(parameters, one_by_one, strict=True))


def test_a_step_of_adamw_in_place_is_a_shards_delta_added() -> None:
    states = [AdamWState.zeros(28) for _ in range(2)]
    weights = []
    for state, is_in_place in zip(states, (True, False), strict=True):
        module = linear(torch.bfloat16)
        unit = unit_of(*(RawTarget(parameter, module) for parameter in module.parameters()))
        for parameter in module.parameters():
            parameter.grad = normal(parameter.numel(), seed=5).view_as(parameter).bfloat16()
        if is_in_place:
            unit.adamw_(state, update(weight_decay=0.5), grad_scale=0.5, hyper=AdamWHyper())
        else:
            delta = torch.empty(28)
            shard = OptimizerShard({0: 28}, states={0: state})
            shard.update(0, [unit.take_gradient().float()], delta, learning_rate=0.1, grad_scale=0.5)
            unit.apply(delta, update(weight_decay=0.5))
        assert all(parameter.grad is None for parameter in module.parameters())
        weights.append(list(module.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))
    assert all(torch.equal(one, states[1].tensors()[name]) for name, one in states[0].tensors().items())


def test_equal_targets_of_a_unit_are_rounded_apart() -> None:
    modules = [linear(torch.bfloat16) for _ in range(2)]
    targets = [RawTarget(module.get_parameter("weight"), module) for module in modules]
    unit_of(*targets).apply(torch.cat([normal(24, seed=1)] * 2) * 1e-2, update())
    assert not torch.equal(modules[0].weight, modules[1].weight)
    torch.testing.assert_close(modules[0].weight, modules[1].weight, rtol=2.0**-7, atol=0)


def test_a_payload_of_another_length_is_refused() -> None:
    unit = unit_of(RawTarget(nn.Parameter(torch.zeros(2)), nn.Module()))
    with pytest.raises(RuntimeError, match="split_with_sizes"):
        unit.apply(torch.zeros(3), update())
