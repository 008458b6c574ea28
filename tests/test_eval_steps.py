"""Eval loss while training: what a checkpoint of that moment would show, in time that no step counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerState

from lsp_ray.device.evaluate import mean_loss
from lsp_ray.device.step_report import StepReport
from lsp_ray.models.load import load_model
from lsp_ray.runtime.drive.ledger import Ledger, OpReport
from lsp_ray.trace import Cause, Span, WorkStream
from tests.tiny_jobs import run_on_threads, tiny_job


@pytest.mark.parametrize("policy", ["layerwise", "delayed"])
def test_the_eval_loss_after_a_step_is_that_of_its_checkpoint(tmp_path: Path, policy: str) -> None:
    job = tiny_job(tmp_path, save_steps=4, eval_steps=2, runtime={"policy": policy})
    summary, listener = run_on_threads(job, tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["eval_loss"] for line in lines}
    assert [step for step, loss in losses.items() if loss is not None] == [
        2,
        4,
    ]
    assert [metrics.step for metrics in listener.steps] == [1, 2, 3, 4, 5, 6]
    assert summary.eval_loss_after < losses[4] < losses[2] < summary.eval_loss_before
    saved = tmp_path / "out" / "checkpoint-4"
    model = load_model(saved, dtype=job.dtype, task=job.task)
    assert mean_loss(model, job.micro_batches.eval_batches()) == pytest.approx(losses[4], rel=1e-6)
    history = TrainerState.load_from_json(str(saved / "trainer_state.json")).log_history
    assert [entry for entry in history if "eval_loss" in entry] == [
        {"step": step, "eval_loss": losses[step]} for step in (2, 4)
    ]


def report(step: int, start_s: float, end_s: float) -> StepReport:
    values: dict[str, Any] = dict.fromkeys(("forward_s", "backward_s", "grad_norm"), 1.0)
    values |= {
        "losses": {0: 1.0},
        "num_tokens": 1,
        "waits": (),
        "grad_scale": 1.0,
        "peak_device_bytes": None,
        "bias": None,
        "compute": (),
    }
    return StepReport(step=step, start_s=start_s, end_s=end_s, **values)


def way(step: int, *ends_s: float) -> list[OpReport]:
    """Down, update, up of the only layer, a second each."""
    streams = (WorkStream.D2H, WorkStream.CPU, WorkStream.H2D)
    return [
        OpReport(span=Span(stream=stream, step=step, layer=0, start_s=end_s - 1.0, end_s=end_s))
        for stream, end_s in zip(streams, ends_s, strict=True)
    ]


@pytest.mark.parametrize("pause_s", [0.0, 100.0])
def test_a_pause_is_in_no_step_and_waiting_for_the_last_delta_before_it_is(pause_s: float) -> None:
    ledger = Ledger(1, [0.1, 0.1])
    ledger.add_step(report(0, 0.0, 10.0))
    for op in way(0, 11.0, 12.0, 13.0):
        ledger.add_op(op)
    first = ledger.close_next()
    ledger.add_pause(14.0, 14.0 + pause_s)
    ledger.add_step(report(1, 14.0 + pause_s, 20.0 + pause_s))
    for op in way(1, 18.0 + pause_s, 21.0 + pause_s, 22.0 + pause_s):
        ledger.add_op(op)
    second = ledger.close_next()
    assert first is not None
    assert second is not None
    assert first.metrics.step_time_s == 10.0
    assert second.metrics.step_time_s == pytest.approx(10.0)
    assert second.metrics.exposed_by_cause == {
        Cause.D2H: 1.0,
        Cause.PEERS: 0.0,
        Cause.CPU: 1.0,
        Cause.H2D: 1.0,
        Cause.WEIGHTS: 0.0,
        Cause.ACTIVATIONS: 0.0,
    }
    assert second.metrics.busy_by_stream == pytest.approx(
        {WorkStream.GPU: 7.0, WorkStream.D2H: 2.0, WorkStream.CPU: 1.0, WorkStream.H2D: 1.0}
    )
    assert second.timeline.start_s == 14.0 + pause_s
