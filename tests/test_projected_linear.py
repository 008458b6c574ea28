"""ProjectedLinear is its linear, and its leaf's gradient is Pᵀ G Q.

Legend: M rows (out), N columns (in), D × E what is sent, T tokens.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from lsp_ray.device.projected_linear import ProjectedLinear
from lsp_ray.projection.sparse_projector import ProjectorSizes
from tests.linears import (
    FLOAT32,
    KIND,
    TOKENS,
    TRANSPOSED,
    D,
    E,
    M,
    N,
    backward,
    compressed,
    gradient_MN,
    leaf_grad,
    normal,
    plain,
    projector,
    relative_error,
    square_loss,
    wrapped,
)


@KIND
def test_the_output_is_the_linears(transposed: bool, bias: bool) -> None:
    input_TN = normal(*TOKENS, N)
    expected = plain(transposed=transposed, bias=bias)(input_TN)
    module = wrapped(transposed=transposed, bias=bias)
    assert relative_error(module(input_TN), expected) < FLOAT32
    with torch.no_grad():
        assert relative_error(module(input_TN), expected) < FLOAT32


@TRANSPOSED
@pytest.mark.parametrize("lead", [(), (7,), (2, 4), (2, 3, 2)], ids=str)
def test_the_leafs_gradient_is_the_full_gradient_compressed(transposed: bool, lead: tuple[int, ...]) -> None:
    reference, module, input_TN = plain(transposed=transposed), wrapped(transposed=transposed), normal(*lead, N)
    backward(square_loss(reference, input_TN))
    backward(square_loss(module, input_TN))
    grad_DE = leaf_grad(module)
    assert (grad_DE.shape, grad_DE.dtype) == ((D, E), torch.float32)
    assert relative_error(grad_DE, compressed(gradient_MN(reference, transposed=transposed))) < FLOAT32
    assert module.weight.grad is None


@TRANSPOSED
def test_the_gradients_of_the_input_and_the_bias_are_the_linears(transposed: bool) -> None:
    reference, module = plain(transposed=transposed), wrapped(transposed=transposed)
    inputs = [normal(*TOKENS, N).requires_grad_() for _ in range(2)]
    backward(square_loss(reference, inputs[0]))
    backward(square_loss(module, inputs[1]))
    assert relative_error(inputs[1].grad, inputs[0].grad) < FLOAT32
    assert relative_error(module.get_parameter("bias").grad, reference.get_parameter("bias").grad) < FLOAT32


def test_a_frozen_bias_gets_no_gradient() -> None:
    module = wrapped()
    module.get_parameter("bias").requires_grad_(False)
    backward(square_loss(module, normal(*TOKENS, N)))
    assert module.get_parameter("bias").grad is None
    assert leaf_grad(module).any()


@TRANSPOSED
def test_the_gradients_of_two_micro_batches_add_up(transposed: bool) -> None:
    reference, module = plain(transposed=transposed), wrapped(transposed=transposed)
    for seed in range(2):
        backward(square_loss(reference, normal(*TOKENS, N, seed=seed)))
        backward(square_loss(module, normal(*TOKENS, N, seed=seed)))
    assert relative_error(leaf_grad(module), compressed(gradient_MN(reference, transposed=transposed))) < FLOAT32


def test_the_gradients_of_two_uses_in_one_graph_add_up() -> None:
    reference, module = plain(), wrapped()
    inputs = [normal(*TOKENS, N, seed=seed) for seed in range(2)]
    for each in (reference, module):
        backward((each(inputs[0]) * each(inputs[1])).sum())
    assert relative_error(leaf_grad(module), compressed(gradient_MN(reference, transposed=False))) < FLOAT32


@TRANSPOSED
def test_gradient_checkpointing_gives_the_same_bits(transposed: bool) -> None:
    modules = [wrapped(transposed=transposed) for _ in range(2)]
    inputs = [normal(*TOKENS, N).requires_grad_() for _ in range(2)]
    backward(square_loss(modules[0], inputs[0]))
    recomputed = checkpoint(square_loss, modules[1], inputs[1], use_reentrant=False)
    assert isinstance(recomputed, torch.Tensor)
    backward(recomputed)
    assert torch.equal(leaf_grad(modules[0]), leaf_grad(modules[1]))
    assert inputs[0].grad is not None
    assert inputs[1].grad is not None
    assert torch.equal(inputs[0].grad, inputs[1].grad)


def test_a_backward_after_a_change_of_subspace_still_belongs_to_the_forwards_subspace() -> None:
    module, reference = wrapped(), plain()
    loss, leaf = square_loss(module, normal(*TOKENS, N)), module.leaf
    module.set_projector(projector(seed=9))
    backward(loss)
    backward(square_loss(reference, normal(*TOKENS, N)))
    assert module.leaf is leaf  # with the hooks on it
    assert leaf.grad is not None
    assert relative_error(leaf.grad, compressed(gradient_MN(reference, transposed=False))) < FLOAT32


def test_another_projector_brings_another_leaf_and_scale() -> None:
    module, other = wrapped(), projector(seed=9, sizes=ProjectorSizes.of((M, N), 8, 2))
    module.set_projector(other)
    backward(square_loss(module, normal(*TOKENS, N)))
    reference = plain()
    backward(square_loss(reference, normal(*TOKENS, N)))
    assert module.leaf.shape == (8, 8)
    assert module.update_scale == other.update_scale
    assert relative_error(leaf_grad(module), compressed(gradient_MN(reference, transposed=False), other)) < FLOAT32


@KIND
def test_the_state_has_the_linears_names_shapes_and_values(transposed: bool, bias: bool) -> None:
    expected = nn.Sequential(plain(transposed=transposed, bias=bias)).state_dict()
    model = nn.Sequential(wrapped(transposed=transposed, bias=bias))
    state = model.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    model.load_state_dict({name: tensor + 1 for name, tensor in expected.items()})
    assert torch.equal(model.get_parameter("0.weight"), expected["0.weight"] + 1)


def test_the_leaf_is_no_parameter_of_the_module_and_takes_one_element() -> None:
    module = wrapped()
    assert [name for name, _ in module.named_parameters()] == ["weight", "bias"]
    assert not module.weight.requires_grad
    assert module.leaf.untyped_storage().nbytes() == 4


def test_a_wrapped_linear_keeps_the_tensors_it_was_given() -> None:
    original = plain()
    module = ProjectedLinear(original, transposed=False, projector=projector())
    assert module.weight is original.get_parameter("weight")
    assert module.bias is original.get_parameter("bias")


def test_bfloat16_weights_and_inputs_give_a_float32_compressed_gradient() -> None:
    reference, input_TN = plain(), normal(*TOKENS, N).bfloat16()
    exact = linear(
        input_TN.double(),
        reference.get_parameter("weight").bfloat16().double(),
        reference.get_parameter("bias").bfloat16().double(),
    )
    module = wrapped().bfloat16()
    output = module(input_TN)
    assert output.dtype == torch.bfloat16
    assert relative_error(output, exact) < 2.0**-8
    grad_output = normal(*TOKENS, M, seed=3).bfloat16()
    torch.autograd.backward([output], [grad_output])
    expected_DE = compressed(grad_output.reshape(-1, M).double().t() @ input_TN.reshape(-1, N).double())
    assert leaf_grad(module).dtype == torch.float32
    # values, both projections and their product are each rounded to 8 bits: errors of 2^-9, mostly independent
    assert relative_error(leaf_grad(module), expected_DE) < 2.0**-6
