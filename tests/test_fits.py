"""What lessons remember of gradients, and what is learned from them, by one linear or by several that share Q.

Legend: M rows (out), N columns (in), T tokens.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lsp_ray.device.fits import SKETCH_WIDTH, ClosedFormFit, Fit, GradientSketch, Lesson, PaperFit
from lsp_ray.projection.bias import relative_bias
from lsp_ray.projection.closed_form import fit_factor
from lsp_ray.projection.paper_fit import fit_paper
from lsp_ray.projection.sparse_projector import SparseProjector
from tests.linears import (
    SIZES,
    TRANSPOSED,
    M,
    N,
    R,
    backward,
    generator,
    gradient_MN,
    leaf_grad,
    normal,
    plain,
    projector,
    relative_error,
    square_loss,
    wrapped,
)

CPU = torch.device("cpu")
PAPER = PaperFit(max_bias=0.8, timeout_s=60.0)  # ends at the bias; the time is for a busy machine
PLAIN = ClosedFormFit(balanced=False)
FIT = pytest.mark.parametrize("fit", [PLAIN, PAPER], ids=["closed_form", "paper"])
OTHER = replace(SIZES, shape=(40, N), dims=(8, SIZES.dims[1]))  # of a smaller linear that reads the same input


def gradients(*, transposed: bool = False) -> list[torch.Tensor]:
    """Autograd's own, of three micro-batches."""
    grads = []
    for seed in range(3):
        reference = plain(transposed=transposed)
        backward(square_loss(reference, normal(4, N, seed=seed)))
        grads.append(gradient_MN(reference, transposed=transposed))
    return grads


def taught(fit: Fit, *, transposed: bool = False) -> Lesson:
    module = wrapped(transposed=transposed)
    module.lesson = fit.lesson((M, N), generator())
    for seed in range(3):
        backward(square_loss(module, normal(4, N, seed=seed)))
    return module.lesson


def lesson_of(fit: Fit, *grads_MN: torch.Tensor) -> Lesson:
    lesson = fit.lesson((grads_MN[0].shape[0], N), generator())
    for grad_MN in grads_MN:
        lesson.add(torch.eye(len(grad_MN)), grad_MN)
    return lesson


def bias(by: SparseProjector, grad_MN: torch.Tensor) -> float:
    found = relative_bias(by.compress(grad_MN), float(grad_MN.square().sum()))
    assert found is not None
    return found


@TRANSPOSED
def test_a_sketch_sums_random_combinations_of_the_full_gradients_columns_and_rows(transposed: bool) -> None:
    sketch = taught(PLAIN, transposed=transposed)
    drawn = generator()
    left_MW, right_NW = torch.zeros(M, SKETCH_WIDTH).double(), torch.zeros(N, SKETCH_WIDTH).double()
    full = GradientSketch((M, N), generator())
    for grad_MN in gradients(transposed=transposed):
        right, left = (torch.randn(side, SKETCH_WIDTH, generator=drawn).double() for side in (N, M))
        left_MW += grad_MN.double() @ right
        right_NW += grad_MN.double().t() @ left
        full.add_full(grad_MN)
    assert isinstance(sketch, GradientSketch)
    for each in (sketch, full):
        assert relative_error(each.left_MW, left_MW) < 1e-5
        assert relative_error(each.right_NW, right_NW) < 1e-5


def test_what_a_sketch_keeps_is_float32_whatever_the_gradients_are() -> None:
    module = wrapped().bfloat16()
    sketch = module.lesson = GradientSketch((M, N), generator())
    input_TN, grad_output_TM = normal(4, N).bfloat16(), normal(4, M).bfloat16()
    torch.autograd.backward([module(input_TN)], [grad_output_TM])
    exact = GradientSketch((M, N), generator())
    exact.add(grad_output_TM.double(), input_TN.double())
    assert sketch.left_MW.dtype == sketch.right_NW.dtype == torch.float32
    assert relative_error(sketch.left_MW, exact.left_MW) < 2e-2
    assert relative_error(sketch.right_NW, exact.right_NW) < 2e-2


