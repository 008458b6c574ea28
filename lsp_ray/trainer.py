"""Runs from Python: `finetune` takes a configuration, `LSPTrainer` what a script for transformers' Trainer has."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, get_args

import torch
from datasets import Dataset
from rich.console import Console
from torch.utils.data import Subset
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from lsp_ray.config import LspConfig, Method, ReportTo, RunConfig, RuntimeConfig, SchedulerType, Task
from lsp_ray.data.tokenize import TokenizedRows
from lsp_ray.errors import ConfigError
from lsp_ray.launch import RunResult, run_config
from lsp_ray.models.load import load_config, save_model
from lsp_ray.models.resolve import resolve_model
from lsp_ray.models.trained import label_names

HELD_OUT_SHARE = 10  # one row in so many is held out where no eval_dataset is given
GIVEN = "(rows given to LSPTrainer)"
_COLUMNS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "labels", "label", "label_ids")
_SHARED = (
    *("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate"),
    *("weight_decay", "seed"),
)


def finetune(config: RunConfig, *, verbose: bool = False) -> RunResult:
    """Fine-tune a model as `python -m lsp_ray.run` does; with `verbose` it prints the same.

    Raises:
        ConfigError: Something cannot work; nothing was written.
        LspRayError: Something failed underway.
    """
    return run_config(config, console=_console(verbose))


class LSPTrainer:
    """Runs a dataset and a collator of transformers' Trainer on the GPU and shard actors.

    Of `args` it reads output_dir (new or empty), max_steps, num_train_epochs, per_device_train_batch_size,
    gradient_accumulation_steps, learning_rate, lr_scheduler_type, lr_scheduler_kwargs, warmup_steps, weight_decay,
    seed, bf16, gradient_checkpointing, remove_unused_columns and report_to. Gradients are not clipped.

    Args:
        model: A folder, hub id or alias, or a model in memory, which is written to a temporary folder for the GPU actor
            and not changed: the trained weights are in `args.output_dir`.
        args: transformers' own.
        data_collator: Makes batches with `input_ids` and `labels`; default: pads both.
        train_dataset: Indexable, with a length.
        eval_dataset: The same; default: a tenth of train_dataset, drawn by the seed, is held out.
        processing_class: The model's tokenizer.
        method: See `RunConfig`.
        lsp: The projectors.
        runtime: Actors, threads and schedule.
        verbose: Show progress as `python -m lsp_ray.run` does.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: TrainingArguments,
        data_collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        method: Method = "lsp",
        lsp: LspConfig | None = None,
        runtime: RuntimeConfig | None = None,
        verbose: bool = True,
    ) -> None:
        if processing_class is None:
            raise ConfigError("processing_class", "be the model's tokenizer", None)
        self._model, self._tokenizer, self._verbose = model, processing_class, verbose
        self._config = _run_config(args, model, method, lsp or LspConfig(), runtime or RuntimeConfig())
        train, held_out = _split(train_dataset, eval_dataset, seed=args.seed)
        if args.remove_unused_columns:
            train, held_out = _with_model_columns(train), _with_model_columns(held_out)
        task = _task(train[0])
        if data_collator is None:
            kind = DataCollatorForSeq2Seq if task == "causal_lm" else DataCollatorWithPadding
            data_collator = kind(processing_class)
        names: tuple[str, ...] = ()
        if task == "sequence_classification":
            names = label_names(load_config(resolve_model(model)) if isinstance(model, str) else model.config)
            _check_labels(train[0], names)
        self.rows = TokenizedRows(train=train, eval=held_out, task=task, label_names=names, collate=data_collator)

    def train(self) -> RunResult:
        """Train and write the checkpoint.

        Raises:
            ConfigError: Something cannot work; nothing was written.
            LspRayError: Something failed underway.
        """
        if isinstance(self._model, str):
            return self._run(self._model)
        with tempfile.TemporaryDirectory(prefix="lsp_ray-model-") as folder:
            save_model(self._model, self._tokenizer, Path(folder))
            return self._run(folder)

    def _run(self, model_name: str) -> RunResult:
        config = replace(self._config, model_name_or_path=model_name)
        return run_config(config, console=_console(self._verbose), rows=self.rows)


