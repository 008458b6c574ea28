"""ProjectedLinear is its linear, its leaf's gradient is Pᵀ G Q, and nothing as large as G is ever made.

Legend: M rows (out), N columns (in), D subspace, T tokens, S width of a sketch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from lsp_ray.device.projected_linear import GradientSketch, ProjectedLinear, ProjectedTarget
from lsp_ray.device.rounding import MAX_ELEMENTS, Rounding
from lsp_ray.device.unit import Update
from lsp_ray.projection.sparse_projector import SparseProjector

M, N, D, R = 96, 80, 16, 4
TOKENS = (2, 4)  # 8 in all: T·M, T·N and D·N are far below M·N
FLOAT32 = 1e-6  # relative, of sums of at most 96 products, each rounded by 6e-8
TRANSPOSED = pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
KIND = pytest.mark.parametrize(
    ("transposed", "bias"), [(False, True), (False, False), (True, True)], ids=["linear", "linear_no_bias", "conv1d"]
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def projector(seed: int = 0, dim: int = D) -> SparseProjector:
    return SparseProjector.random((M, N), dim, R, torch.Generator().manual_seed(seed))


def plain(*, transposed: bool = False, bias: bool = True) -> nn.Module:
    """An nn.Linear or a Conv1D, its weights decided here."""
    module: nn.Module = Conv1D(M, N) if transposed else nn.Linear(N, M, bias=bias)
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=100 + index))
    return module


def wrapped(*, transposed: bool = False, bias: bool = True) -> ProjectedLinear:
    return ProjectedLinear(plain(transposed=transposed, bias=bias), transposed=transposed, projector=projector())


def gradient_MN(module: nn.Module, *, transposed: bool) -> torch.Tensor:
    """Autograd's own full gradient as (out, in)."""
    grad = module.get_parameter("weight").grad
    assert grad is not None
    return grad.t() if transposed else grad


def leaf_grad(module: ProjectedLinear) -> torch.Tensor:
    assert module.leaf.grad is not None
    return module.leaf.grad


def compressed(grad_MN: torch.Tensor, by: SparseProjector | None = None) -> torch.Tensor:
    by = by or projector()
    return by.left.dense().double().t() @ grad_MN.double() @ by.right.dense().double()


def relative_error(actual: torch.Tensor | None, expected: torch.Tensor | None) -> float:
    assert actual is not None
    assert expected is not None
    error = actual.detach().double() - expected.detach().double()
    return float(error.norm() / expected.detach().double().norm())


def backward(loss: torch.Tensor) -> None:
    torch.autograd.backward([loss])


