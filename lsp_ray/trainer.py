"""Runs from Python: `finetune` takes a configuration, `LSPTrainer` what a script for transformers' Trainer has."""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerState,
    TrainingArguments,
)

from lsp_ray.config import LspConfig, Method, RunConfig, RuntimeConfig
from lsp_ray.data.micro_batches import MicroBatches
from lsp_ray.data.tokenize import TokenizedRows
from lsp_ray.device.evaluate import class_scores, language_scores, number_scores
from lsp_ray.errors import ConfigError
from lsp_ray.launch import RunResult, run_config
from lsp_ray.models.load import load_config, load_model
from lsp_ray.models.resolve import default_cache_dir, resolve_model
from lsp_ray.models.save import save_model
from lsp_ray.models.trained import label_names, load_trained
from lsp_ray.output_folder import BASE_MODEL, INTERNALS
from lsp_ray.trainer_arguments import run_config_of
from lsp_ray.trainer_callbacks import Callbacks
from lsp_ray.trainer_rows import check_classes, check_labels, split, task_of, usable, with_model_columns


def finetune(config: RunConfig, *, verbose: bool = True) -> RunResult:
    """Fine-tune a model as `lsp-ray train` does; it prints the same, unless `verbose` is false.

    Raises:
        ConfigError: Something cannot work; nothing was written.
        LspRayError: Something failed underway.
    """
    return run_config(config, console=_console(verbose))