def _console(verbose: bool) -> Console | None:
    return None if verbose else Console(quiet=True)


def _run_config(
    args: TrainingArguments, model: str | PreTrainedModel, method: Method, lsp: LspConfig, runtime: RuntimeConfig
) -> RunConfig:
    schedule = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    if schedule not in get_args(SchedulerType):
        raise ConfigError("lr_scheduler_type", f"be one of {', '.join(get_args(SchedulerType))}", schedule)
    if args.fp16:
        raise ConfigError("fp16", "be false: weights are float32 or bfloat16", args.fp16)
    if args.warmup_steps != int(args.warmup_steps):
        raise ConfigError("warmup_steps", "be a whole number", args.warmup_steps)
    report_to = args.report_to or ["none"]
    if len(report_to) > 1 or report_to[0] not in get_args(ReportTo):
        raise ConfigError("report_to", f"be one of {', '.join(get_args(ReportTo))}", args.report_to)
    in_bf16 = None if isinstance(model, str) else model.dtype == torch.bfloat16
    return RunConfig(
        dataset=GIVEN,
        output_dir=args.output_dir,
        method=method,
        num_train_epochs=args.num_train_epochs if args.max_steps < 1 else None,
        lr_scheduler_type=cast(SchedulerType, schedule),
        lr_scheduler_kwargs=cast(dict[str, Any] | None, args.lr_scheduler_kwargs) or None,
        warmup_steps=int(args.warmup_steps),
        bf16=True if args.bf16 else in_bf16,
        gradient_checkpointing=bool(args.gradient_checkpointing or args.activation_checkpointing),
        report_to=cast(ReportTo, report_to[0]),
        lsp=lsp,
        runtime=runtime,
        **{name: getattr(args, name) for name in _SHARED},
    )


def _split(train: Any, held_out: Any, *, seed: int) -> tuple[Any, Any]:
    for name, rows in {"train_dataset": train, "eval_dataset": held_out}.items():
        indexable = hasattr(rows, "__len__") and hasattr(rows, "__getitem__")
        if not (indexable and len(rows)) and not (rows is None and name == "eval_dataset"):
            raise ConfigError(name, "have rows, a length and be indexable", type(rows).__name__)
    if held_out is not None:
        return train, held_out
    if len(train) < 2:
        raise ConfigError("train_dataset", "have at least 2 rows, one of them to hold out", len(train))
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
    num_held_out = -(-len(train) // HELD_OUT_SHARE)
    return _chosen(train, order[num_held_out:]), _chosen(train, order[:num_held_out])


def _chosen(rows: Any, indices: list[int]) -> Any:
    return rows.select(indices) if isinstance(rows, Dataset) else Subset(rows, indices)


def _with_model_columns(rows: Any) -> Any:
    """Without the columns of a datasets.Dataset that no model takes, as transformers' Trainer does."""
    if not isinstance(rows, Dataset):
        return rows
    return rows.select_columns([name for name in rows.column_names if name in _COLUMNS])


def _task(row: Mapping[str, Any]) -> Task:
    """A class is one number; what has a list of labels, or none before it is collated, is a language model's."""
    label = _label(row)
    return "causal_lm" if label is None or torch.as_tensor(label).ndim else "sequence_classification"


def _check_labels(row: Mapping[str, Any], names: Sequence[str]) -> None:
    """As transformers has it: one output learns floats, several tell classes apart."""
    label = _label(row)
    if torch.as_tensor(label).is_floating_point() != (len(names) == 1):
        kind = "floats" if len(names) == 1 else "whole numbers"
        raise ConfigError("train_dataset", f"have labels that are {kind} where num_labels is {len(names)}", label)


def _label(row: Mapping[str, Any]) -> Any:
    return next((row[name] for name in ("labels", "label", "label_ids") if name in row), None)
