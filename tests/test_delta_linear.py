"""A linear with its delta apart computes, to rounding, what the linear with the delta in its weight does."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lsp_ray.device.delta_linear import DeltaLinear, DeltaTarget
from lsp_ray.device.projected_linear import ProjectedLinear, set_projectors
from tests.linears import (
    FLOAT32,
    KIND,
    D,
    E,
    M,
    N,
    backward,
    balanced,
    generator,
    leaf_grad,
    normal,
    plain,
    projector,
    relative_error,
    sharing,
    square_loss,
)

BFLOAT16 = 2e-2  # sums of 96 products of values that are rounded by 2⁻⁹, and rounded again


class _Quantised(torch.autograd.Function):
    """A frozen base's forward as libraries of quantised weights have it: the output may be a view, X is not kept."""

    @staticmethod
    def forward(ctx: object, input_TN: torch.Tensor, weight_MN: torch.Tensor) -> torch.Tensor:
        ctx.weight_MN = weight_MN  # type: ignore[attr-defined]
        return (input_TN @ weight_MN.t()).view(-1)

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        weight_MN: torch.Tensor = ctx.weight_MN  # type: ignore[attr-defined]
        return grad.view(-1, len(weight_MN)) @ weight_MN, None


class Quantised(nn.Module):
    """A linear whose weight is in no usual form."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.weight = nn.Parameter((linear.get_parameter("weight") * 100).to(torch.int8), requires_grad=False)

    def forward(self, input_TN: torch.Tensor) -> torch.Tensor:
        flat = _Quantised.apply(input_TN.reshape(-1, N), self.weight.to(input_TN) / 100)  # type: ignore[no-untyped-call]
        output: torch.Tensor = flat.view(*input_TN.shape[:-1], M)
        return output


def apart(module: nn.Module, *, transposed: bool = False) -> DeltaLinear:
    result = DeltaLinear(module, transposed=transposed, projector=balanced(projector()))
    result.delta_DE.copy_(normal(D, E, seed=7) / 10)
    return result


def dense_delta(module: DeltaLinear) -> torch.Tensor:
    left, right = module.projector.left.dense(), module.projector.right.dense()
    return left @ module.delta_DE.to(left) @ right.t()


@KIND
def test_forward_and_gradients_are_those_of_the_linear_with_the_delta_in_its_weight(
    transposed: bool, bias: bool
) -> None:
    module = apart(plain(transposed=transposed, bias=bias), transposed=transposed)
    reference = plain(transposed=transposed, bias=bias)
    delta_MN = dense_delta(module)
    with torch.no_grad():
        reference.get_parameter("weight").add_(delta_MN.t() if transposed else delta_MN)
    inputs = [normal(2, 4, N).requires_grad_() for _ in range(2)]
    losses = [square_loss(each, input_TN) for each, input_TN in zip((module, reference), inputs, strict=True)]
    for loss in losses:
        backward(loss)
    gradient = reference.get_parameter("weight").grad
    assert gradient is not None
    expected = module.projector.compress(gradient.t() if transposed else gradient)
    assert relative_error(losses[0], losses[1]) < FLOAT32
    assert relative_error(inputs[0].grad, inputs[1].grad) < FLOAT32
    assert relative_error(leaf_grad(module), expected) < 4 * FLOAT32
    if bias:
        assert relative_error(module.base.get_parameter("bias").grad, reference.get_parameter("bias").grad) < FLOAT32
    with torch.no_grad():
        assert relative_error(module(inputs[0]), reference(inputs[0])) < FLOAT32
    assert relative_error(module.merged(), reference.get_parameter("weight")) < FLOAT32


def test_a_base_in_no_usual_form_needs_nothing_but_a_forward_and_an_inputs_gradient() -> None:
    base = Quantised(plain(bias=False))
    module = apart(base)
    weight_MN = (base.weight / 100 + dense_delta(module)).requires_grad_()
    ours, theirs = normal(2, 4, N).requires_grad_(), normal(2, 4, N).requires_grad_()
    backward(square_loss(module, ours))
    backward((theirs @ weight_MN.t()).square().sum())
    assert weight_MN.grad is not None
    assert relative_error(ours.grad, theirs.grad) < FLOAT32
    assert relative_error(leaf_grad(module), module.projector.compress(weight_MN.grad)) < 4 * FLOAT32


def test_bfloat16_is_as_exact_as_its_rounding() -> None:
    exact = apart(plain())
    module = DeltaLinear(
        plain().bfloat16(), transposed=False, projector=exact.projector.to(exact.leaf.device, torch.bfloat16)
    )
    module.delta_DE.copy_(exact.delta_DE)
    ours, theirs = normal(2, 4, N).bfloat16().requires_grad_(), normal(2, 4, N).requires_grad_()
    outputs = module(ours), exact(theirs)
    assert outputs[0].dtype == torch.bfloat16
    for output in outputs:
        backward(output.float().square().sum())
    assert relative_error(*outputs) < BFLOAT16
    assert relative_error(ours.grad, theirs.grad) < BFLOAT16
    assert relative_error(leaf_grad(module), leaf_grad(exact)) < BFLOAT16


def test_linears_that_share_q_bring_one_gradient_back_to_their_input() -> None:
    shared = [DeltaLinear(plain(), transposed=False, projector=each) for each in sharing(3)]
    alone = [DeltaLinear(plain(), transposed=False, projector=each) for each in sharing(3)]
    set_projectors(shared, [module.projector for module in shared])
    for index, pair in enumerate(zip(shared, alone, strict=True)):
        for module in pair:
            module.delta_DE.copy_(normal(D, E, seed=index))
    ours, theirs = normal(2, 4, N).requires_grad_(), normal(2, 4, N).requires_grad_()
    for modules, input_TN in ((shared, ours), (alone, theirs)):
        backward(torch.stack([square_loss(module, input_TN) for module in modules]).sum())
    assert relative_error(ours.grad, theirs.grad) < FLOAT32
    for module, other in zip(shared, alone, strict=True):
        assert torch.equal(leaf_grad(module), leaf_grad(other))


def test_checkpointing_changes_no_bit() -> None:
    plainly, again = apart(plain()), apart(plain())
    ours, theirs = normal(2, 4, N).requires_grad_(), normal(2, 4, N).requires_grad_()
    backward(square_loss(plainly, ours))
    backward(checkpoint(square_loss, again, theirs, use_reentrant=False))
    assert torch.equal(leaf_grad(plainly), leaf_grad(again))
    assert ours.grad is not None
    assert theirs.grad is not None
    assert torch.equal(ours.grad, theirs.grad)


def test_what_the_backward_needs_is_not_the_input() -> None:
    module = apart(plain())
    kept: list[tuple[int, ...]] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(normal(8, N).requires_grad_())
    assert sorted(kept) == sorted([(N, M), (8, E), (D, E)])


def test_merging_leaves_the_sum_and_begins_anew() -> None:
    module = apart(plain())
    before = module(normal(8, N)).detach()
    module.merge_()
    assert not module.delta_DE.any()
    assert module.is_merged
    assert relative_error(module(normal(8, N)), before) < FLOAT32


def test_a_sum_that_comes_up_is_scaled_as_deltas_are() -> None:
    module, reference = apart(plain()), ProjectedLinear(plain(), transposed=False, projector=balanced(projector()))
    target, total = DeltaTarget(module), torch.randn(D * E, generator=generator(3))
    start = copy.deepcopy(reference.weight)
    target.put(total)
    expected = start + reference.update_scale * reference.projector.decompress(total.view(D, E))
    assert relative_error(module.merged(), expected) < FLOAT32


def test_expanding_is_the_product_with_the_transpose() -> None:
    for factor in (projector().left, projector().right):
        table = normal(8, factor.dim)
        expected = table @ factor.dense().t()
        assert relative_error(factor.expand(table), expected) < FLOAT32
        output = normal(8, factor.num_rows, seed=4)
        before = output.clone()
        factor.add_expanded_(output, table)
        assert relative_error(output, before + expected) < FLOAT32
