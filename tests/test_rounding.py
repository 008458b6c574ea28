"""Adding a delta: exact for float32; for bfloat16 one of the two neighbours, right on average, reproducible."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lsp_ray.device.addition import Addition
from lsp_ray.device.kernels import Adder
from lsp_ray.device.noise import NOISE_ELEMENTS
from lsp_ray.device.rounding import Rounding, mixed

CPU = torch.device("cpu")
ROUNDING = Rounding(seed=7, device=CPU)
LAST_BIT = 2.0**-7  # of a bfloat16 in [1, 2)
STANDARD_ERRORS = 5


@pytest.fixture(scope="module")
def rounding() -> Rounding:
    return ROUNDING


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def added(
    rounding: Rounding, weight: torch.Tensor, delta: torch.Tensor, *, keep: float = 1.0, step: int = 3, key: int = 5
) -> torch.Tensor:
    copy, noise = weight.clone(), rounding.of_step(step)
    Adder().add_([Addition(copy)], delta.view(-1), noise, first_key=key, learning_rate=1.0 - keep, weight_decay=1.0)
    return copy


def neighbours(exact: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The bfloat16 numbers next to a float32 number, towards zero and away from it."""
    bits = exact.view(torch.int32)
    towards = (bits & -(1 << 16)).view(torch.float32)
    away = torch.where(towards == exact, towards, ((bits & -(1 << 16)) + (1 << 16)).view(torch.float32))
    return towards.bfloat16(), away.bfloat16()


def test_a_float32_weight_gets_the_exact_sum(rounding: Rounding) -> None:
    weight, delta = normal(33, 17), normal(33, 17, seed=1) * 1e-4
    assert torch.equal(added(rounding, weight, delta), weight + delta)


def test_a_float32_weight_decays_before_the_delta_is_added(rounding: Rounding) -> None:
    weight, delta = normal(33, 17), normal(33, 17, seed=1) * 1e-4
    assert torch.equal(added(rounding, weight, delta, keep=0.75), weight * 0.75 + delta)


@pytest.mark.parametrize("keep", [1.0, 0.999, 0.5])
@pytest.mark.parametrize("delta_size", [1e-6, 1e-3, 1.0])
def test_a_bfloat16_weight_becomes_one_of_the_two_neighbours_of_the_exact_sum(
    rounding: Rounding, keep: float, delta_size: float
) -> None:
    weight, delta = normal(4096).bfloat16(), normal(4096, seed=1) * delta_size
    towards, away = neighbours(weight.float() * keep + delta)
    rounded = added(rounding, weight, delta, keep=keep)
    assert ((rounded == towards) | (rounded == away)).all()
    assert 0 < int((rounded == towards).sum()) < 4096


def test_a_sum_that_bfloat16_can_hold_is_exact(rounding: Rounding) -> None:
    weight = normal(1024).bfloat16()
    assert torch.equal(added(rounding, weight, torch.zeros(1024)), weight)
    assert torch.equal(added(rounding, weight, weight.float()), weight * 2)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("share", [0.03, 0.3, 0.9])
def test_rounding_is_right_on_average_over_elements(rounding: Rounding, sign: float, share: float) -> None:
    num = 1 << 18
    rounded = added(rounding, torch.full((num,), sign).bfloat16(), torch.full((num,), sign * share * LAST_BIT))
    mean_bits = float((rounded.double() - sign).mean()) / LAST_BIT
    # an element is a coin that shows 1 with probability `share`
    standard_error = (share * (1 - share) / num) ** 0.5
    assert abs(mean_bits - sign * share) < STANDARD_ERRORS * standard_error


def test_rounding_is_right_on_average_over_steps(rounding: Rounding) -> None:
    num_steps, share = 2000, 0.3
    weight, delta = torch.ones(1).bfloat16(), torch.full((1,), share * LAST_BIT)
    ups = sum(float(added(rounding, weight, delta, step=step)) > 1.0 for step in range(num_steps))
    standard_error = (share * (1 - share) / num_steps) ** 0.5
    assert abs(ups / num_steps - share) < STANDARD_ERRORS * standard_error


def test_small_deltas_add_up_where_a_plain_add_loses_them_all(rounding: Rounding) -> None:
    num_steps, num, share = 100, 1024, 0.1
    delta = torch.full((num,), share * LAST_BIT)
    plain, weight = torch.ones(num).bfloat16(), torch.ones(num).bfloat16()
    for step in range(num_steps):
        plain += delta.bfloat16()
        weight = added(rounding, weight, delta, step=step, key=0)
    assert torch.equal(plain, torch.ones(num).bfloat16())
    grown_bits = float((weight.double() - 1.0).mean()) / LAST_BIT
    standard_error = (num_steps * share * (1 - share) / num) ** 0.5
    assert abs(grown_bits - num_steps * share) < STANDARD_ERRORS * standard_error


def test_the_same_seed_step_key_and_position_give_the_same_bits_in_any_order(rounding: Rounding) -> None:
    weight, delta = normal(512).bfloat16(), normal(512, seed=1) * 1e-3
    here = [added(rounding, weight, delta, step=step, key=key) for step, key in ((1, 2), (4, 0))]
    fresh = Rounding(seed=7, device=CPU)
    there = [added(fresh, weight, delta, step=step, key=key) for step, key in ((4, 0), (1, 2))]
    assert torch.equal(here[0], there[1])
    assert torch.equal(here[1], there[0])


def test_another_seed_step_or_key_gives_other_bits(rounding: Rounding) -> None:
    weight, delta = normal(512).bfloat16(), normal(512, seed=1) * 1e-3
    rounded = [
        added(rounding, weight, delta, step=1, key=2),
        added(rounding, weight, delta, step=2, key=1),
        added(rounding, weight, delta, step=1, key=3),
        added(Rounding(seed=8, device=CPU), weight, delta, step=1, key=2),
    ]
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(rounded, 2))


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_weight_that_is_not_finite_is_not_hidden(rounding: Rounding, value: float) -> None:
    weight = torch.full((64,), value).bfloat16()
    torch.testing.assert_close(added(rounding, weight, normal(64)), weight, equal_nan=True, rtol=0, atol=0)


NUMBERS = st.integers(0, 2**70)


@given(step=NUMBERS, key=NUMBERS, first_key=NUMBERS)
def test_a_targets_noise_is_the_same_however_its_key_is_counted(step: int, key: int, first_key: int) -> None:
    noise = ROUNDING.of_step(step)
    assert (
        noise.of(first_key + key).start
        == noise.after(first_key).of(key).start
        == mixed(7, step, first_key + key) % NOISE_ELEMENTS
    )


@given(numbers=st.lists(NUMBERS, min_size=1, max_size=4))
def test_a_mixed_seed_fits_in_63_bits(numbers: list[int]) -> None:
    assert 0 <= mixed(*numbers) < 2**63
    assert mixed(*numbers) == mixed(*numbers)


def test_a_mixed_seed_depends_on_every_number_and_on_their_order() -> None:
    triples = list(itertools.product(range(8), repeat=3))
    assert len({mixed(*triple) for triple in triples}) == len(triples)
