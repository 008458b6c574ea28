"""Eval scores are scikit-learn's on what the model predicts; batched answers are those of one prompt at a time."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import mse_loss
from transformers import AutoModelForSequenceClassification

from lsp_ray.data.final_numbers import final_number
from lsp_ray.device.evaluate import class_scores, generate, language_scores, number_scores, predict
from lsp_ray.errors import ConfigError
from lsp_ray.models.load import load_model
from lsp_ray.runtime.prepare.job import Job
from lsp_ray.special_tokens import SpecialTokens
from tests.tiny import Family, tiny_model, write_tiny_jsonl
from tests.tiny_jobs import run_on_threads, tiny_config, tiny_job

TOKENS = SpecialTokens(pad=0, ends=(2,))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_answers_of_prompts_together_are_those_of_each_alone(family: Family) -> None:
    model = tiny_model(family)
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(8, 128, (length,), generator=generator).tolist() for length in (2, 9, 5, *range(1, 9))]
    together = generate(model, prompts, 6, TOKENS)
    for prompt, answer in zip(prompts, together, strict=True):
        (alone,) = generate(model, [prompt], 6, TOKENS)
        assert answer[: len(alone)] == alone
        assert set(answer[len(alone) :]) <= {0}


def test_a_classifiers_scores_are_those_of_its_predictions() -> None:
    model = tiny_model("bert", seed=5)
    generator = torch.Generator().manual_seed(4)
    ids_BS = torch.randint(8, 128, (40, 6), generator=generator)
    inputs = {"input_ids": ids_BS, "attention_mask": torch.ones_like(ids_BS)}
    predicted = predict(model, inputs)
    labels = [label if at % 3 else 1 - label for at, label in enumerate(predicted)]
    batches = [
        {name: tensor[first : first + 16] for name, tensor in (inputs | {"labels": torch.tensor(labels)}).items()}
        for first in range(0, 40, 16)
    ]
    scores = class_scores(model, batches)
    true_positives = sum(p == y == 1 for p, y in zip(predicted, labels, strict=True))
    wrong = sum(p != y for p, y in zip(predicted, labels, strict=True))
    true_negatives = 40 - wrong - true_positives
    false_positives = sum(predicted) - true_positives
    false_negatives = wrong - false_positives
    sides = (
        (true_positives + false_positives) * (true_positives + false_negatives),
        (true_negatives + false_positives) * (true_negatives + false_negatives),
    )
    covariance = true_positives * true_negatives - false_positives * false_negatives
    assert scores["accuracy"] == pytest.approx(1 - wrong / 40)
    assert scores["f1"] == pytest.approx(true_positives / (true_positives + wrong / 2) if true_positives else 0.0)
    assert scores["matthews"] == pytest.approx(covariance / math.sqrt(math.prod(sides)) if math.prod(sides) else 0.0)
    assert list(scores) == ["loss", "accuracy", "f1", "matthews"]


def test_a_regressions_scores_are_scipys_and_torchs_and_its_checkpoint_is_transformers_own(tmp_path: Path) -> None:
    data = write_tiny_jsonl(tmp_path / "scores.jsonl", "sentence_pair_score", 120)
    job = tiny_job(tmp_path, "bert", dataset=str(data), max_steps=30, learning_rate=1e-2)
    summary, _ = run_on_threads(job, tmp_path / "out")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert (model.config.num_labels, model.config.problem_type) == (1, "regression")
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    expected = {row["label"] for row in rows}
    batches = job.micro_batches.eval_batches()
    with torch.no_grad():
        found = torch.cat([model(**batch).logits.squeeze(-1) for batch in batches])
    labels = torch.cat([batch["labels"] for batch in batches])
    assert labels.dtype == torch.float32
    assert set(labels.tolist()) <= expected == {0.0, 2.5, 5.0}
    assert summary.eval_after == {
        "loss": pytest.approx(float(mse_loss(found, labels)), rel=1e-4),
        "pearson": pytest.approx(float(np.corrcoef(found.numpy(), labels.numpy())[0, 1]), abs=1e-4),
    }
    assert summary.eval_loss_after < 0.5 * summary.eval_loss_before
    assert summary.sample_expected in {f"label {label:.4g}" for label in expected}
    assert float(summary.sample_after.strip("[]")) == pytest.approx(float(predict(model, sample_of(job))[0]), rel=1e-4)


def sample_of(job: Job) -> dict[str, torch.Tensor]:
    inputs = {name: torch.tensor([ids]) for name, ids in job.sample_inputs.items()}
    return inputs | {"attention_mask": torch.ones_like(inputs["input_ids"])}


@pytest.mark.parametrize("labels", [[2.0, 2.0, 2.0], [0.5, 1.5, 4.0]])
def test_a_correlation_with_what_does_not_vary_is_0(labels: list[float]) -> None:
    config = tiny_model("bert").config
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config)
    if len({*labels}) > 1:  # the same ids in every row would not do: kernels may round one row unlike the next
        torch.nn.init.zeros_(model.classifier.weight)
    ids_BS = torch.arange(12).view(3, 4)
    batch = {"input_ids": ids_BS, "attention_mask": torch.ones_like(ids_BS), "labels": torch.tensor(labels)}
    assert number_scores(model, [batch])["pearson"] == 0.0


def test_perplexity_is_the_exponential_of_the_loss(tmp_path: Path) -> None:
    job = tiny_job(tmp_path)
    scores = language_scores(
        load_model(job.model_folder, dtype=job.dtype, task=job.task), job.micro_batches.eval_batches()
    )
    assert scores["perplexity"] == pytest.approx(math.exp(scores["loss"]))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("48/2 = 24\n#### 72", Decimal(72)),
        ("#### 1\nno: #### $1,234.50", Decimal("1234.5")),
        ("####-3", Decimal(-3)),
        ("72", None),
        ("####", None),
    ],
)
def test_the_final_number_stands_after_the_last_mark(text: str, number: Decimal | None) -> None:
    assert final_number(text) == number


NUMBERS = [{"prompt": f"w{key} ?", "completion": f" #### {key}"} for key in (1, 2)]


def test_answers_are_scored_by_their_final_number_before_and_after(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "qwen2")  # whose tokenizer knows digits
    data = tmp_path / "numbers.jsonl"
    data.write_text("".join(f"{json.dumps(NUMBERS[at % 2])}\n" for at in range(60)), encoding="utf-8")
    options: dict[str, Any] = {
        "dataset": str(data),
        "method": "native",
        "max_steps": 60,
        "learning_rate": 5e-3,
        "max_seq_length": 24,
    }
    job = tiny_job(tmp_path, "qwen2", max_eval_answers=5, **options)
    assert config.max_eval_answers == 0
    summary, listener = run_on_threads(job, tmp_path / "out")
    assert summary.eval_before["answer_accuracy"] == 0.0
    assert summary.eval_after["answer_accuracy"] == 1.0
    assert any("answer_accuracy 1" in note for note in listener.notes if note.startswith("eval loss after"))


def test_questions_are_not_asked_of_data_without_final_numbers(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_eval_answers must be 0 where no held-out answer ends in ####"):
        tiny_job(tmp_path, max_eval_answers=5)
