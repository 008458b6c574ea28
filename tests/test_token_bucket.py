"""Buckets on a clock that only sleeping and the test itself move."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lsp_ray.device.token_bucket import BURST_S, TokenBucket


class Clock:
    """Time that passes when told to; every sleep lasts `oversleep_s` too long."""

    def __init__(self, oversleep_s: float = 0.0) -> None:
        self.now_s = 100.0
        self.slept: list[float] = []
        self._oversleep_s = oversleep_s

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now_s += seconds + self._oversleep_s


def passed(bucket: TokenBucket, clock: Clock, amount: float, own_s: float = 0.0) -> float:
    """Let work pass that takes `own_s` by itself; returns how long it took in all."""
    start_s = clock.now_s
    clock.now_s += own_s
    bucket.take(amount, start_s=start_s)
    return clock.now_s - start_s


def test_work_takes_as_long_as_the_rate_says_whatever_part_of_it_was_real() -> None:
    for own_s in (0.0, 0.3, 0.5):
        clock = Clock()
        clock.now_s += 1.0
        bucket = TokenBucket(1000.0, clock=clock, sleep=clock.sleep)
        passed(bucket, clock, 500.0, own_s)
        assert passed(bucket, clock, 500.0, own_s) == pytest.approx(0.5)


def test_what_is_slower_by_itself_is_never_held_up() -> None:
    clock = Clock()
    bucket = TokenBucket(1000.0, clock=clock, sleep=clock.sleep)
    assert [passed(bucket, clock, 500.0, own_s=0.6) for _ in range(3)] == pytest.approx([0.6] * 3)
    assert clock.slept == []


def test_a_slow_copy_leaves_no_debt_that_a_fast_one_could_hurry_on() -> None:
    clock = Clock()
    bucket = TokenBucket(1000.0, clock=clock, sleep=clock.sleep)
    passed(bucket, clock, 500.0, own_s=5.0)
    assert passed(bucket, clock, 500.0) >= 0.5 - BURST_S


def test_sleeps_that_last_too_long_do_not_add_up() -> None:
    clock = Clock(oversleep_s=BURST_S / 2)
    bucket = TokenBucket(1000.0, clock=clock, sleep=clock.sleep)
    start_s = clock.now_s
    for _ in range(100):
        passed(bucket, clock, 10.0)
    assert clock.now_s - start_s == pytest.approx(1.0, abs=BURST_S)


@given(
    works=st.lists(
        st.tuples(st.floats(0.0, 0.1), st.floats(0.0, 1000.0), st.floats(0.0, 1.0)), min_size=1, max_size=20
    ),
    rate_per_s=st.floats(100.0, 1e6),
)
def test_no_stretch_of_work_passes_faster_than_the_rate_but_for_the_burst(
    works: list[tuple[float, float, float]], rate_per_s: float
) -> None:
    clock = Clock()
    bucket = TokenBucket(rate_per_s, clock=clock, sleep=clock.sleep)
    start_s, total = clock.now_s, 0.0
    for idle_s, amount, own_s in works:
        clock.now_s += idle_s
        passed(bucket, clock, amount, own_s)
        total += amount
    assert clock.now_s - start_s >= total / rate_per_s - BURST_S - 1e-9
