"""Runs from Python: a configuration, and what a script for transformers' Trainer has."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    TrainerCallback,
    TrainingArguments,
)

import lsp_ray
from lsp_ray import LspConfig, LSPTrainer, RuntimeConfig, finetune, trainer_arguments
from lsp_ray.data.micro_batches import MicroBatches
from lsp_ray.data.tokenize import TokenizedRows
from lsp_ray.errors import ConfigError
from tests.stacked import Stacked, stacking
from tests.tiny import assert_same_weights, tiny_model, tiny_tokenizer
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
def test_finetune_returns_what_it_wrote_and_shows_progress_unless_told_otherwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = finetune(tiny_config(tmp_path, max_steps=3), verbose=False)
    shown = capsys.readouterr().out  # a library that others installed may say something
    words = ("preparing", "plan:", "step 1/3", "eval loss", "done in")
    assert not any(word in shown for word in words)
    finetune(tiny_config(tmp_path, max_steps=3, output_dir=str(tmp_path / "again")))
    shown = capsys.readouterr().out
    assert all(word in shown for word in words)
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
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_same_weights(model, trained)
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(tiny_model("llama").state_dict()[name], model.state_dict()[name])
    scores = trainer.evaluate()
    assert scores["eval_loss"] == pytest.approx(summary.eval_loss_after, rel=1e-5)
    trainer.save_model(str(tmp_path / "saved"))
    assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), trained)


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
        train_dataset=[{"input_ids": [index, 5], "labels": [index, 5]} for index in range(30)],
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


class Noted(TrainerCallback):
    """Keeps the events that it is told of, and ends the training after a step."""

    def __init__(self, last_step: int) -> None:
        self.last_step = last_step
        self.events: list[str] = []
        self.logged: list[dict[str, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append(f"begin {state.max_steps}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append(f"step {state.global_step}")
        control.should_training_stop = state.global_step >= self.last_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logged.append(dict(logs))

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self.events.append(f"eval {state.global_step}")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append(f"save {state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        name = "model.layers.0.mlp.up_proj.weight"
        changed = not torch.equal(kwargs["model"].state_dict()[name], tiny_model("llama").state_dict()[name])
        self.events.append(f"end {changed}")


@pytest.mark.usefixtures("cluster")
def test_callbacks_are_told_and_may_end_it_and_a_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    def trainer(callback: TrainerCallback, name: str = "out", max_steps: int = 6) -> LSPTrainer:
        steps: dict[str, Any] = {"save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "logging_steps": 2}
        return LSPTrainer(
            tiny_model("llama"),
            arguments(tmp_path / name, max_steps=max_steps, lr_scheduler_type="constant", **steps),
            train_dataset=token_rows(24),
            eval_dataset=token_rows(8),
            processing_class=tiny_tokenizer(),
            callbacks=[callback],
            lsp=LSP,
            runtime=RUNTIME,
            verbose=False,
        )

    whole = Noted(last_step=100)
    reference = trainer(whole, "whole")
    reference.train()
    expected = ["begin 6", *(f"step {step}" for step in (1, 2)), "eval 2", "save 2", "step 3", "step 4", "eval 4"]
    assert whole.events == [*expected, "save 4", "step 5", "step 6", "save 6", "eval 6", "end True"]
    assert [sorted(logs) for logs in whole.logged[:2]] == [
        ["epoch", "grad_norm", "learning_rate", "loss"],
    ] * 2
    assert reference.state.global_step == 6
    early = trainer(Noted(last_step=1), "early")
    assert early.train().summary.num_steps in (2, 3)  # what was under way
    again = trainer(Noted(last_step=100), "whole")
    (tmp_path / "whole" / "summary.json").unlink()  # as if it had been killed after that checkpoint
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert_same_weights(again.model, reference.model)
    assert again.callbacks.each[0].events[:2] == ["begin 6", "step 5"]


def test_every_field_of_training_arguments_is_followed_refused_or_warned_of(tmp_path: Path) -> None:
    other: dict[str, Any] = {
        "optim": "adafactor",
        "fp16": True,
        "deepspeed": "zero.json",
        "include_for_metrics": ["loss"],
        "include_num_input_tokens_seen": "all",
        "accelerator_config": {"split_batches": True},
        "train_sampling_strategy": "sequential",
        "lr_scheduler_kwargs": {"num_cycles": 2},
        "lr_scheduler_type": "cosine",
        "report_to": ["tensorboard"],
        "metric_for_best_model": "accuracy",
        "hub_strategy": "end",
        "save_strategy": "epoch",
        "eval_strategy": "epoch",
        "logging_strategy": "epoch",
        "log_level": "error",
        "log_level_replica": "error",
        "debug": ["underflow_overflow"],
        "fsdp": True,
        "output_dir": str(tmp_path),
        "label_names": ["labels"],
        "optim_args": "x=1",
    }
    silent = {*trainer_arguments._FOLLOWED, *trainer_arguments._SCRIPTS_OWN, *trainer_arguments._ALWAYS_SO}
    for field in dataclasses.fields(TrainingArguments):
        args = arguments(tmp_path / "out")
        was = getattr(args, field.name)
        if field.name in other:
            value = other[field.name]
        elif isinstance(was, bool) or was is None:
            value = not was
        else:
            value = was + 1 if isinstance(was, int | float) else f"{was}x"
        setattr(args, field.name, value)  # as a script may, after they were checked
        if field.name in silent:
            assert field.name not in trainer_arguments.ignored_fields(args)
        elif field.name in trainer_arguments._MUST:
            with pytest.raises(ConfigError, match=rf"^{field.name} must be "):
                bad(args=args)
        else:
            assert list(trainer_arguments.ignored_fields(args)) == [field.name]
    with pytest.raises(ConfigError, match=r"^train_sampling_strategy must be one of random, group_by_length, got 'seq"):
        bad(args=arguments(tmp_path / "out", train_sampling_strategy="sequential"))
    args = arguments(tmp_path / "out", dataloader_num_workers=3, tf32=False)
    with pytest.warns(UserWarning, match=r"does not follow these TrainingArguments: tf32, dataloader_num_workers"):
        bad(args=args)


def test_strategies_say_how_often_and_an_epoch_is_a_number_of_steps(tmp_path: Path) -> None:
    def config(**changes: Any) -> Any:
        return bad(args=arguments(tmp_path / "out", **changes), train_dataset=token_rows(40))._config

    every = config(eval_strategy="epoch", save_strategy="epoch", logging_strategy="epoch")
    assert (every.eval_steps, every.save_steps, every.logging_steps) == (9, 9, 9)  # of 36 rows, a tenth held out
    plain = config(max_steps=50, eval_strategy="steps", logging_steps=7, save_strategy="no")
    assert (plain.eval_steps, plain.save_steps, plain.logging_steps) == (7, 0, 7)
    assert config(max_steps=50, save_steps=0.1).save_steps == 5
    assert config(max_grad_norm=0.5).max_grad_norm == 0.5
    assert config().runtime.device == "cpu"
    assert config(train_sampling_strategy="group_by_length").train_sampling_strategy == "group_by_length"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"input_ids": [1, 2]}] * 4,
            r"train_dataset must have labels, or a data_collator that makes them, got .*; Data",
        ),
        ([{"input_ids": [1, 2], "labels": [-100, -100]}] * 4, r"train_dataset must have a row of 2 tokens or more .*"),
        ([{"input_ids": [5], "labels": [5]}] * 4, r"train_dataset must have a row of 2 tokens or more .*"),
        (
            [{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [1] * 300, "labels": [1] * 300}] * 2,
            r"train_dataset must have rows of at most 256 tokens, what the model takes, got 300; row \d+ has more",
        ),
    ],
)
def test_rows_that_teach_nothing_are_one_line(rows: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        bad(train_dataset=rows, eval_dataset=token_rows(2))
    assert "\n" not in str(refused.value)


def test_some_rows_that_teach_nothing_are_left_out_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    rows = token_rows(6)
    rows[1] = {"input_ids": [5], "labels": [5]}
    rows[4] = {"input_ids": [5, 6], "labels": [5, -100]}
    trainer = bad(train_dataset=rows, eval_dataset=token_rows(2), verbose=True)
    assert [row["input_ids"] for row in trainer.rows.train] == [rows[index]["input_ids"] for index in (0, 2, 3, 5)]
    assert "train_dataset: 2 rows are left out, as nothing is learned from" in capsys.readouterr().err


def test_rows_to_evaluate_that_have_nothing_to_predict_are_no_loss_of_zero(tmp_path: Path) -> None:
    trainer = LSPTrainer(
        tiny_model("llama"),
        arguments(tmp_path),
        train_dataset=token_rows(8),
        processing_class=tiny_tokenizer(),
        verbose=False,
    )
    masked = [{"input_ids": [5, 6], "labels": [-100, -100]}]
    with pytest.raises(ConfigError, match=r"eval_dataset must have a row of 2 tokens or more"):
        trainer.evaluate(masked)
    assert trainer.evaluate([*masked, *token_rows(3)]) == trainer.evaluate(token_rows(3))


def collated(collate: Callable[[list[Any]], dict[str, torch.Tensor]]) -> MicroBatches:
    rows = TokenizedRows(train=token_rows(4), eval=token_rows(4), task="causal_lm", label_names=(), collate=collate)
    return MicroBatches(
        rows,
        tiny_tokenizer(),
        batch_size=1,
        accumulation=2,
        seed=0,
        max_steps=1,
        num_train_epochs=1.0,
        max_eval_samples=1,
    )


def ids(rows: list[Any]) -> torch.Tensor:
    return torch.tensor([row["input_ids"] for row in rows])


def test_a_collator_without_labels_is_named() -> None:
    batches = collated(lambda rows: {"input_ids": ids(rows)})
    with pytest.raises(ConfigError, match=r"data_collator must return a tensor labels, got \['input_ids'\]"):
        batches.step(0)


@pytest.mark.parametrize("has_first", [False, True])
def test_a_step_without_a_target_is_named_and_no_loss_of_zero(has_first: bool) -> None:
    """The label of a row's first token is none: nothing is before it to predict it from."""
    made = iter(range(100))

    def masking(rows: list[Any], *, all_but: int) -> dict[str, torch.Tensor]:
        labels = torch.full_like(ids(rows), -100)
        if has_first:
            labels[:, 0] = 5
        if next(made) == all_but:
            labels[:, 1] = 5
        return {"input_ids": ids(rows), "labels": labels}

    with pytest.raises(ConfigError, match=r"train_dataset must leave a label .* in every step, got 'none in step 8'"):
        collated(lambda rows: masking(rows, all_but=-1)).step(7)
    made = iter(range(100))
    assert len(collated(lambda rows: masking(rows, all_but=1)).step(7)) == 2  # one micro-batch of a step is enough
