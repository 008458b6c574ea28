"""trainer_state.json: what transformers' TrainerState reads from a checkpoint, with a log of every step."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lsp_ray.trace import StepMetrics

FILE_NAME = "trainer_state.json"
_LOGGED = ("step", "loss", "grad_norm", "learning_rate")


def write_trainer_state(folder: Path, fields: Mapping[str, Any], steps: Iterable[StepMetrics]) -> None:
    """Write the file step by step: a run of days holds no list of its steps.

    Args:
        folder: Of the checkpoint.
        fields: Of transformers.TrainerState, but its log.
        steps: For the log, in order.
    """
    with (folder / FILE_NAME).open("w", encoding="utf-8") as file:
        file.write("{\n")
        file.writelines(f" {json.dumps(name)}: {json.dumps(value)},\n" for name, value in fields.items())
        file.write(' "log_history": [')
        separator = "\n"
        for entry in _entries(steps):
            file.write(f"{separator}  {json.dumps(entry, allow_nan=False)}")
            separator = ",\n"
        file.write("\n ]\n}\n")


def _entries(steps: Iterable[StepMetrics]) -> Iterator[dict[str, Any]]:
    for metrics in steps:
        entry = metrics.as_json()
        yield {name: entry[name] for name in _LOGGED}
        if entry["eval_loss"] is not None:
            yield {"step": metrics.step, "eval_loss": metrics.eval_loss}
