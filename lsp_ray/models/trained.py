"""A trained model, as a run or an export left it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedConfig, PreTrainedModel

from lsp_ray.config import Task
from lsp_ray.errors import ConfigError
from lsp_ray.models.load import check_weights, load_config, load_model


def load_trained(folder: Path) -> PreTrainedModel:
    """Return the model on the CPU, in the dtype of its weights, for the task it was trained for.

    Raises:
        ConfigError: The folder holds no model, or a damaged one.
    """
    if not (folder / "config.json").is_file() or not any(folder.glob("model*.safetensors")):
        raise ConfigError("model", "be the folder of a finished run or of an export", str(folder))
    check_weights(folder)
    config = load_config(folder)
    task: Task = "causal_lm"
    names: tuple[str, ...] = ()
    if any("SequenceClassification" in name for name in config.architectures or ()):
        task, names = "sequence_classification", label_names(config)
    return load_model(folder, dtype=_dtype(folder), task=task, label_names=names)


def label_names(config: PreTrainedConfig) -> tuple[str, ...]:
    """A classifier's labels in the order of their ids."""
    labels: Mapping[Any, str] = config.id2label or {}
    return tuple(labels[index] for index in sorted(labels))


def _dtype(folder: Path) -> torch.dtype:
    """What its config.json says, else that of a weight."""
    name = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("dtype")
    if name is None:
        with safe_open(next(folder.glob("model*.safetensors")), framework="pt") as weights:
            name = str(weights.get_tensor(next(iter(weights.keys()))).dtype).removeprefix("torch.")
    dtype: torch.dtype = getattr(torch, name)
    return dtype
