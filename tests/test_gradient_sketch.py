"""A sketch spans what the gradients' columns and rows span.

Legend: M rows (out), N columns (in), D subspace, T tokens, S width of a sketch.
"""

from __future__ import annotations

import torch

from lsp_ray.device.fits import GradientSketch
from lsp_ray.device.projected_linear import ProjectedLinear
from tests.linears import (
    FLOAT32,
    TOKENS,
    TRANSPOSED,
    M,
    N,
    backward,
    gradient_MN,
    normal,
    plain,
    relative_error,
    square_loss,
    wrapped,
)


def sketched(module: ProjectedLinear, width: int, batches: int) -> GradientSketch:
    sketch = GradientSketch((M, N), width, torch.Generator().manual_seed(0))
    module.lesson = sketch
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


def test_sketching_changes_neither_output_nor_gradients() -> None:
    reference, module = plain(), wrapped()
    unobserved = wrapped()
    backward(square_loss(unobserved, normal(*TOKENS, N)))
    inputs = [normal(*TOKENS, N).requires_grad_() for _ in range(2)]
    backward(square_loss(reference, inputs[0]))
    module.lesson = GradientSketch((M, N), 8, torch.Generator().manual_seed(0))
    assert relative_error(module(inputs[1]), reference(inputs[0])) < FLOAT32
    backward(square_loss(module, inputs[1]))
    assert relative_error(inputs[1].grad, inputs[0].grad) < FLOAT32
    for ours, theirs in ((module.leaf, unobserved.leaf), (module.bias, unobserved.bias)):
        assert ours is not None
        assert theirs is not None
        assert ours.grad is not None
        assert theirs.grad is not None
        assert torch.equal(ours.grad, theirs.grad)


def test_a_sketch_of_bfloat16_gradients_is_float32() -> None:
    module = wrapped().bfloat16()
    module.lesson = GradientSketch((M, N), 8, torch.Generator().manual_seed(0))
    torch.autograd.backward([module(normal(4, N).bfloat16())], [normal(4, M).bfloat16()])
    assert module.lesson.left_MS.dtype == module.lesson.right_NS.dtype == torch.float32
    grad_MN = normal(4, M).bfloat16().t().float() @ normal(4, N).bfloat16().float()
    assert share_outside(grad_MN, module.lesson.left_MS) < 2e-2
    assert share_outside(grad_MN.t(), module.lesson.right_NS) < 2e-2


def test_a_sketch_is_decided_by_its_generator() -> None:
    first, again = sketched(wrapped(), 5, 2), sketched(wrapped(), 5, 2)
    assert torch.equal(first.left_MS, again.left_MS)
    assert torch.equal(first.right_NS, again.right_NS)
