"""What a run keeps of its steps: totals that are those of all steps, and nothing that grows with them."""

from __future__ import annotations

import gc
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainerState

from lsp_ray.runtime.checkpoints.trainer_state import write_trainer_state
from lsp_ray.runtime.watch.metrics_file import metrics_file, read_metrics
from lsp_ray.runtime.watch.step_totals import StepTotals
from lsp_ray.trace import StepMetrics
from tests.test_progress import STEP
from tests.tiny_jobs import Recorder, run_on_threads, tiny_job

MEASURED = 2

numbers = st.floats(0.001, 100.0)
steps = st.builds(
    replace,
    st.just(STEP),
    step_time_s=numbers,
    num_tokens=st.integers(1, 10_000),
    exposed_cpu_s=numbers,
    exposed_h2d_s=numbers,
    bytes_d2h=st.integers(0, 10),
    bytes_h2d=st.integers(0, 10),
    grad_scale=st.sampled_from([0.0, 0.25, 1.0]),
)


@given(st.lists(steps, min_size=1, max_size=12), st.integers(1, 3))
def test_totals_are_those_of_all_steps_without_the_time_of_the_measured_one(
    made: list[StepMetrics], first: int
) -> None:
    made = [replace(metrics, step=first + number) for number, metrics in enumerate(made)]
    totals = StepTotals(measured=MEASURED)
    for metrics in made:
        totals.add(metrics)
    timed = [metrics for metrics in made if metrics.step != MEASURED] or made
    total_s = sum(metrics.step_time_s for metrics in timed)
    assert totals.last == made[-1].step
    assert totals.step_time_s_median == median(metrics.step_time_s for metrics in timed)
    assert totals.tokens_per_second == pytest.approx(sum(metrics.num_tokens for metrics in timed) / total_s)
    exposed_s = sum(metrics.exposed_s for metrics in timed)
    assert totals.overlap_fraction == pytest.approx(1.0 - exposed_s / total_s)
    assert totals.num_clipped == sum(metrics.grad_scale == 0.25 for metrics in made)
    assert totals.num_skipped == sum(metrics.grad_scale == 0.0 for metrics in made)
    assert totals.bytes_d2h_per_step == round(median(metrics.bytes_d2h for metrics in made))
    assert totals.bytes_h2d_per_step == round(median(metrics.bytes_h2d for metrics in made))


@pytest.mark.parametrize("num", [0, 3])
def test_the_log_of_a_checkpoint_is_made_of_metrics_jsonl_up_to_its_step(tmp_path: Path, num: int) -> None:
    losses = [2.5, float("nan"), None]
    made = [replace(STEP, step=number + 1, eval_loss=loss) for number, loss in enumerate([*losses, 9.0])]
    made[1] = replace(made[1], loss=float("nan"))
    with metrics_file(tmp_path / "metrics.jsonl", made[:2]) as write:
        for metrics in made[2:]:
            write(metrics)
        fields = {"global_step": num, "max_steps": 9, "save_steps": 1, "train_batch_size": 4}
        write_trainer_state(tmp_path, fields, read_metrics(tmp_path / "metrics.jsonl", num))
    state = TrainerState.load_from_json(str(tmp_path / "trainer_state.json"))
    assert (state.global_step, state.max_steps, state.train_batch_size) == (num, 9, 4)
    logged = {"grad_norm": STEP.grad_norm, "learning_rate": STEP.learning_rate}
    expected: list[dict[str, Any]] = [
        {"step": 1, "loss": STEP.loss, **logged},
        {"step": 1, "eval_loss": 2.5},
        {"step": 2, "loss": None, **logged},
        {"step": 3, "loss": STEP.loss, **logged},
    ]
    assert state.log_history == (expected if num else [])


class Census(Recorder):
    """Counts the live objects of every type while training stands still for a checkpoint; keeps no step itself."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: list[Counter[str]] = []

    def step(self, metrics: StepMetrics) -> None:
        """Is not kept, nor is what follows."""

    def note(self, text: str) -> None:
        """See `step`."""

    def saved(self, checkpoint: Path) -> None:
        if int(checkpoint.name.rpartition("-")[2]) % 24 == 0:
            gc.collect()
            self.counts.append(Counter(str(type(thing)) for thing in gc.get_objects()))


def test_nothing_that_lives_grows_with_the_steps(tmp_path: Path) -> None:
    # at each count the same is under way: a checkpoint, and the fits that began after the step
    lsp = {"check_every": 12, "max_bias": 0.0, "calibration_batches": 2}
    job = tiny_job(tmp_path, max_steps=100, save_steps=12, save_total_limit=1, lsp=lsp, runtime={"num_shards": 2})
    census = Census()
    run_on_threads(job, tmp_path / "out", census)
    _, first, second, third = census.counts  # after 24, 48, 72, 96 steps; caches fill in the first ones
    state = json.loads((tmp_path / "out" / "checkpoint-96" / "trainer_state.json").read_text())
    assert len(state["log_history"]) == 96
    grown = {
        kind: (first[kind], second[kind], third[kind]) for kind in third if first[kind] < second[kind] < third[kind]
    }
    assert not {kind: counts for kind, counts in grown.items() if counts[2] - counts[0] > 12}  # one in four steps
    assert third[str(StepMetrics)] <= 4  # the best, the last, and those that are read for the checkpoint
