"""The paper's fit by Adam: which loss it lowers, when it ends, and when it declines.

Legend: M rows (out), N columns (in), K rank of a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any

import pytest
import torch

from lsp_ray.projection.block_factor import BlockFactor
from lsp_ray.projection.paper_fit import LEARNING_RATE, fit_paper
from lsp_ray.projection.sparse_projector import ProjectorSizes, SparseProjector
from tests.linears import generator, normal

N = 40
SIZES = [ProjectorSizes.of((48, N), 16, 4), ProjectorSizes.of((26, N), 16, 4)]  # two linears that share Q; a short one
FOREVER = float("inf")
Gradients = Sequence[Sequence[torch.Tensor]]


def low_rank(num: int, rank: int = 2) -> list[list[torch.Tensor]]:
    """By linear: gradients that share a column space and a row space of `rank` dimensions."""
    right_KN = normal(rank, N, seed=2)
    lefts = [normal(size.shape[0], rank, seed=3 + index) for index, size in enumerate(SIZES)]
    return [[left_MK @ normal(rank, rank, seed=10 + seed) @ right_KN for seed in range(num)] for left_MK in lefts]


def fitted(gradients: Gradients, *, max_bias: float = 0.0, max_steps: int = 40) -> list[SparseProjector]:
    options: dict[str, Any] = {"max_bias": max_bias, "timeout_s": FOREVER, "norm_weight": 0.01}
    learned = fit_paper(gradients, SIZES, generator(), max_steps=max_steps, **options)
    assert learned is not None
    return learned


def mean_bias(lefts: Sequence[torch.Tensor], right_NE: torch.Tensor, gradients: Gradients) -> torch.Tensor:
    """The mean of ‖P Pᵀ G Q Qᵀ − G‖ / ‖G‖, formed as it is written, in float64."""
    biases = []
    for left_MD, of_linear in zip(lefts, gradients, strict=True):
        for grad_MN in (grad.double() for grad in of_linear):
            estimate_MN = left_MD @ left_MD.t() @ grad_MN @ right_NE @ right_NE.t()
            biases.append((estimate_MN - grad_MN).norm() / grad_MN.norm())
    return torch.stack(biases).mean()


def written_out(gradients: Gradients, num_steps: int) -> tuple[list[torch.Tensor], list[float]]:
    """Algorithm 1 in dense matrices, float64: P, P', Q made orthonormal after the steps, and the bias before each."""
    drawn = generator()
    sides = [(size.shape[0], size.groups[0]) for size in SIZES] + [(N, SIZES[0].groups[1])]
    starts = [BlockFactor.random(rows, groups, 4, drawn) for rows, groups in sides]
    values = [start.value_FR.double().requires_grad_() for start in starts]
    adam, biases = torch.optim.Adam(values, lr=LEARNING_RATE), []
    for _ in range(num_steps):
        pairs = zip(values, starts, strict=True)
        *lefts, right_NE = (torch.block_diag(*value.tensor_split(start.groups)) for value, start in pairs)
        bias = mean_bias(lefts, right_NE, gradients)
        biases.append(float(bias.detach()))
        adam.zero_grad()
        norms = [dense.norm() for dense in (*lefts, right_NE)]
        torch.autograd.backward([bias + 0.01 * torch.stack(norms).sum()])
        adam.step()
    ends = []
    for value, start in zip(values, starts, strict=True):
        parts = [torch.linalg.svd(part, full_matrices=False) for part in value.detach().tensor_split(start.groups)]
        ends.append(torch.block_diag(*(left @ right for left, _, right in parts)))
    return ends, biases


def factors(learned: Sequence[SparseProjector]) -> list[torch.Tensor]:
    return [*(each.left.dense() for each in learned), learned[0].right.dense()]


def assert_same(learned: Sequence[SparseProjector], other: Sequence[SparseProjector]) -> None:
    assert all(map(torch.equal, factors(learned), factors(other)))


def test_its_steps_are_adams_on_the_loss_of_algorithm_1_and_what_comes_out_is_orthonormal() -> None:
    gradients = low_rank(2)
    for num_steps in (0, 1, 8):
        expected, _ = written_out(gradients, num_steps)
        learned = fitted(gradients, max_steps=num_steps)
        for our, their in zip(factors(learned), expected, strict=True):
            # Adam's first steps have size lr whatever a slope's: slopes near zero differ in float32
            torch.testing.assert_close(our.double(), their, rtol=0, atol=2e-3)
            torch.testing.assert_close(our.t() @ our, torch.eye(our.shape[1]), rtol=0, atol=1e-5)


def test_linears_that_share_an_input_get_one_right_factor() -> None:
    first, second = fitted(low_rank(1), max_steps=2)
    assert first.right is second.right
    assert [first.sizes, second.sizes] == SIZES
    assert not any(value.requires_grad for value in (first.left.value_FR, first.right.value_FR))


def test_forty_steps_bring_the_bias_of_low_rank_gradients_far_below_the_start() -> None:
    gradients = low_rank(3)
    before, after = (factors(fitted(gradients, max_steps=steps)) for steps in (0, 40))
    biases = [
        float(mean_bias([left.double() for left in lefts], right.double(), gradients))
        for *lefts, right in (before, after)
    ]
    assert biases[1] < 0.4 * biases[0]


def test_it_ends_at_the_first_step_whose_bias_is_at_most_the_bound() -> None:
    gradients, bound = low_rank(2), 0.7
    _, biases = written_out(gradients, 20)
    first = next(step for step, bias in enumerate(biases) if bias <= bound)
    assert first > 1
    assert_same(fitted(gradients, max_bias=bound), fitted(gradients, max_steps=first))


@pytest.mark.parametrize(("timeout_s", "steps"), [(0.0, 0), (2.5, 2), (5.0, 4)])
def test_no_step_is_begun_after_the_timeout(timeout_s: float, steps: int) -> None:
    ticks = count()  # one second passes between two readings; the first sets the deadline
    options: dict[str, Any] = {"max_bias": 0.0, "timeout_s": timeout_s, "norm_weight": 0.01}
    gradients = low_rank(1)
    timed_out = fit_paper(gradients, SIZES, generator(), clock=lambda: float(next(ticks)), **options)
    assert timed_out is not None
    assert_same(timed_out, fitted(gradients, max_steps=steps))


def test_neither_the_scale_of_gradients_nor_those_that_are_zero_matter() -> None:
    gradients = low_rank(2)
    others = [[torch.zeros_like(one), one * 2.0**-40, two * 2.0**20] for one, two in gradients]
    assert_same(fitted(others, max_steps=5), fitted(gradients, max_steps=5))  # powers of two change no digit


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_there_is_nothing_to_learn_from_where_one_gradient_is_not_finite(bad: float) -> None:
    gradients = low_rank(2)
    gradients[1][1][3, 4] = bad
    assert fit_paper(gradients, SIZES, generator(), max_bias=0.0, timeout_s=FOREVER, max_steps=5) is None


@pytest.mark.parametrize("num", [0, 1, 2])
def test_there_is_nothing_to_learn_from_where_one_linear_has_zeros_alone(num: int) -> None:
    gradients = [low_rank(1)[0], [torch.zeros(SIZES[1].shape)] * num]
    assert fit_paper(gradients, SIZES, generator(), max_bias=0.0, timeout_s=FOREVER, max_steps=5) is None
