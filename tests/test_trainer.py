"""Runs from Python: a configuration, and what a script for transformers' Trainer has."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainingArguments

import lsp_ray
from lsp_ray import LspConfig, LSPTrainer, RuntimeConfig, finetune
from lsp_ray.data.micro_batches import MicroBatches
from lsp_ray.data.tokenize import TokenizedRows
from lsp_ray.errors import ConfigError
from tests.stacked import Stacked, stacking
from tests.tiny import tiny_model, tiny_tokenizer
from tests.tiny_jobs import tiny_config

LSP = LspConfig(subspace_dim=16, nnz_per_row=2, calibration_batches=2)
RUNTIME = RuntimeConfig(device="cpu", num_shards=1, device_threads=1, shard_threads=1)


def token_rows(num_rows: int) -> list[dict[str, list[int]]]:
    """Every row counts on from its first token."""
    rows = [[10 + (first * 7 + offset) % 60 for offset in range(8 + first % 3)] for first in range(num_rows)]
    return [{"input_ids": ids, "labels": list(ids)} for ids in rows]


def arguments(out: Path, **changes: Any) -> TrainingArguments:
    options: dict[str, Any] = {"max_steps": 4, "learning_rate": 3e-3, "per_device_train_batch_size": 4, "use_cpu": True}
    return TrainingArguments(str(out), **{**options, **changes})


def test_importing_the_package_imports_neither_torch_nor_ray_and_configurations_need_neither() -> None:
    code = (
        "import sys, lsp_ray\n"
        "lsp_ray.RunConfig(max_steps=3, lsp=lsp_ray.LspConfig(subspace_dim=64))\n"
        "heavy = {'torch', 'ray', 'transformers', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'lsp_ray' has no attribute 'fine_tune'"):
        lsp_ray.fine_tune  # noqa: B018


@pytest.mark.usefixtures("cluster")
def test_finetune_returns_what_it_wrote_and_prints_nothing_unasked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = finetune(tiny_config(tmp_path, max_steps=3))
    shown = capsys.readouterr().out  # a library that others installed may say something
    assert not any(word in shown for word in ("preparing", "plan:", "step 1/3", "eval loss", "done:"))
    assert result.output_dir == tmp_path / "out"
    assert result.summary.method == "lsp"
    written = json.loads((result.output_dir / "summary.json").read_text())
    assert written["eval_loss_after"] == result.summary.eval_loss_after
    AutoModelForCausalLM.from_pretrained(result.output_dir)


def test_finetune_raises_what_the_command_line_prints(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, lsp={"subspace_dim": 500})
    with pytest.raises(ConfigError, match=r"lsp\.subspace_dim must be at most 64"):
        finetune(config)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("kind", ["list", "datasets", "torch"])
def test_any_trainers_dataset_and_collator_run_on_the_actors(tmp_path: Path, kind: str) -> None:
    rows: Any = token_rows(24)
    if kind == "datasets":  # with a column that no model takes
        rows = Dataset.from_list([{**row, "text": "unused"} for row in rows])
    model = tiny_model("llama")
    trainer = LSPTrainer(
        model=model,
        args=arguments(tmp_path / "out"),
        data_collator=stacking if kind == "torch" else None,
        train_dataset=Stacked() if kind == "torch" else rows,
        eval_dataset=None if kind == "list" else (Stacked() if kind == "torch" else rows),
        processing_class=tiny_tokenizer(),
        lsp=LSP,
        runtime=RUNTIME,
        verbose=False,
    )
    summary = trainer.train().summary
    assert summary.eval_loss_after < summary.eval_loss_before
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(trained[name], model.state_dict()[name])


@pytest.mark.usefixtures("cluster")
def test_a_classifiers_dataset_keeps_the_models_labels(tmp_path: Path) -> None:
    model = tiny_model("bert")
    model.config.id2label = {0: "no", 1: "yes"}
    rows = [{"input_ids": [1, 10 + 50 * (index % 2), 12, 2], "label": index % 2} for index in range(24)]
    trainer = LSPTrainer(
        model,
        arguments(tmp_path / "out", report_to="tensorboard"),
        train_dataset=rows,
        processing_class=tiny_tokenizer(),
        lsp=LSP,
        runtime=RUNTIME,
        verbose=False,
    )
    summary = trainer.train().summary
    assert summary.sample_expected in ("label no", "label yes")
    trained = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert trained.config.id2label == {0: "no", 1: "yes"}
    assert isinstance(trained.get_submodule("classifier"), nn.Linear)
    assert list((tmp_path / "out" / "tensorboard").glob("events.*"))


def test_without_held_out_rows_a_tenth_is_held_out_and_shared_with_nothing() -> None:
    trainer = LSPTrainer(
        "model",
        arguments(Path("out"), seed=7),
        train_dataset=[{"input_ids": [index], "labels": [index]} for index in range(30)],
        processing_class=tiny_tokenizer(),
    )
    rows = trainer.rows
    train, held_out = ({row["input_ids"][0] for row in part} for part in (rows.train, rows.eval))
    assert (len(train), len(held_out)) == (27, 3)
    assert not train & held_out


def bad(**changes: Any) -> LSPTrainer:
    given = {"train_dataset": token_rows(8), "processing_class": tiny_tokenizer(), "args": arguments(Path("out"))}
    return LSPTrainer("model", **{**given, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_dataset": iter([])}, r"train_dataset must have rows, a length and be indexable, got 'list_iterator'"),
        ({"train_dataset": None}, r"train_dataset must have rows.*, got 'NoneType'"),
        ({"train_dataset": token_rows(1)}, r"train_dataset must have at least 2 rows, one of them to hold out, got 1"),
        ({"eval_dataset": []}, r"eval_dataset must have rows.*, got 'list'"),
        ({"processing_class": None}, r"processing_class must be the model's tokenizer, got None"),
        ({"args": arguments(Path("out"), warmup_steps=0.5)}, r"warmup_steps must be a whole number, got 0\.5"),
        (
            {"args": arguments(Path("out"), report_to=["tensorboard", "wandb"])},
            r"report_to must be one of none, tensorboard, wandb, got \['tensorboard', 'wandb'\]",
        ),
        (
            {"args": arguments(Path("out"), lr_scheduler_type="greedy", eval_strategy="epoch")},
            r"lr_scheduler_type must be one of",
        ),
    ],
)
def test_what_cannot_work_is_said_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bad(**changes)


@pytest.mark.parametrize(("label", "num_labels", "kind"), [(0.5, 2, "whole numbers"), (1, 1, "floats")])
def test_a_classifiers_labels_must_be_of_the_models_kind(label: float, num_labels: int, kind: str) -> None:
    model = tiny_model("bert")
    model.config.num_labels = num_labels
    rows = [{"input_ids": [1, 2], "label": label}] * 4
    message = rf"train_dataset must have labels that are {kind} where num_labels is {num_labels}, got {label}"
    with pytest.raises(ConfigError, match=message):
        LSPTrainer(model, arguments(Path("out")), train_dataset=rows, processing_class=tiny_tokenizer())


def test_a_collator_without_labels_is_named() -> None:
    rows = TokenizedRows(
        train=token_rows(4),
        eval=token_rows(4),
        task="causal_lm",
        label_names=(),
        collate=lambda rows: {"input_ids": torch.tensor([row["input_ids"] for row in rows])},
    )
    batches = MicroBatches(
        rows,
        tiny_tokenizer(),
        batch_size=1,
        accumulation=1,
        seed=0,
        max_steps=1,
        num_train_epochs=1.0,
        max_eval_samples=1,
    )
    with pytest.raises(ConfigError, match=r"data_collator must return a tensor labels, got \['input_ids'\]"):
        batches.step(0)
