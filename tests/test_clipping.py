from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from lsp_ray.config import GaloreConfig
from lsp_ray.device.judge import Judge
from lsp_ray.device.unit import Unit
from lsp_ray.methods.lsp import lsp_units
from lsp_ray.methods.units import full_units
from lsp_ray.models.layers import find_layers
from lsp_ray.models.loss import num_targets, summed_loss
from lsp_ray.runtime.drive.event_log import read_event_log
from tests.loopback import Loopback
from tests.test_worker import LEARNING_RATES, LSP, batch, distance, square_llama
from tests.tiny_jobs import run_on_threads, saved_weights, tiny_job

STEPS = 12
MAX_NORM = 0.57  # between the norms of these steps: some are clipped, some are not
REFITS: dict[str, Any] = {"check_every": 6, "max_bias": 0.0, "calibration_batches": 2}


def trained_by_torch(steps: int, max_norm: float) -> nn.Module:
    model = square_llama()
    find_layers(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1.0, weight_decay=0.0)
    for step in range(steps):
        optimizer.zero_grad()
        (summed_loss(model, batch(step)) / num_targets(batch(step))).backward()
        clip_grad_norm_(trained, max_norm)
        optimizer.param_groups[0]["lr"] = LEARNING_RATES[step]
        optimizer.step()
    return model


def clipping(units: list[Unit]) -> Judge:
    return Judge(units, max_grad_norm=MAX_NORM)


@pytest.mark.parametrize("native", [True, False])
def test_clipped_steps_equal_torchs_clip_and_adamw(native: bool) -> None:
    model = square_llama()
    units = full_units(find_layers(model))
    run = Loopback(model, units, learning_rates=LEARNING_RATES, native=native, judge=clipping(units))
    reports = [run.step(step, [batch(step)]) for step in range(STEPS)]
    run.worker.flush()
    assert 0 < sum(report.grad_scale < 1.0 for report in reports) < STEPS
    reference = trained_by_torch(STEPS, MAX_NORM)
    assert distance(trained_by_torch(STEPS, 1e9), reference) > 1e-3
    assert distance(model, reference) <= 1e-6


def test_compressed_gradients_are_clipped_as_torch_clips_them() -> None:
    model = square_llama()
    units, _ = lsp_units(find_layers(model), LSP, seed=0)
    run = Loopback(model, units, learning_rates=LEARNING_RATES, judge=Judge(units, max_grad_norm=0.05))
    payloads = [nn.Parameter(torch.zeros(unit.numel)) for unit in units]
    optimizer = torch.optim.AdamW(payloads, lr=1.0, weight_decay=0.0)
    for step in range(STEPS):
        report = run.step(step, [batch(step), batch(step + 50)])
        before = [payload.detach().clone() for payload in payloads]
        for unit, payload in zip(units, payloads, strict=True):
            payload.grad = run.gradients[unit.index].clone()
        norm = clip_grad_norm_(payloads, 0.05)
        optimizer.param_groups[0]["lr"] = LEARNING_RATES[step]
        optimizer.step()
        assert report.grad_norm == pytest.approx(float(norm), rel=1e-6)
        assert report.grad_scale < 1.0
        for unit, payload, old in zip(units, payloads, before, strict=True):
            # the reference's own sum rounds at its size, the delta does not
            torch.testing.assert_close(run.deltas[unit.index], payload.detach() - old, rtol=1e-4, atol=1e-6)


def weights(folder: Path, name: str, **changes: Any) -> dict[str, torch.Tensor]:
    job = tiny_job(folder, **changes)
    run_on_threads(job, folder / name)
    return saved_weights(job, folder / name)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_bits(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("method", ["lsp", "zero_offload", "native", "lora", "galore"])
def test_a_bound_that_nothing_reaches_changes_no_bit(tmp_path: Path, method: str) -> None:
    changes: dict[str, Any] = {"method": method, "max_steps": 4, "galore": GaloreConfig(rank=8)}
    off = weights(tmp_path, "off", **changes)
    assert_same_bits(off, weights(tmp_path, "on", max_grad_norm=1e6, **changes))
    assert [line["grad_scale"] for line in lines(tmp_path / "on")] == [1.0] * 4


def test_updates_that_are_made_again_end_with_the_bits_of_native_that_knows_before(tmp_path: Path) -> None:
    native = weights(tmp_path, "native", method="native", weight_decay=0.1, max_grad_norm=0.5)
    changes: dict[str, Any] = {"method": "zero_offload", "weight_decay": 0.1, "max_grad_norm": 0.5}
    for shards, policy in ((1, "layerwise"), (2, "earliest_deadline"), (2, "sequential")):
        runtime = {"policy": policy, "num_shards": shards, "payload_dtype": "float32"}
        assert_same_bits(native, weights(tmp_path, policy, runtime=runtime, **changes))
    scales = [line["grad_scale"] for line in lines(tmp_path / "layerwise")]
    assert all(0.0 < scale < 1.0 for scale in scales)
    assert json.loads((tmp_path / "layerwise" / "summary.json").read_text())["num_clipped"] == len(scales)


def test_clipping_amid_takeovers_depends_neither_on_shards_nor_on_the_policy(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"max_grad_norm": 0.05, "max_steps": 12, "lsp": REFITS}
    coarse = {"payload_dtype": "int8"}
    base = weights(tmp_path, "one", runtime=coarse, **changes)
    for shards, policy in ((3, "layerwise_fcfs"), (2, "sequential")):
        runtime = {"policy": policy, "num_shards": shards, **coarse}
        assert_same_bits(base, weights(tmp_path, policy, runtime=runtime, **changes))
    assert lines(tmp_path / "one")[-1]["grad_scale"] < 1.0
    assert any(line["num_refitted"] for line in lines(tmp_path / "one"))
    replayed, decisions = read_event_log(tmp_path / "layerwise_fcfs" / "internals" / "events.jsonl")
    assert all(replayed.handle(decision.event) == decision.actions for decision in decisions)


def test_a_step_that_is_clipped_under_a_stale_policy_is_clipped_once(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"max_grad_norm": 0.05, "method": "zero_offload"}
    base = weights(tmp_path, "one", runtime={"policy": "delayed"}, **changes)
    assert_same_bits(base, weights(tmp_path, "two", runtime={"policy": "delayed", "num_shards": 2}, **changes))
