"""scripts/bench_scaling.py and scripts/streamed_weights.py: what they make of what they measured, and that they run."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lsp_ray.hardware import BACKWARD_SHARE
from lsp_ray.runtime.transport.slots import OpenSlots, new_slot
from lsp_ray.schedule.ops import LayerSeconds
from lsp_ray.trace_file import Trace, TracedSpan
from scripts import bench_scaling, streamed_weights
from scripts.bench_scaling import SETTINGS, Found, Setting, _efficiency, _error
from scripts.live_session import Block
from scripts.paced_gpu import STEP_S, LongPacedGpu
from tests.tiny_jobs import deepen, tiny_config, tiny_job

NUM_LAYERS = 32


def test_the_benchmark_has_help_and_at_least_eight_settings_that_differ(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        bench_scaling.main(["--help"])
    assert "--quick" in capsys.readouterr().out
    assert len(set(SETTINGS)) == len(SETTINGS) >= 8


def test_a_paced_step_is_as_long_as_asked_and_its_backward_as_the_papers(tmp_path: Path) -> None:
    job = tiny_job(tmp_path)
    opened = OpenSlots(down={0: new_slot(1, "down")}, up=new_slot(1, "up"))
    unit: Any = SimpleNamespace(state=None, open=lambda: opened)
    gpu = LongPacedGpu(job, [unit] * NUM_LAYERS)
    assert NUM_LAYERS * (gpu._forward_s + gpu._backward_s) == pytest.approx(STEP_S)
    assert NUM_LAYERS * gpu._backward_s == pytest.approx(BACKWARD_SHARE * STEP_S)


def found(step_s: float, wait_s: float, network_s: float) -> Found:
    """Of 1 Gbit/s, over which the payloads of one GPU take so long one way; layers compute a second together."""
    layer = LayerSeconds(forward_s=0.25 / NUM_LAYERS, backward_s=0.75 / NUM_LAYERS, d2h_s=1e-6, cpu_s=1e-6, h2d_s=1e-6)
    free = Block(step_times_s=(1.0,), waits_s=(0.0,), layers=(layer,) * NUM_LAYERS)
    measured = Block(step_times_s=(9.0, step_s, step_s), waits_s=(wait_s, wait_s, 9.0), layers=free.layers)
    numel = round(network_s * 125e6 / 2 / NUM_LAYERS)  # in bfloat16
    return Found(block=measured, free=free, sizes=(numel,) * NUM_LAYERS)


def test_efficiency_is_the_part_of_a_median_step_that_is_not_waited_and_of_the_simulator_its_error() -> None:
    setting = Setting(payload_mb=1, gbit=1)
    assert _efficiency([found(1.25, 0.125, 0.1)]) == 0.9
    assert _error(setting, [found(1.25, 0.0, 0.01)]) == pytest.approx(1.0 / 1.25 - 1.0, abs=0.03)
    # one of both GPUs is on another machine: no step is shorter than its payloads' way
    assert 0.0 <= _error(setting, [found(4.0, 0.0, 4.0)]) <= 0.25
    assert _error(Setting(payload_mb=1, gbit=100), [found(1.0, 0.0, 4.0)]) == pytest.approx(0.08, abs=0.08)


def test_what_layers_took_is_read_off_the_trace_without_waits_for_weights_and_the_first_steps() -> None:
    def span(category: str, step: int, start_s: float, end_s: float, cause: str | None = None) -> TracedSpan:
        return TracedSpan(
            row="",
            category=category,
            step=step,
            layer=0,
            cause=cause,
            start_s=10 * step + start_s,
            end_s=10 * step + end_s,
        )

    spans = [span("forward", 0, 0.0, 9.0), span("forward", 1, 0.0, 9.0)]
    for step in (2, 3):
        spans += [
            span("forward", step, 0.0, 1.0),
            span("wait", step, 0.5, 0.75, "weights"),
            span("wait", step, 0.0, 0.125, "h2d"),  # is not in the layer's own time
            span("backward", step, 1.0, 3.0),
            span("backward", step, 3.0, 4.0),  # of the second micro-batch
            span("weights", step, 0.0, 0.5),
        ]
    trace = Trace(
        rows=(),
        steps={step: (10.0 * step, 10.0 * step + 9.0) for step in range(4)},
        spans=tuple(spans),
        is_complete=True,
    )
    costs = streamed_weights.costs_of(trace, 1, 2, streams=True)
    [layer] = costs.layers
    assert (layer.forward_s, layer.backward_s, layer.weights_s) == (0.75 / 2, 3.0 / 2, 0.5)
    assert (layer.d2h_s, costs.num_buffers, costs.num_micro_batches) == (0.0, 2, 2)


def test_weights_that_come_up_wait_as_simulated_and_lose_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    deepen(tmp_path, "llama", 4)
    config = tiny_config(tmp_path)
    options = {"model": config.model_name_or_path, "dataset": config.dataset, "subspace_dim": 16, "steps": 4}
    words = [
        word
        for name, value in {**options, "tokens": 32, "bits": 16, "link_gbps": 0.002}.items()
        for word in (f"--{name}", str(value))
    ]
    capsys.readouterr()
    streamed_weights.main(words)
    device, host = map(json.loads, capsys.readouterr().out.splitlines())
    assert (device["weights"], host["weights"], host["same_losses"]) == ("device", "host", True)
    assert device["exposed_weights"] == device["simulated_exposed_weights"] == device["streamed_MB"] == 0
    assert host["peak_device_MB"] < device["peak_device_MB"]
    assert host["exposed_weights"] > 0.1
    assert host["simulated_exposed_weights"] > 0.1