@FIT
def test_a_lesson_changes_neither_outputs_nor_gradients(fit: Fit) -> None:
    observed, unobserved, outputs, inputs = wrapped(), wrapped(), [], []
    observed.lesson = fit.lesson((M, N), generator())
    for module in (observed, unobserved):
        inputs.append(normal(2, 4, N).requires_grad_())
        outputs.append(module(inputs[-1]))
        backward(outputs[-1].square().sum())
    pairs = ((*outputs,), [each.grad for each in inputs], (leaf_grad(observed), leaf_grad(unobserved)))
    for ours, theirs in pairs:
        assert ours is not None
        assert theirs is not None
        assert torch.equal(ours, theirs)


@FIT
def test_a_restored_lesson_goes_on_bit_for_bit(fit: Fit) -> None:
    first, whole = lesson_of(fit, normal(M, N, seed=1)), lesson_of(fit, normal(M, N, seed=1), normal(M, N, seed=2))
    second = fit.lesson((M, N), generator(9))
    second.restore({name: tensor.clone() for name, tensor in first.state().items()})
    second.add(torch.eye(M), normal(M, N, seed=2))
    assert second.state().keys() == whole.state().keys()
    for name, tensor in whole.state().items():
        assert torch.equal(second.state()[name], tensor)
    with pytest.raises(ValueError, match=r"sketch of|another matrix"):
        fit.lesson((40, N), generator()).restore(first.state())


@FIT
@TRANSPOSED
def test_what_is_learned_estimates_the_gradients_better_than_a_random_projector(fit: Fit, transposed: bool) -> None:
    learned = fit.learn([taught(fit, transposed=transposed)], [SIZES], generator(1), CPU)
    assert learned is not None
    grad_MN = gradients(transposed=transposed)[-1]
    assert bias(learned[0], grad_MN) < bias(projector(1), grad_MN) - 0.05


@FIT
def test_linears_that_share_q_learn_together(fit: Fit) -> None:
    grads = [normal(rows, 1) @ normal(1, N) * size for rows, size in ((M, 1.0), (40, 1e-6))]
    learned = fit.learn([lesson_of(fit, grad) for grad in grads], [SIZES, OTHER], generator(1), CPU)
    assert learned is not None
    assert learned[0].right is learned[1].right
    assert [each.sizes for each in learned] == [SIZES, OTHER]


def test_the_closed_form_learns_each_p_from_its_own_sketch_and_q_from_all_with_equal_weights() -> None:
    sketches = [lesson_of(PLAIN, grad_MN) for grad_MN in (normal(M, N, seed=1), 1e-6 * normal(40, N, seed=2))]
    learned = PLAIN.learn(sketches, [SIZES, OTHER], generator(1), CPU)
    assert learned is not None
    rights = []
    for sketch, size, each in zip(sketches, (SIZES, OTHER), learned, strict=True):
        assert isinstance(sketch, GradientSketch)
        rights.append(sketch.right_NW / sketch.right_NW.norm())
        alone = fit_factor(sketch.left_MW, size.groups[0], R)
        assert alone is not None
        assert torch.equal(each.left.value_FR, alone.value_FR)
    shared = fit_factor(torch.cat(rights, dim=1), SIZES.groups[1], R)
    assert shared is not None
    assert torch.equal(learned[0].right.value_FR, shared.value_FR)


def test_the_papers_fit_learns_from_every_full_gradient() -> None:
    learned = PAPER.learn([taught(PAPER)], [SIZES], generator(1), CPU)
    expected = fit_paper([gradients()], [SIZES], generator(1), max_bias=0.8, timeout_s=60.0)
    assert learned is not None
    assert expected is not None
    assert relative_error(learned[0].left.dense(), expected[0].left.dense()) < 1e-2  # gradients differ in the last bits


@FIT
@pytest.mark.parametrize("bad", [0.0, float("nan")])
def test_nothing_is_learned_where_one_of_the_linears_has_no_usable_gradient(fit: Fit, bad: float) -> None:
    lessons = [lesson_of(fit, normal(M, N)), lesson_of(fit, torch.full((40, N), bad))]
    assert fit.learn(lessons, [SIZES, OTHER], generator(1), CPU) is None
    assert fit.learn([fit.lesson((M, N), generator())], [SIZES], generator(1), CPU) is None


def test_only_the_papers_fit_needs_more_memory_for_more_batches() -> None:
    sizes = [[fit.host_bytes((M, N), batches) for batches in (1, 4)] for fit in (PLAIN, PAPER)]
    assert sizes == [[4 * (M + N) * SKETCH_WIDTH] * 2, [4 * M * N, 16 * M * N]]
