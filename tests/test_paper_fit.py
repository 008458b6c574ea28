"""The paper's fit by Adam: what it lowers, when it ends, and when it declines.

Legend: M rows (out), N columns (in), D subspace, R non-zeros a row, K rank of a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

import pytest
import torch

from lsp_ray.projection.paper_fit import fit_paper
from lsp_ray.projection.sparse_projector import SparseProjector

M, N, D, R = 48, 40, 16, 4
FOREVER = float("inf")


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def low_rank(num: int, rank: int = 2) -> list[torch.Tensor]:
    """Gradients that share a column space and a row space of `rank` dimensions."""
    left_MK, right_KN = normal(M, rank, seed=1), normal(rank, N, seed=2)
    return [left_MK @ normal(rank, rank, seed=10 + index) @ right_KN for index in range(num)]


def start(seed: int = 0) -> SparseProjector:
    return SparseProjector.random((M, N), D, R, torch.Generator().manual_seed(seed))


def fitted(
    gradients: Sequence[torch.Tensor], *, max_bias: float = 0.0, max_steps: int = 60, norm_weight: float = 1e-4
) -> SparseProjector:
    generator = torch.Generator().manual_seed(0)
    projector = fit_paper(
        gradients,
        D,
        R,
        generator,
        max_bias=max_bias,
        timeout_s=FOREVER,
        max_steps=max_steps,
        norm_weight=norm_weight,
    )
    assert projector is not None
    return projector


def raw_bias(projector: SparseProjector, gradients: Sequence[torch.Tensor]) -> float:
    """The mean of ‖P Pᵀ G Q Qᵀ − G‖ / ‖G‖, formed as it is written and in float64."""
    left_MD, right_ND = projector.left.dense().double(), projector.right.dense().double()
    biases = []
    for grad_MN in (gradient.double() for gradient in gradients):
        estimate_MN = left_MD @ left_MD.t() @ grad_MN @ right_ND @ right_ND.t()
        biases.append(float((estimate_MN - grad_MN).norm() / grad_MN.norm()))
    return sum(biases) / len(biases)


def values(projector: SparseProjector) -> tuple[torch.Tensor, torch.Tensor]:
    return projector.left.dense(), projector.right.dense()


def test_sixty_steps_bring_the_bias_of_low_rank_gradients_far_below_the_start() -> None:
    gradients = low_rank(3)
    assert raw_bias(fitted(gradients), gradients) < 0.2 * raw_bias(start(), gradients)


def test_it_starts_where_the_generator_puts_a_random_projector() -> None:
    unmoved, drawn = fitted(low_rank(1), max_steps=0), start()
    assert all(map(torch.equal, values(unmoved), values(drawn)))


def test_positions_stay_and_only_values_move() -> None:
    moved, drawn = fitted(low_rank(1), max_steps=5), start()
    assert torch.equal(moved.left.index_FR, drawn.left.index_FR)
    assert torch.equal(moved.right.index_FR, drawn.right.index_FR)
    assert not any(map(torch.equal, values(moved), values(drawn)))


def test_it_ends_at_the_first_step_whose_bias_is_at_most_the_bound() -> None:
    gradients = low_rank(2)
    by_step = [raw_bias(fitted(gradients, max_steps=steps), gradients) for steps in range(20)]
    bound = 0.5
    first = next(step for step, bias in enumerate(by_step) if bias <= bound)
    assert first > 1
    ended = fitted(gradients, max_bias=bound)
    assert raw_bias(ended, gradients) <= bound
    assert all(map(torch.equal, values(ended), values(fitted(gradients, max_steps=first))))


@pytest.mark.parametrize(("timeout_s", "steps"), [(0.0, 0), (2.5, 2), (5.0, 4)])
def test_no_step_is_begun_after_the_timeout(timeout_s: float, steps: int) -> None:
    ticks = count()  # one second passes between two readings; the first sets the deadline
    gradients = low_rank(1)
    timed_out = fit_paper(
        gradients,
        D,
        R,
        torch.Generator().manual_seed(0),
        max_bias=0.0,
        timeout_s=timeout_s,
        max_steps=100,
        clock=lambda: float(next(ticks)),
    )
    assert timed_out is not None
    assert all(map(torch.equal, values(timed_out), values(fitted(gradients, max_steps=steps))))


def test_a_larger_weight_of_the_norms_makes_smaller_projectors() -> None:
    gradients = low_rank(1)
    light, heavy = (fitted(gradients, norm_weight=weight) for weight in (0.0, 0.1))
    assert heavy.left.square_sum() < 0.8 * light.left.square_sum()
    assert heavy.right.square_sum() < 0.8 * light.right.square_sum()


def test_the_scale_of_the_gradients_does_not_matter() -> None:
    gradients = low_rank(2)
    tiny = [gradients[0] * 2.0**-40, gradients[1] * 2.0**20]
    for plain, scaled in zip(values(fitted(gradients)), values(fitted(tiny)), strict=True):
        assert torch.equal(plain, scaled)  # powers of two change no digit


def test_the_projector_carries_no_graph() -> None:
    projector = fitted(low_rank(1), max_steps=2)
    assert not projector.left.value_FR.requires_grad
    assert not projector.right.value_FR.requires_grad


def test_a_gradient_of_zeros_among_others_teaches_nothing() -> None:
    gradients = low_rank(1)
    with_zeros = fitted([torch.zeros(M, N), *gradients], max_steps=5)
    assert all(map(torch.equal, values(with_zeros), values(fitted(gradients, max_steps=5))))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_there_is_nothing_to_learn_from_where_one_gradient_is_not_finite(bad: float) -> None:
    gradients = low_rank(2)
    gradients[1][3, 4] = bad
    assert declined(gradients)


@pytest.mark.parametrize("num", [0, 1, 2])
def test_there_is_nothing_to_learn_from_zeros(num: int) -> None:
    assert declined([torch.zeros(M, N)] * num)


def declined(gradients: Sequence[torch.Tensor]) -> bool:
    generator = torch.Generator().manual_seed(0)
    return fit_paper(gradients, D, R, generator, max_bias=0.0, timeout_s=FOREVER, max_steps=5) is None
