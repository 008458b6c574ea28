"""AdamW as a delta equals torch's optimizer; a shard's numbers do not depend on who its neighbours are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lsp_ray.optim.adamw import AdamWHyper, AdamWState, adamw_delta_
from lsp_ray.optim.shard import OptimizerShard

NUM_STEPS = 20
NUMEL = 1003  # no multiple of a vector register: the kernel's tail runs too
NUMEL_OF_LAYER = {0: 7, 1: 64, 2: 33, 3: 129, 4: 1}
HYPERS = [AdamWHyper(), AdamWHyper(beta1=0.8, beta2=0.95, eps=1e-6)]


def learning_rate(step: int) -> float:
    return 1e-3 * (1.0 - step / NUM_STEPS)


def grads(numel: int, *, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(-6, 2, numel)
    return [torch.randn(numel, generator=generator) * scales for _ in range(NUM_STEPS)]


def torch_deltas(dtype: torch.dtype, hyper: AdamWHyper, *, fused: bool) -> list[torch.Tensor]:
    """torch.optim.AdamW's steps, each read from a parameter set back to zero, so that the sum does not round them."""
    parameter = nn.Parameter(torch.zeros(NUMEL, dtype=dtype))
    optimizer = torch.optim.AdamW(
        [parameter], betas=(hyper.beta1, hyper.beta2), eps=hyper.eps, weight_decay=0.0, fused=fused
    )
    deltas = []
    for step, grad in enumerate(grads(NUMEL)):
        optimizer.param_groups[0]["lr"] = learning_rate(step)
        parameter.data.zero_()
        parameter.grad = grad.to(dtype)
        optimizer.step()
        deltas.append(parameter.detach().clone())
    return deltas


def our_deltas(hyper: AdamWHyper) -> list[torch.Tensor]:
    state = AdamWState.zeros(NUMEL)
    deltas = []
    for step, grad in enumerate(grads(NUMEL)):
        delta = torch.full((NUMEL,), float("nan"))  # what the buffer held before must not matter
        adamw_delta_(delta, grad, state, learning_rate=learning_rate(step), hyper=hyper)
        deltas.append(delta)
    return deltas


@pytest.mark.parametrize("hyper", HYPERS)
def test_twenty_deltas_are_bit_for_bit_those_of_torchs_fused_adamw(hyper: AdamWHyper) -> None:
    pairs = zip(our_deltas(hyper), torch_deltas(torch.float32, hyper, fused=True), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


@pytest.mark.parametrize("hyper", HYPERS)
def test_twenty_deltas_equal_torchs_plain_adamw_in_float64(hyper: AdamWHyper) -> None:
    # float32 rounds m and v at each of 20 steps, 6e-8 each; where m nearly cancels, only the absolute error is bounded
    for ours, theirs in zip(our_deltas(hyper), torch_deltas(torch.float64, hyper, fused=False), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-6, atol=1e-9)


def test_adding_the_deltas_trains_a_parameter_as_torch_does() -> None:
    target = torch.linspace(-1, 1, NUMEL)
    weight = nn.Parameter(torch.zeros(NUMEL))
    optimizer = torch.optim.AdamW([weight], lr=1e-2, weight_decay=0.0)
    ours, state, delta = torch.zeros(NUMEL), AdamWState.zeros(NUMEL), torch.empty(NUMEL)
    for _ in range(NUM_STEPS):
        weight.grad = weight.detach() - target
        optimizer.step()
        adamw_delta_(delta, ours - target, state, learning_rate=1e-2, hyper=AdamWHyper())
        ours += delta
    # target's middle element is 0: its delta is too
    torch.testing.assert_close(ours, weight.detach(), rtol=1e-6, atol=1e-7)


def test_the_gradient_is_left_as_it_was() -> None:
    grad = grads(NUMEL)[0]
    before = grad.clone()
    adamw_delta_(torch.empty(NUMEL), grad, AdamWState.zeros(NUMEL), learning_rate=1e-3, hyper=AdamWHyper())
    assert torch.equal(grad, before)


def test_the_state_is_kept_where_it_is_asked_for() -> None:
    state = AdamWState.zeros(3, torch.device("meta"))
    assert {state.exp_avg.device.type, state.exp_avg_sq.device.type, state.step.device.type} == {"meta"}


def run_layers(shards: list[OptimizerShard], shard_of_layer: list[int], order: list[int]) -> dict[int, torch.Tensor]:
    """Train every layer for a few steps, in `order` within a step; return each layer's deltas side by side."""
    deltas: dict[int, list[torch.Tensor]] = {layer: [] for layer in NUMEL_OF_LAYER}
    layer_grads = {layer: grads(numel, seed=layer) for layer, numel in NUMEL_OF_LAYER.items()}
    for step in range(3):
        for layer in order:
            delta = torch.empty(NUMEL_OF_LAYER[layer])
            shard = shards[shard_of_layer[layer]]
            shard.update(layer, [layer_grads[layer][step]], delta, learning_rate=learning_rate(step))
            deltas[layer].append(delta)
    return {layer: torch.cat(parts) for layer, parts in deltas.items()}


@settings(deadline=None, max_examples=20)
@given(
    shard_of_layer=st.lists(st.integers(0, 3), min_size=5, max_size=5),
    order=st.permutations(sorted(NUMEL_OF_LAYER)),
)
def test_any_split_of_the_layers_and_any_order_give_bit_identical_deltas(
    shard_of_layer: list[int], order: list[int]
) -> None:
    alone = run_layers([OptimizerShard(NUMEL_OF_LAYER)], [0] * 5, sorted(NUMEL_OF_LAYER))
    owned = [{layer: NUMEL_OF_LAYER[layer] for layer in range(5) if shard_of_layer[layer] == s} for s in range(4)]
    split = run_layers([OptimizerShard(numel) for numel in owned], shard_of_layer, order)
    assert all(torch.equal(alone[layer], split[layer]) for layer in NUMEL_OF_LAYER)


def test_a_shard_uses_the_constants_it_was_given() -> None:
    grad, plain, damped = torch.ones(1), torch.empty(1), torch.empty(1)
    OptimizerShard({0: 1}).update(0, [grad], plain, learning_rate=0.5)
    OptimizerShard({0: 1}, AdamWHyper(eps=1.0)).update(0, [grad], damped, learning_rate=0.5)
    torch.testing.assert_close(torch.cat([plain, damped]), torch.tensor([-0.5, -0.25]))


def test_a_gradient_that_is_not_finite_reaches_neither_moments_nor_weights() -> None:
    shard = OptimizerShard({0: 4})
    delta = torch.ones(4)
    shard.update(0, [torch.tensor([1.0, float("nan"), 0.0, 0.0])], delta, learning_rate=1.0)
    assert not delta.any()
    assert not shard.states[0].exp_avg.any()
    assert shard.states[0].step == 0


def test_finite_numbers_whose_squares_overflow_are_a_gradient_like_any_other() -> None:
    delta = torch.zeros(4)
    OptimizerShard({0: 4}).update(0, [torch.full((4,), 1e20)], delta, learning_rate=1.0, grad_scale=1e-20)
    torch.testing.assert_close(delta, torch.full((4,), -1.0))
