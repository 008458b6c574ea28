from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lsp_ray.config import RuntimeConfig
from lsp_ray.runtime.prepare.layout import plan_layout

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
