"""Ending with the best weights, ending early, and a loss that runs away."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lsp_ray.device.evaluate import mean_loss
from lsp_ray.models.load import load_model
from lsp_ray.runtime.checkpoints.checkpoint import checkpoints
from lsp_ray.runtime.prepare.job import resumed
from lsp_ray.runtime.watch.loss_watch import LossWatch
from lsp_ray.runtime.watch.step_totals import StepTotals
from tests.test_progress import STEP
from tests.tiny_jobs import run_on_threads, saved_weights, tiny_job

GETS_WORSE: dict[str, Any] = {"learning_rate": 0.03, "lr_scheduler_type": "constant"}  # after a step or two


def measured(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["eval_loss"] for line in lines if line["eval_loss"] is not None}


@pytest.mark.parametrize("method", ["lsp", "lora", "native"])
def test_a_run_ends_with_the_weights_of_its_lowest_eval_loss(tmp_path: Path, method: str) -> None:
    options: dict[str, Any] = {"method": method, "eval_steps": 1, "save_steps": 0, "save_total_limit": 1, **GETS_WORSE}
    job = tiny_job(tmp_path, max_steps=3, load_best_model_at_end=True, **options)
    summary, listener = run_on_threads(job, tmp_path / "out")
    losses = measured(tmp_path / "out")
    best = min(losses, key=lambda step: losses[step])
    assert summary.best_step == best < 3
    assert summary.eval_loss_after == pytest.approx(losses[best], rel=1e-5)
    assert any(note.startswith(f"going back to checkpoint-{best}, ") for note in listener.notes)
    model = load_model(tmp_path / "out", dtype=job.dtype, task=job.task)
    assert mean_loss(model, job.micro_batches.eval_batches()) == pytest.approx(losses[best], rel=1e-5)
    kept = checkpoints(tmp_path / "out")
    assert list(kept) == [best]
    if method != "lora":
        expected = saved_weights(job, kept[best])
        assert all(torch.equal(tensor, expected[name]) for name, tensor in saved_weights(job, tmp_path / "out").items())


def test_a_last_step_that_is_the_best_is_kept(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, max_steps=3, eval_steps=2, load_best_model_at_end=True)
    summary, _ = run_on_threads(job, tmp_path / "out")
    assert summary.best_step is None
    assert summary.eval_loss_after < measured(tmp_path / "out")[2]


def test_a_run_without_gain_ends_early_and_is_finished_and_so_does_one_that_goes_on(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, max_steps=50, eval_steps=1, save_steps=1, early_stopping_patience=3, **GETS_WORSE)
    summary, listener = run_on_threads(job, tmp_path / "out")
    losses = measured(tmp_path / "out")
    best = min(losses, key=lambda step: losses[step])
    assert summary.num_steps == max(losses) == best + 3
    assert f"stopping early after {best + 3} steps: eval loss has stopped falling" in listener.notes
    again, _ = run_on_threads(resumed(job, tmp_path / "out" / f"checkpoint-{best + 2}"), tmp_path / "out")
    assert again.num_steps == summary.num_steps
    assert again.eval_loss_after == summary.eval_loss_after


@given(st.lists(st.one_of(st.none(), st.floats(0, 10), st.just(float("nan"))), max_size=12))
def test_the_best_step_has_the_lowest_measured_loss_and_those_after_it_are_without_gain(
    losses: list[float | None],
) -> None:
    totals = StepTotals(measured=2)
    for number, loss in enumerate(losses):
        totals.add(replace(STEP, step=number + 1, eval_loss=loss))
    numbers = [loss for loss in losses if loss is not None and loss == loss]
    if totals.best is None:
        assert not numbers
        assert totals.num_without_gain == sum(loss is not None for loss in losses)
        return
    assert totals.best.eval_loss == min(numbers)
    assert totals.best.step == losses.index(min(numbers)) + 1
    assert totals.num_without_gain == sum(loss is not None for loss in losses[totals.best.step :])


def warnings(losses: list[float]) -> list[str]:
    watch = LossWatch()
    return [line for loss in losses if (line := watch.warning(loss, 1e-3)) is not None]


def test_a_loss_that_runs_away_is_warned_of_once() -> None:
    said = warnings([3.0] * 10 + [2.0] * 20 + [5.0] * 40)
    assert len(said) == 1
    assert said[0].startswith("warning: the loss runs away: 3.8 on average over the last 10 steps, 3 over the first;")


@given(st.lists(st.floats(0.9, 1.1), min_size=0, max_size=60))
def test_a_loss_that_only_jumps_or_falls_is_not_warned_of(noise: list[float]) -> None:
    assert not warnings([3.0 * 0.99**step * factor for step, factor in enumerate(noise)])
    assert not warnings([float("nan")] * 30)
