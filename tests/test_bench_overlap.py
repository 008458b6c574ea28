"""What bench_overlap predicts, that it predicts enough, and that blocks of one session are steps of one run."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby
from pathlib import Path

import pytest
import torch

from lsp_ray.hardware import BACKWARD_SHARE, MACHINES
from lsp_ray.runtime.actors.thread_workers import ThreadWorkers
from lsp_ray.runtime.actors.throttle import Throttle, emulating
from lsp_ray.schedule.ops import LayerSeconds
from scripts.bench_overlap import Found, figures_of
from scripts.live_session import Block, LiveSession
from scripts.overlap_prediction import predicted_step_s
from scripts.overlap_settings import COMPARED, EMULATED_ZERO, PAPER_MACHINE, PREDICTED, PREDICTED_QUICK, ZERO
from tests.tiny_jobs import run_on_threads, saved_weights, tiny_job

NUM_LAYERS = 32


def free(compute_s: float) -> Block:
    """Zero-Offload without a throttle, on parts that take no time."""
    layer = LayerSeconds(
        forward_s=(1 - BACKWARD_SHARE) * compute_s / NUM_LAYERS,
        backward_s=BACKWARD_SHARE * compute_s / NUM_LAYERS,
        d2h_s=0.0,
        cpu_s=0.0,
        h2d_s=0.0,
    )
    return Block(step_times_s=(compute_s,), waits_s=(0.0,), layers=(layer,) * NUM_LAYERS)


def test_an_emulated_machine_is_simulated_with_the_proportions_to_what_it_was_scaled_to() -> None:
    sizes = [1000] * NUM_LAYERS

    def step_s(compute_s: float) -> float:
        throttle = emulating(MACHINES[PAPER_MACHINE], compute_s=compute_s, full_numel=32_000)
        return predicted_step_s(EMULATED_ZERO, free(1.29), sizes, throttle)

    half_s, whole_s = step_s(0.645), step_s(1.29)
    assert 1.93 <= whole_s / 1.29 <= 4.28
    # all of the updates (1.92 s) and of the way up (1.05 s) are exposed, and grow with what they are scaled to
    assert whole_s - half_s > (1.92 + 1.05) / 2
    assert predicted_step_s(ZERO, free(1.29), sizes, Throttle()) == pytest.approx(1.29, rel=0.1)


def test_at_least_ten_settings_are_predicted_over_policies_links_and_subspaces() -> None:
    assert set(PREDICTED_QUICK) < set(PREDICTED)
    assert len(set(PREDICTED)) >= 10
    for field in ("policy", "link_gbps", "dim", "method"):
        assert len({getattr(setting, field) for setting in PREDICTED}) > 1
    assert all(setting.free != setting for setting in PREDICTED)
    free = [key for key, _ in groupby(PREDICTED, key=lambda setting: setting.free)]
    assert len(free) == len(set(free))


def test_a_setting_is_compared_with_one_of_the_same_round() -> None:
    found = Found()
    for drift in (1.0, 3.0, 2.0):
        for setting in {*COMPARED, *PREDICTED}:
            step_s = drift * (0.5 if setting.method == "lsp" else 1.0)
            found.blocks[setting].append(replace(free(1.0), step_times_s=(step_s,) * 3, waits_s=(0.01 * step_s,) * 3))
    found.planned_s[ZERO] = 1.5
    figures = figures_of(found, {})
    assert (figures["lsp_over_native"], figures["ray_over_threads"]) == (0.5, 1.0)
    assert figures["exposed_fraction"] == pytest.approx(0.01)
    assert figures["plan_error"] == {ZERO.name: -0.25}


def test_blocks_in_any_order_and_behind_any_throttle_are_the_steps_of_one_run(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, max_steps=5, lsp={"fit": "random"})
    run_on_threads(job, tmp_path / "straight")
    session = LiveSession(job, ThreadWorkers)
    try:
        slow = session.run("sequential", Throttle(link_gbps=1e-3), 1)
        fast = session.run("layerwise", Throttle(), 2)
        (tmp_path / "blocks").mkdir()
        session.save(tmp_path / "blocks")
    finally:
        session.close()
    assert (len(slow.step_times_s), len(fast.step_times_s)) == (1, 2)
    num_bytes = 2 * max(job.payload_sizes)
    assert max(layer.d2h_s for layer in slow.layers) > num_bytes / 1e6 / 2 > max(layer.d2h_s for layer in fast.layers)
    straight, blocks = (saved_weights(job, tmp_path / name) for name in ("straight", "blocks"))
    assert all(torch.equal(straight[name], blocks[name]) for name in straight)
