from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lsp_ray.config import RuntimeConfig
from lsp_ray.runtime.prepare.layout import EVEN_ENOUGH, parts_by_pace, plan_layout

SIZES = st.lists(st.integers(1, 1000), min_size=1, max_size=40)


def test_two_cores_without_a_gpu_give_one_thread_to_each_side() -> None:
    layout = plan_layout(RuntimeConfig(), [10, 10], cores=2, on_gpu=False)
    assert (layout.device_threads, layout.num_shards, layout.shard_threads) == (1, 1, 1)


def test_sixty_four_cores_beside_a_gpu_go_to_the_shards() -> None:
    layout = plan_layout(RuntimeConfig(), [10] * 32, cores=64, on_gpu=True)
    assert (layout.device_threads, layout.num_shards, layout.shard_threads) == (2, 2, 31)


def test_cores_of_a_cpu_run_are_mostly_the_devices_however_many_shards_there_are() -> None:
    for asked, expected in ((None, (12, 2, 2)), (4, (12, 4, 1)), (8, (8, 8, 1))):
        layout = plan_layout(RuntimeConfig(num_shards=asked), [10] * 32, cores=16, on_gpu=False)
        assert (layout.device_threads, layout.num_shards, layout.shard_threads) == expected


def test_one_core_still_runs_everything() -> None:
    layout = plan_layout(RuntimeConfig(), [10, 10], cores=1, on_gpu=False)
    assert (layout.device_threads, layout.num_shards, layout.shard_threads) == (1, 1, 1)


def test_nothing_sent_means_no_shards_and_all_cores_for_the_device() -> None:
    layout = plan_layout(RuntimeConfig(), [], cores=8, on_gpu=False)
    assert (layout.device_threads, layout.num_shards, layout.total_threads) == (8, 0, 8)


def test_what_was_asked_for_is_taken() -> None:
    asked = RuntimeConfig(num_shards=3, device_threads=5, shard_threads=2)
    layout = plan_layout(asked, [10] * 8, cores=4, on_gpu=True)
    assert (layout.device_threads, layout.num_shards, layout.shard_threads) == (5, 3, 2)


@given(sizes=SIZES, num_shards=st.integers(1, 50))
def test_every_unit_has_one_shard_and_no_shard_is_far_above_the_mean(sizes: list[int], num_shards: int) -> None:
    layout = plan_layout(RuntimeConfig(num_shards=num_shards), sizes, cores=8, on_gpu=True)
    assert layout.num_shards == min(num_shards, len(sizes))
    owned = [layout.units_of(index) for index in range(layout.num_shards)]
    assert sorted(unit for units in owned for unit in units) == list(range(len(sizes)))
    loads = [sum(sizes[unit] for unit in units) for units in owned]
    assert max(loads) <= sum(sizes) / layout.num_shards + max(sizes)  # Graham's bound of greedy balancing


@given(st.lists(st.floats(0.1, 10.0), min_size=1, max_size=4), st.integers(0, 5))
def test_parts_by_pace_are_over_as_early_as_any_division(part_s: list[float], num_more: int) -> None:
    num_parts = len(part_s) + num_more
    divided = parts_by_pace(num_parts, part_s)
    assert len(divided) == num_parts
    assert list(divided) == sorted(divided)
    assert set(divided) == set(range(len(part_s)))

    def slowest_s(counts: Sequence[int]) -> float:
        return max(count * own_s for count, own_s in zip(counts, part_s, strict=True))

    every = (counts for counts in product(range(1, num_parts + 1), repeat=len(part_s)) if sum(counts) == num_parts)
    best_s = min(slowest_s(counts) for counts in every)
    assert slowest_s([divided.count(gpu) for gpu in range(len(part_s))]) <= EVEN_ENOUGH * best_s


@pytest.mark.parametrize(
    ("part_s", "divided"),
    [
        ((1.0, 3.0), (0, 0, 0, 1)),
        ((3.0, 1.0), (0, 1, 1, 1)),
        ((1.0, 1.04), (0, 0, 1, 1)),
        ((1.0, 1.0, 1.0), (0, 0, 1, 2)),
        ((1.04, 1.0, 1.0), (0, 0, 1, 2)),  # two parts there or elsewhere: not worth leaving the even division
    ],
)
def test_a_fast_gpu_computes_more_parts_and_like_ones_divide_them_evenly(
    part_s: tuple[float, ...], divided: tuple[int, ...]
) -> None:
    assert parts_by_pace(4, part_s) == divided