class LSPTrainer:
    """Runs a dataset and a collator of transformers' Trainer on the GPU and shard actors.

    Of `args` it follows output_dir (new or empty, unless a run goes on in it), max_steps, num_train_epochs,
    per_device_train_batch_size, gradient_accumulation_steps, learning_rate, lr_scheduler_type, lr_scheduler_kwargs,
    warmup_steps, weight_decay, max_grad_norm, seed, bf16, gradient_checkpointing, torch_compile, logging_steps,
    eval_steps, save_steps and the strategies of these three, save_total_limit, load_best_model_at_end, use_cpu,
    disable_tqdm, remove_unused_columns and report_to. Another field with a value of its own is refused where it would
    change the result, and warned of by its name elsewhere.

    Args:
        model: A folder, hub id or alias, or a model in memory, which has the trained weights after training.
        args: transformers' own.
        data_collator: Makes batches with `input_ids` and `labels`; default: pads both.
        train_dataset: Indexable, with a length. Rows from which nothing is learned are left out, with a line.
        eval_dataset: The same; default: a tenth of train_dataset, drawn by the seed, is held out.
        processing_class: The model's tokenizer, or its processor, which is saved with the model.
        callbacks: transformers' TrainerCallbacks, see `Callbacks`.
        method: See `RunConfig`.
        lsp: The projectors.
        runtime: Actors, threads and schedule.
        verbose: Show progress as `lsp-ray train` does; default: as `args.disable_tqdm` says.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: TrainingArguments,
        data_collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        callbacks: Sequence[Any] | None = None,
        *,
        method: Method = "lsp",
        lsp: LspConfig | None = None,
        runtime: RuntimeConfig | None = None,
        verbose: bool | None = None,
    ) -> None:
        if processing_class is None:
            raise ConfigError("processing_class", "be the model's tokenizer", None)
        if not isinstance(model, str) and getattr(model, "is_quantized", False):
            raise ConfigError("model", "be given by name where its weights are quantised", type(model).__name__)
        self.args = args
        self._processor = processing_class if isinstance(processing_class, ProcessorMixin) else None
        tokenizer: Any = processing_class if self._processor is None else self._processor.tokenizer
        self.processing_class: PreTrainedTokenizerBase = tokenizer
        self._output_dir = Path(str(args.output_dir))
        self._model, self._loaded = model, None if isinstance(model, str) else model
        self._verbose = not args.disable_tqdm if verbose is None else verbose
        train, held_out = split(train_dataset, eval_dataset, seed=args.seed)
        self._config = run_config_of(args, method, lsp or LspConfig(), runtime or RuntimeConfig(), num_rows=len(train))
        if not isinstance(model, str) and not args.bf16:
            self._config = replace(self._config, bf16=model.dtype == torch.bfloat16)
        self.rows = self._checked(train, held_out, data_collator)
        self.callbacks = Callbacks(
            callbacks or (), args, self._loaded, self.processing_class, logging_steps=self._config.logging_steps
        )

    @property
    def model(self) -> PreTrainedModel:
        """The model, loaded where it was given by name; after training with the trained weights."""
        if self._loaded is None:
            assert isinstance(self._model, str)
            is_trained = (self._output_dir / "summary.json").exists()
            self._loaded = load_trained(self._output_dir) if is_trained else self._untrained(resolve_model(self._model))
        return self._loaded

    @property
    def state(self) -> TrainerState:
        """What callbacks are given: steps, epochs and what was logged."""
        return self.callbacks.state

    def train(self, resume_from_checkpoint: str | bool | None = None) -> RunResult:
        """Train, write the model into `args.output_dir` and put the trained weights into `model`.

        Args:
            resume_from_checkpoint: A checkpoint-N folder, or True for the last one in `args.output_dir`.

        Raises:
            ConfigError: Something cannot work; nothing was written.
            LspRayError: Something failed underway.
        """
        asked = "last" if resume_from_checkpoint is True else resume_from_checkpoint or None
        config = replace(self._config, resume_from_checkpoint=asked)
        if isinstance(self._model, str):
            result = self._run(config, self._model)
            self._loaded = None
        else:
            # the same name when a run goes on, as a run goes on with the model of the same name alone
            name = hashlib.sha256(str(self._output_dir.absolute()).encode()).hexdigest()[:16]
            folder = default_cache_dir() / "trainer" / name
            try:
                self._save(self._model, folder)
                result = self._run(config, str(folder))
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            trained = load_model(
                result.output_dir,
                dtype=self._model.dtype,
                task=self.rows.task,
                label_names=self.rows.label_names,
                new_head=False,
            )
            self._model.load_state_dict(trained.state_dict())
            name = getattr(self._model.config, "_name_or_path", "")  # of where it was loaded from
            (result.output_dir / INTERNALS / BASE_MODEL).write_text(name, encoding="utf-8")
        self.callbacks.evaluated({f"eval_{name}": score for name, score in result.summary.eval_after.items()})
        self.callbacks.ends()
        return result

    def evaluate(self, eval_dataset: Any = None) -> dict[str, float]:
        """Return the model's scores on the held-out rows, or on others, by names that begin with `eval_`.

        Raises:
            ConfigError: Nothing can be predicted in the rows, or one is too long.
        """
        rows = self.rows
        if eval_dataset is not None:
            given = with_model_columns(eval_dataset) if self.args.remove_unused_columns else eval_dataset
            if rows.task == "causal_lm":
                given = usable("eval_dataset", given, max_length=self._max_length(), note=self._note)
            rows = replace(rows, eval=given)
        batches = MicroBatches(
            rows,
            self.processing_class,
            batch_size=self.args.per_device_eval_batch_size,
            accumulation=1,
            seed=self.args.seed,
            max_steps=1,
            num_train_epochs=1.0,
            max_eval_samples=len(rows.eval),
        ).eval_batches()
        score = language_scores
        if rows.task == "sequence_classification":
            score = number_scores if len(rows.label_names) == 1 else class_scores
        return {f"eval_{name}": value for name, value in score(self.model, batches).items()}

    def save_model(self, output_dir: str | None = None) -> None:
        """Write model and tokenizer as they are now; default: into `args.output_dir`."""
        self._save(self.model, Path(output_dir or self._output_dir))

    def add_callback(self, callback: Any) -> None:
        """Add a TrainerCallback, an instance or a class."""
        self.callbacks.each.append(callback() if isinstance(callback, type) else callback)

    def remove_callback(self, callback: Any) -> None:
        """Remove a TrainerCallback, or all of a class."""
        is_class = isinstance(callback, type)
        kept = [one for one in self.callbacks.each if not (type(one) is callback if is_class else one is callback)]
        self.callbacks.each = kept

    def _save(self, model: PreTrainedModel, folder: Path) -> None:
        trained = self._output_dir if (self._output_dir / "config.json").is_file() else None
        save_model(model, self.processing_class, folder, source=trained)
        if self._processor is not None:
            self._processor.save_pretrained(folder)

    def _run(self, config: RunConfig, model_name: str) -> RunResult:
        config = replace(config, model_name_or_path=model_name)
        return run_config(config, console=_console(self._verbose), rows=self.rows, follower=self.callbacks)

    def _untrained(self, folder: Path) -> PreTrainedModel:
        dtype = torch.bfloat16 if self._config.bf16 else torch.float32
        return load_model(folder, dtype=dtype, task=self.rows.task, label_names=self.rows.label_names)

    def _checked(
        self, train: Any, held_out: Any, collate: Callable[[list[Any]], Mapping[str, Any]] | None
    ) -> TokenizedRows:
        """The rows, once they are known to be of some use."""
        if self.args.remove_unused_columns:
            train, held_out = with_model_columns(train), with_model_columns(held_out)
        task = task_of(train[0])
        if collate is None:
            kind: Any = DataCollatorForSeq2Seq if task == "causal_lm" else DataCollatorWithPadding
            collate = kind(self.processing_class)
        names: tuple[str, ...] = ()
        if task == "sequence_classification":
            names = label_names(self._model_config())
            check_classes(train[0], names)
        else:
            check_labels(train[0], collate, task)
            bound = self._max_length()
            train = usable("train_dataset", train, max_length=bound, note=self._note)
            held_out = usable("eval_dataset", held_out, max_length=bound, note=self._note)
        return TokenizedRows(train=train, eval=held_out, task=task, label_names=names, collate=collate)

    def _model_config(self) -> PreTrainedConfig:
        return load_config(resolve_model(self._model)) if isinstance(self._model, str) else self._model.config

    def _max_length(self) -> int:
        bound: int = self.processing_class.model_max_length
        if isinstance(self._model, str) and not Path(self._model).is_dir():  # a hub is not asked before training
            return bound
        positions = getattr(self._model_config().get_text_config(), "max_position_embeddings", None)
        return bound if positions is None else min(bound, positions)

    def _note(self, line: str) -> None:
        if self._verbose:
            print(line, file=sys.stderr)


def _console(verbose: bool) -> Console | None:
    return None if verbose else Console(quiet=True)