def square_loss(module: nn.Module, input_TN: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = module(input_TN).square().sum()
    return loss


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
    grad_DD = leaf_grad(module)
    assert (grad_DD.shape, grad_DD.dtype) == ((D, D), torch.float32)
    assert relative_error(grad_DD, compressed(gradient_MN(reference, transposed=transposed))) < FLOAT32
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
    loss, old_leaf = square_loss(module, normal(*TOKENS, N)), module.leaf
    module.set_projector(projector(seed=9))
    backward(loss)
    backward(square_loss(reference, normal(*TOKENS, N)))
    assert old_leaf.grad is not None
    assert relative_error(old_leaf.grad, compressed(gradient_MN(reference, transposed=False))) < FLOAT32
    assert module.leaf.grad is None


def test_another_projector_brings_another_leaf_and_scale() -> None:
    module, other = wrapped(), projector(seed=9, dim=12)
    module.set_projector(other)
    backward(square_loss(module, normal(*TOKENS, N)))
    reference = plain()
    backward(square_loss(reference, normal(*TOKENS, N)))
    assert module.leaf.shape == (12, 12)
    assert module.update_scale == other.update_scale
    assert relative_error(leaf_grad(module), compressed(gradient_MN(reference, transposed=False), other)) < FLOAT32


class FreshStorages(TorchDispatchMode):
    """Records the bytes of every storage that an operation makes; views of older storages do not count."""

    def __init__(self, *older: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive = list(older)  # held, so that no address is used twice
        self.known = {tensor.untyped_storage().data_ptr() for tensor in older}
        self.sizes: list[int] = []

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.known.add(tensor.untyped_storage().data_ptr())
                self.alive.append(tensor)
                self.sizes.append(tensor.untyped_storage().nbytes())
        return output


def largest_allocation(module: nn.Module, *, sketch: GradientSketch | None = None) -> int:
    """The largest storage, in float32 elements, made by a forward and a backward with a gradient for the input."""
    input_TN = normal(*TOKENS, N).requires_grad_()
    if isinstance(module, ProjectedLinear):
        module.sketch = sketch
    fresh = FreshStorages(input_TN, *module.parameters())
    with fresh:
        backward(square_loss(module, input_TN))
    assert input_TN.grad is not None
    return max(fresh.sizes) // 4


@TRANSPOSED
def test_forward_and_backward_never_allocate_anything_as_large_as_the_weight(transposed: bool) -> None:
    assert largest_allocation(plain(transposed=transposed)) == M * N  # what is watched for is seen where it exists
    assert largest_allocation(wrapped(transposed=transposed)) <= max(D * D, 8 * M, 2 * R * M) < M * N / 4


@TRANSPOSED
def test_a_sketched_backward_never_allocates_anything_as_large_as_the_weight(transposed: bool) -> None:
    sketch = GradientSketch((M, N), 10, torch.Generator().manual_seed(0))
    assert largest_allocation(wrapped(transposed=transposed), sketch=sketch) <= 10 * M < M * N / 4


def saved_numels(module: nn.Module) -> list[int]:
    """Elements of each tensor that the forward keeps for the backward, the weight's own storage left out."""
    weight_storage = module.get_parameter("weight").untyped_storage().data_ptr()
    numels: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() != weight_storage:
            numels.append(tensor.untyped_storage().nbytes() // tensor.element_size())
        return tensor

    input_TN = normal(*TOKENS, N).requires_grad_()
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        module(input_TN)
    return numels


@TRANSPOSED
def test_the_forward_keeps_the_projected_input_and_not_the_input(transposed: bool) -> None:
    assert saved_numels(plain(transposed=transposed)) == [8 * N]
    assert saved_numels(wrapped(transposed=transposed)) == [8 * D]


@TRANSPOSED
def test_the_input_is_freed_once_its_owner_lets_go(transposed: bool) -> None:
    freed = []
    for module in (plain(transposed=transposed), wrapped(transposed=transposed)):
        input_TN = normal(*TOKENS, N)
        storage = StorageWeakRef(input_TN.untyped_storage())
        output = module(input_TN)
        del input_TN
        freed.append(storage.expired())
        backward(output.sum())
    assert freed == [False, True]


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
    expected_DD = compressed(grad_output.reshape(-1, M).double().t() @ input_TN.reshape(-1, N).double())
    assert leaf_grad(module).dtype == torch.float32
    # values, both projections and their product are each rounded to 8 bits: errors of 2^-9, mostly independent
    assert relative_error(leaf_grad(module), expected_DD) < 2.0**-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    rows: int
    columns: int
    transposed: bool
    weight_decay: float
    dtype: torch.dtype = torch.float32


def applied(case: Case, *, step: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply a random delta; return the weight (M, N) afterwards and what it should be, in float64."""
    generator = torch.Generator().manual_seed(0)
    by = SparseProjector.random((case.rows, case.columns), D, R, generator)
    original: nn.Module = Conv1D(case.rows, case.columns) if case.transposed else nn.Linear(case.columns, case.rows)
    module = ProjectedLinear(original.to(case.dtype), transposed=case.transposed, projector=by)
    with torch.no_grad():
        module.weight.copy_(torch.randn(module.weight.shape, generator=generator))
    before_MN = module.weight_MN.detach().double().clone()
    delta_DD = torch.randn(D, D, generator=generator) * 1e-3
    update = Update(
        step=step, learning_rate=0.1, weight_decay=case.weight_decay, rounding=Rounding(3, torch.device("cpu"))
    )
    ProjectedTarget(module).apply(delta_DD.view(-1), update, key=2)
    full_MN = by.left.dense().double() @ delta_DD.double() @ by.right.dense().double().t()
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
    by = SparseProjector.random((rows, columns), D, R, torch.Generator().manual_seed(0))
    module = ProjectedLinear(nn.Linear(columns, rows).bfloat16(), transposed=False, projector=by)
    nn.init.ones_(module.weight)
    update = Update(step=1, learning_rate=1e-3, weight_decay=1.0, rounding=Rounding(3, torch.device("cpu")))
    ProjectedTarget(module).apply(torch.zeros(D * D), update, key=2)
    # every element was to become 0.999: only the noise tells one from another
    assert not torch.equal(module.weight[second:], module.weight[:second])


def test_a_targets_leaf_is_its_modules_even_after_a_change_of_subspace() -> None:
    module = wrapped()
    target = ProjectedTarget(module)
    module.set_projector(projector(seed=9, dim=12))
    assert target.leaf is module.leaf
    assert target.owner is module


def sketched(module: ProjectedLinear, width: int, batches: int) -> GradientSketch:
    sketch = GradientSketch((M, N), width, torch.Generator().manual_seed(0))
    module.sketch = sketch
    for seed in range(batches):
        backward(square_loss(module, normal(4, N, seed=seed)))
    return sketch


def share_outside(basis_FS: torch.Tensor, grads_FK: torch.Tensor) -> float:
    """The share of some vectors outside the span of others."""
    axes_FS, strengths_S, _ = torch.linalg.svd(basis_FS.double(), full_matrices=False)
    kept = axes_FS[:, strengths_S / strengths_S[0] > 1e-5]
    return relative_error(kept @ (kept.t() @ grads_FK.double()), grads_FK)


@TRANSPOSED
def test_a_sketch_as_wide_as_the_rank_spans_the_gradients_columns_and_rows(transposed: bool) -> None:
    grads = []
    for seed in range(3):
        reference = plain(transposed=transposed)
        backward(square_loss(reference, normal(4, N, seed=seed)))
        grads.append(gradient_MN(reference, transposed=transposed))
    # three gradients of rank 4, side by side and on top of each other, have rank 12
    sketch = sketched(wrapped(transposed=transposed), 12, 3)
    assert (sketch.left_MS.shape, sketch.right_NS.shape) == ((M, 12), (N, 12))
    assert share_outside(sketch.left_MS, torch.cat(grads, dim=1)) < 1e-3
    assert share_outside(sketch.right_NS, torch.cat(grads).t()) < 1e-3


def test_a_sketch_narrower_than_the_rank_spans_less() -> None:
    reference = plain()
    backward(square_loss(reference, normal(4, N)))
    sketch = sketched(wrapped(), 3, 1)
    assert share_outside(sketch.left_MS, gradient_MN(reference, transposed=False)) > 0.1


def test_sketching_leaves_the_output_and_the_inputs_gradient_and_makes_no_leaf_gradient() -> None:
    reference, module = plain(), wrapped()
    inputs = [normal(*TOKENS, N).requires_grad_() for _ in range(2)]
    backward(square_loss(reference, inputs[0]))
    module.sketch = GradientSketch((M, N), 8, torch.Generator().manual_seed(0))
    assert relative_error(module(inputs[1]), reference(inputs[0])) < FLOAT32
    backward(square_loss(module, inputs[1]))
    assert relative_error(inputs[1].grad, inputs[0].grad) < FLOAT32
    assert module.leaf.grad is None
    assert module.get_parameter("bias").grad is None


def test_a_sketch_of_bfloat16_gradients_is_float32() -> None:
    module = wrapped().bfloat16()
    module.sketch = GradientSketch((M, N), 8, torch.Generator().manual_seed(0))
    torch.autograd.backward([module(normal(4, N).bfloat16())], [normal(4, M).bfloat16()])
    assert module.sketch.left_MS.dtype == module.sketch.right_NS.dtype == torch.float32
    grad_MN = normal(4, M).bfloat16().t().float() @ normal(4, N).bfloat16().float()
    assert share_outside(grad_MN, module.sketch.left_MS) < 2e-2
    assert share_outside(grad_MN.t(), module.sketch.right_NS) < 2e-2


def test_a_sketch_is_decided_by_its_generator() -> None:
    first, again = sketched(wrapped(), 5, 2), sketched(wrapped(), 5, 2)
    assert torch.equal(first.left_MS, again.left_MS)
    assert torch.equal(first.right_NS, again.right_NS)
