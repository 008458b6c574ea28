"""Callbacks: transformers' TrainerCallbacks, told of a run's course while the actors train."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from lsp_ray.trace import StepMetrics


class Callbacks:
    """A `Follower` that passes on what happens; the callbacks' `control` may end the training.

    Steps are told once their updates are back, when the device is up to two steps further: so much later a run ends
    that is asked to. Saving, evaluating and logging go by the arguments, not by `control`.

    Args:
        callbacks: Instances or classes.
        args: As for LSPTrainer.
        model: What callbacks are given; its weights are the trained ones after training alone.
        processing_class: The tokenizer.
        logging_steps: Steps between two calls of `on_log`.
    """

    def __init__(
        self,
        callbacks: Sequence[Any],
        args: TrainingArguments,
        model: Any,
        processing_class: Any,
        *,
        logging_steps: int,
    ) -> None:
        self.each = [callback() if isinstance(callback, type) else callback for callback in callbacks]
        self.state, self.control = TrainerState(), TrainerControl()
        self._given = {"model": model, "processing_class": processing_class, "optimizer": None, "lr_scheduler": None}
        self._args, self._logging_steps = args, logging_steps
        self._steps_per_epoch = 1.0
        self._tell("on_init_end")

    def begins(self, num_steps: int, steps_per_epoch: float, first_step: int) -> None:
        """See `Follower`."""
        self._steps_per_epoch = steps_per_epoch
        self.state.max_steps, self.state.global_step = num_steps, first_step
        self.state.num_train_epochs = max(1, round(num_steps / steps_per_epoch))
        self.state.epoch = first_step / steps_per_epoch
        self.state.is_world_process_zero = self.state.is_local_process_zero = True
        self._tell("on_train_begin")
        self._tell("on_epoch_begin")

    def step(self, metrics: StepMetrics) -> None:
        """See `Follower`; a step that was lost with an actor and is made again is told once."""
        if metrics.step <= self.state.global_step:
            return
        epoch_before = int(self.state.epoch or 0.0)
        self._tell("on_step_begin")
        self.state.global_step, self.state.epoch = metrics.step, metrics.step / self._steps_per_epoch
        self._tell("on_step_end")
        if metrics.step == 1 or metrics.step % self._logging_steps == 0:
            self._log({"loss": metrics.loss, "grad_norm": metrics.grad_norm, "learning_rate": metrics.learning_rate})
        if metrics.eval_loss is not None:
            self.evaluated({"eval_loss": metrics.eval_loss})
        if int(self.state.epoch) > epoch_before:
            self._tell("on_epoch_end")
            if metrics.step < self.state.max_steps:
                self._tell("on_epoch_begin")

    def evaluated(self, metrics: dict[str, float]) -> None:
        """Held-out scores are there, by names that begin with `eval_`."""
        self._log(metrics)
        self._tell("on_evaluate", metrics=metrics)
        loss = metrics["eval_loss"]
        if self.state.best_metric is None or loss < self.state.best_metric:  # after the callbacks, as in transformers
            self.state.best_metric, self.state.best_global_step = loss, self.state.global_step

    def saved(self, checkpoint: Path) -> None:
        """See `Follower`."""
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(checkpoint)
        self._tell("on_save")

    def has_enough(self) -> bool:
        """See `Follower`."""
        return bool(self.control.should_training_stop)

    def ends(self) -> None:
        """Training is over, and the model has the trained weights."""
        self._tell("on_train_end")

    def _log(self, values: dict[str, float]) -> None:
        logs = {**values, "epoch": self.state.epoch or 0.0}
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self._tell("on_log", logs=logs)

    def _tell(self, event: str, **details: Any) -> None:
        for callback in self.each:
            told = getattr(callback, event)(self._args, self.state, self.control, **self._given, **details)
            self.control = told or self.control
        if self.control.should_save or self.control.should_evaluate:
            self.control.should_save = self.control.should_evaluate = False
            warnings.warn("a callback asked to save or evaluate: LSPTrainer does so by its arguments", stacklevel=2)
