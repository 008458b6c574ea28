"""What scripts/bench.py makes of its readings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lsp_ray.config import RunConfig
from lsp_ray.run import _parse
from scripts.bench import time_to_same_loss
from scripts.method_bench import page
from scripts.method_bench.ours import Outcome, Setting
from scripts.method_bench.plot import smoothed
from scripts.method_bench.tasks import METHOD_OPTIONS, tasks


def outcome(losses: list[float], step_s: float = 1.0, **scores: float) -> Outcome:
    return Outcome(step_s=(step_s,) * len(losses), losses=tuple(losses), scores=scores, peak_bytes=10**9)


def test_smoothing_takes_the_mean_of_the_last_ten() -> None:
    assert smoothed([float(number) for number in range(12)])[-2:] == [5.5, 6.5]
    assert smoothed([3.0, 5.0]) == [3.0, 4.0]


def test_the_time_to_the_same_loss_counts_seconds_not_steps() -> None:
    zero = outcome([4.0, 3.0, 2.0, 1.0], step_s=10.0)
    assert time_to_same_loss(outcome([4.0, 2.0, 1.0, 0.0], step_s=2.0), zero) == pytest.approx(6.0 / 40.0)
    assert time_to_same_loss(outcome([4.0, 4.0, 4.0, 4.0], step_s=2.0), zero) is None


def test_the_figures_are_means_over_seeds_by_task_and_method() -> None:
    outcomes = {
        Setting(task="sst2", method="lsp", seed=1): outcome([1.0], loss=0.5, accuracy=0.9),
        Setting(task="sst2", method="lsp", seed=2): outcome([1.0], loss=0.7, accuracy=0.8),
        Setting(task="text", method="native"): outcome([1.0], loss=2.0, perplexity=7.4),
    }
    scores = {"sst2": "accuracy", "text": "perplexity"}
    found = page.figures(outcomes, scores)
    assert found == {
        "eval_loss": {"sst2": {"lsp": pytest.approx(0.6)}, "text": {"native": 2.0}},
        "accuracy": {"sst2": {"lsp": pytest.approx(0.85)}},
    }
    rows = page.scores_table(outcomes, scores)
    assert rows[1] == ["sst2", "lsp", "2", "0.6 ± 0.14", "accuracy 0.85 ± 0.071", "1.00 GB"]
    assert page.markdown([["a", "b"], ["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_every_method_and_task_is_set_with_options_that_exist(tmp_path: Path) -> None:
    found = tasks(tmp_path, tmp_path)
    assert set(found) == {"docstrings", "docstring-pairs", "gsm8k", "sst2"}
    for task in found.values():
        for method, options in METHOD_OPTIONS.items():
            words = [word for pair in {**options, **task.options}.items() for word in pair]
            assert isinstance(_parse([*words, "--method", method]), RunConfig)


def test_a_pair_is_labelled_by_whether_the_docstring_is_the_functions_own(tmp_path: Path) -> None:
    tasks(None, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "docstring_pairs.jsonl").read_text().splitlines()]
    assert sum(row["label"] for row in rows) == len(rows) // 2
    assert all(row["sentence1"] == rows[at - 1]["sentence1"] for at, row in enumerate(rows) if not row["label"])
