"""Linears that share Q: X Q is made once for all who read the same X, and is the right one whatever arrives.

Legend: N columns (in), E columns of Q, T tokens.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lsp_ray.device import input_projection
from lsp_ray.device.projected_linear import BiasProbe, ProjectedLinear, set_projectors
from lsp_ray.projection.block_factor import BlockFactor
from tests.linears import (
    FLOAT32,
    TOKENS,
    N,
    backward,
    compressed,
    gradient_MN,
    leaf_grad,
    normal,
    plain,
    relative_error,
    sharing,
    wrapped,
)

PROJECTORS = sharing(3)
Inputs = Callable[[], list[torch.Tensor]]


def trio() -> list[ProjectedLinear]:
    modules = [wrapped() for _ in range(3)]
    set_projectors(modules, PROJECTORS)
    return modules


def other(input_TN: torch.Tensor) -> torch.Tensor:
    return input_TN.clone()


def doubled_in_place(input_TN: torch.Tensor) -> torch.Tensor:
    return input_TN.mul_(2.0)


def itself(input_TN: torch.Tensor) -> torch.Tensor:
    return input_TN


@pytest.fixture(autouse=True, params=[False, True], ids=["each a node", "one node"])
def _joint(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        monkeypatch.setattr(input_projection, "is_launched", lambda _table: True)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[BlockFactor]:
    """Grows by the factor of every product of a table with a factor that shares."""
    made: list[BlockFactor] = []
    project = BlockFactor.project

    def noted(factor: BlockFactor, table_TF: torch.Tensor) -> torch.Tensor:
        if factor.num_rows == N:
            made.append(factor)
        return project(factor, table_TF)

    monkeypatch.setattr(BlockFactor, "project", noted)
    return made


@pytest.mark.parametrize(
    ("changes", "num_products"),
    [
        ((itself, itself), 1),
        ((itself, other), 2),
        ((other, itself), 2),
        ((other, other), 3),
        ((itself, doubled_in_place), 2),
    ],
)
def test_the_same_tensor_is_projected_once_and_every_other_anew(
    products: list[BlockFactor], changes: tuple[Callable[[torch.Tensor], torch.Tensor], ...], num_products: int
) -> None:
    modules = trio()
    input_TN = normal(*TOKENS, N)
    seen, losses = [], []
    for module, change in zip(modules, (itself, *changes), strict=True):
        input_TN = change(input_TN)
        seen.append(input_TN.clone())
        losses.append(module(input_TN).square().sum())
    assert products == [modules[0].projector.right] * num_products
    backward(torch.stack(losses).sum())
    for module, arrived, by in zip(modules, seen, PROJECTORS, strict=True):
        reference = plain()
        backward(reference(arrived).square().sum())
        expected_DE = compressed(gradient_MN(reference, transposed=False), by)
        assert relative_error(leaf_grad(module), expected_DE) < FLOAT32


def test_one_node_gives_the_outputs_and_gradients_of_three(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for is_joint in (False, True):
        monkeypatch.setattr(input_projection, "is_launched", lambda _table, is_joint=is_joint: is_joint)
        modules, input_TN = trio(), normal(*TOKENS, N).requires_grad_()
        probes = [BiasProbe(), BiasProbe()]
        for module, probe in zip(modules, probes, strict=False):
            module.probe = probe
        modules[2].get_parameter("bias").requires_grad_(False)
        outputs = [module(input_TN) for module in modules]
        assert len({id(output.grad_fn) for output in outputs}) == (1 if is_joint else 3)
        backward(torch.stack([output.square().sum() for output in outputs]).sum())
        grads = [module.get_parameter("bias").grad for module in modules]
        assert grads.pop() is None
        biases = [probe.read() for probe in probes]
        found.append([*outputs, input_TN.grad, *map(leaf_grad, modules), *grads, torch.tensor(biases)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_second_forward_makes_its_own_product(products: list[BlockFactor]) -> None:
    modules, input_TN = trio(), normal(*TOKENS, N)
    for _ in range(2):
        for module in modules:
            module(input_TN)
    assert len(products) == 2


def test_without_gradients_nothing_is_projected(products: list[BlockFactor]) -> None:
    with torch.no_grad():
        for module in trio():
            module(normal(*TOKENS, N))
    assert not products


def test_a_change_of_projectors_between_two_readers_makes_a_new_product() -> None:
    modules, input_TN = trio(), normal(*TOKENS, N)
    modules[0](input_TN)
    renewed = sharing(3, seed=7)
    set_projectors(modules, renewed)
    backward(modules[1](input_TN).square().sum())
    reference = plain()
    backward(reference(input_TN).square().sum())
    expected_DE = compressed(gradient_MN(reference, transposed=False), renewed[1])
    assert relative_error(leaf_grad(modules[1]), expected_DE) < FLOAT32


def test_recomputed_under_gradient_checkpointing_they_give_the_same_bits(products: list[BlockFactor]) -> None:
    grads = []
    for recomputes in (False, True):
        modules = trio()

        def forward(input_TN: torch.Tensor, modules: list[ProjectedLinear] = modules) -> torch.Tensor:
            return torch.stack([module(input_TN).square().sum() for module in modules]).sum()

        input_TN = normal(*TOKENS, N).requires_grad_()
        loss = checkpoint(forward, input_TN, use_reentrant=False) if recomputes else forward(input_TN)
        assert isinstance(loss, torch.Tensor)
        backward(loss)
        grads.append([input_TN.grad, *map(leaf_grad, modules)])
    assert len(products) == 1 + 2
    for ours, theirs in zip(*grads, strict=True):
        assert ours is not None
        assert theirs is not None
        assert torch.equal(ours, theirs)


def test_after_the_last_reader_neither_input_nor_product_is_held() -> None:
    modules, input_TN = trio(), normal(*TOKENS, N)
    projected = [weakref.ref(module.input_projection.of(input_TN, module.projector.right)) for module in modules]
    assert projected[0]() is projected[2]()
    held = weakref.ref(input_TN)
    del input_TN
    gc.collect()
    assert held() is None
    assert projected[0]() is None
