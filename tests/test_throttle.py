"""Throttles: proportions of the paper's machines, values that stay as they are, and parts slower by themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lsp_ray.device.backend import CpuBackend
from lsp_ray.device.compute_time import compute_seconds
from lsp_ray.hardware import BACKWARD_SHARE, MACHINES, EmulatedMachine
from lsp_ray.models.layers import find_layers
from lsp_ray.models.load import load_model
from lsp_ray.runtime.actors.thread_workers import ThreadWorkers
from lsp_ray.runtime.actors.throttle import Throttle, emulating, slower_by_themselves
from lsp_ray.schedule.ops import LayerSeconds
from lsp_ray.schedule.policy import Sequential
from lsp_ray.trace import WorkStream
from tests.timeline import Timeline
from tests.tiny import assert_same_weights
from tests.tiny_jobs import run_on_threads, saved_weights, tiny_job

NUMEL = 3_200_000


def zero_offloads_seconds(machine: EmulatedMachine, *, compute_s: float, num_layers: int) -> tuple[float, float]:
    """Seconds a step of Zero-Offload's order on an emulated machine, and those in which the CPU updates."""
    throttle = emulating(MACHINES[machine], compute_s=compute_s, full_numel=NUMEL)
    assert throttle.link_gbps is not None
    assert throttle.updates_per_s is not None
    numel = NUMEL / num_layers
    copy_s = 2 * numel / (throttle.link_gbps * 1e9)
    layer = LayerSeconds(
        forward_s=(1 - BACKWARD_SHARE) * compute_s / num_layers,
        backward_s=BACKWARD_SHARE * compute_s / num_layers,
        d2h_s=copy_s,
        cpu_s=numel / throttle.updates_per_s,
        h2d_s=copy_s,
    )
    shards = [0] * num_layers
    line = Timeline(policy=Sequential(shards), shard_of_layer=shards, layers=[layer] * num_layers, num_steps=2)
    line.run()
    update_s = NUMEL / throttle.updates_per_s
    first_step_up_s = max(one.end_s for one in line.ran if one.op.step == 0)
    return first_step_up_s, update_s


def test_the_laptops_communication_is_exposed_as_much_as_the_paper_says() -> None:
    step_s, update_s = zero_offloads_seconds("a1000-laptop", compute_s=2.0, num_layers=100)
    assert update_s == pytest.approx(0.63 * 2.0)
    assert (step_s - update_s - 2.0) / 2.0 == pytest.approx(2.09, rel=0.02)


def test_the_workstations_traffic_and_update_are_the_papers_and_so_is_its_slowdown() -> None:
    throttle = emulating(MACHINES["rtx4090-threadripper"], compute_s=1.29, full_numel=NUMEL)
    assert throttle.link_gbps is not None
    assert throttle.updates_per_s is not None
    assert 1.4 < 2 * 2 * NUMEL / (throttle.link_gbps * 1e9) < 2.8
    assert NUMEL / throttle.updates_per_s == pytest.approx(1.92)
    step_s, _ = zero_offloads_seconds("rtx4090-threadripper", compute_s=1.29, num_layers=32)
    assert 1.93 <= step_s / 1.29 <= 4.28


def test_shards_share_the_cpu_and_each_direction_has_a_bucket_of_its_own() -> None:
    throttle = Throttle(link_gbps=1.0, updates_per_s=600.0)
    link = throttle.link()
    assert set(link) == {WorkStream.D2H, WorkStream.H2D}
    assert link[WorkStream.D2H] is not link[WorkStream.H2D]
    assert throttle.shard(3) is not None
    assert Throttle().link() == {}
    assert Throttle().shard(3) is None


def test_what_is_slower_by_itself_is_named_and_the_rest_is_not() -> None:
    layer = LayerSeconds(forward_s=1.0, backward_s=1.0, d2h_s=1.0, cpu_s=3.0, h2d_s=2.0)
    throttle = Throttle(link_gbps=2e-9 * 50, updates_per_s=50.0)  # a copy of 50 elements is due in 1 s, an update too
    lines = list(slower_by_themselves(throttle, [layer, layer], numel=100, num_bytes=200, num_shards=1))
    assert lines == [
        "throttle: the way up takes 4 s a step by itself, more than the 2 s asked for",
        "throttle: updating takes 6 s a step by itself, more than the 2 s asked for",
    ]
    assert not list(slower_by_themselves(Throttle(), [layer, layer], numel=100, num_bytes=200, num_shards=1))


@pytest.mark.parametrize("method", ["lsp", "zero_offload"])
def test_neither_a_slow_link_nor_an_emulated_machine_changes_a_bit(tmp_path: Path, method: str) -> None:
    plain = tiny_job(tmp_path, method=method)
    run_on_threads(plain, tmp_path / "plain")
    expected = saved_weights(plain, tmp_path / "plain")
    for name, runtime in (("link", {"link_gbps": 0.1}), ("laptop", {"emulate": "a1000-laptop"})):
        job = tiny_job(tmp_path, method=method, runtime=runtime)
        run_on_threads(job, tmp_path / name)
        for key, tensor in saved_weights(job, tmp_path / name).items():
            assert torch.equal(tensor, expected[key]), (name, key)


def test_copies_take_as_long_as_the_link_allows_and_the_metrics_hold_it(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, method="zero_offload", max_steps=3, runtime={"link_gbps": 0.01})
    _, listener = run_on_threads(job, tmp_path / "out")
    size_bytes = 2 * sum(job.payload_sizes)
    for metrics in listener.steps[1:]:  # the first step's window holds no way up
        assert metrics.h2d_busy_s >= 0.8 * size_bytes / 0.01e9
        assert metrics.bytes_h2d == size_bytes


def test_an_emulated_machine_is_scaled_to_the_models_own_compute_whatever_the_method(tmp_path: Path) -> None:
    for method in ("lsp", "zero_offload"):
        job = tiny_job(tmp_path, method=method, runtime={"emulate": "rtx4090-threadripper"})
        workers = ThreadWorkers(job)
        throttle = workers.setup(lambda _text: None).throttle
        workers.close()
        assert throttle.compute_s is not None
        full_numel = sum(tiny_job(tmp_path, method="zero_offload").payload_sizes)
        machine = MACHINES["rtx4090-threadripper"]
        assert throttle == emulating(machine, compute_s=throttle.compute_s, full_numel=full_numel)


def test_native_has_nothing_to_emulate_and_says_nothing_of_it(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, method="native", runtime={"emulate": "a1000-laptop"})
    _, listener = run_on_threads(job, tmp_path / "out")
    assert not [note for note in listener.notes if "emulating" in note]


def test_compute_is_the_median_without_the_first_update_and_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    job = tiny_job(tmp_path)
    models = [load_model(job.model_folder, dtype=torch.float32, task="causal_lm").train() for _ in range(2)]
    find_layers(models[0])
    readings = iter([0.0, 90.0, 100.0, 101.0, 200.0, 205.0, 300.0, 303.0])
    updates = [[batch, batch] for batch in job.micro_batches.calibration(4)]
    assert compute_seconds(models[0], updates, CpuBackend(), clock=lambda: next(readings)) == 3.0
    assert_same_weights(*models)
    assert all(parameter.grad is None for parameter in models[0].parameters())
