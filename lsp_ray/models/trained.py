"""A trained model, as a run or an export left it."""

from __future__ import annotations

import copy
import json
import shlex
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lsp_ray.config import Bits, Task
from lsp_ray.errors import ConfigError
from lsp_ray.models.load import check_weights, load_config, load_model, one_line, silenced
from lsp_ray.models.resolve import resolve_model


def load_trained(folder: Path) -> PreTrainedModel:
    """Return the model, in the dtype of its weights, for the task it was trained for.

    It is on the CPU; one whose base is quantised is on the GPU, if there is one, with the adapter beside the base.

    Raises:
        ConfigError: The folder holds no model, or a damaged one.
    """
    if is_beside_base(folder):
        return with_adapter(folder, folder / "adapter")
    if not (folder / "config.json").is_file() or not any(folder.glob("model*.safetensors")):
        hint = ""
        if (folder / "adapter_config.json").is_file():
            hint = "an adapter alone is loaded by PEFT, beside its base"
        elif (folder / "config.yaml").is_file() and not (folder / "summary.json").is_file():
            run = shlex.quote(str(folder))
            go_on = f"--config {run}/config.yaml --output_dir {run} --resume_from_checkpoint last"
            hint = f"its run has not come to its end; to go on: python -m lsp_ray.run {go_on}"
        raise ConfigError("model", "be the folder of a finished run or of an export", str(folder), hint=hint)
    check_weights(folder)
    config = load_config(folder)
    task: Task = "causal_lm"
    names: tuple[str, ...] = ()
    if any("SequenceClassification" in name for name in config.architectures or ()):
        task, names = "sequence_classification", label_names(config)
    return load_model(folder, dtype=_dtype(folder), task=task, label_names=names)


def is_beside_base(folder: Path) -> bool:
    """Whether a finished run's folder has an adapter alone, as its base is quantised."""
    has_adapter = (folder / "adapter" / "adapter_config.json").is_file() and (folder / "config.yaml").is_file()
    return has_adapter and not any(folder.glob("model*.safetensors"))


def plain_model(model: PreTrainedModel, state: Mapping[str, torch.Tensor]) -> PreTrainedModel:
    """A model of the same kind with nothing in it but these weights, neither adapters nor what quantises."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = type(model)(config)
    weights = dict(state)
    for name, module in plain.named_modules():
        if isinstance(module, Conv1D):  # dense weights are (out, in)
            weights[f"{name}.weight"] = weights[f"{name}.weight"].t().contiguous()
    plain.load_state_dict(weights, assign=True)
    plain.tie_weights()
    return plain


def with_adapter(folder: Path, adapter: Path) -> PreTrainedModel:
    """Return the base that a run began with, quantised as it was, and an adapter of it.

    Args:
        folder: The run's.
        adapter: PEFT's files.
    """
    from peft import PeftModel

    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    bits: Bits | None = 4 if config.get("load_in_4bit") else 8 if config.get("load_in_8bit") else None
    saved = load_config(folder)
    is_classifier = any("SequenceClassification" in name for name in saved.architectures or ())
    base = config["model_name_or_path"]
    try:
        base_folder = resolve_model(base, log=lambda line: print(line, file=sys.stderr))
    except ConfigError as error:
        hint = f"{folder / 'config.yaml'} says where its run had it"
        raise ConfigError(
            "model", "have its base where it was, beside which the adapter works", base, hint=hint
        ) from error
    model = load_model(
        base_folder,
        dtype=torch.bfloat16 if config.get("bf16") else torch.float32,
        task="sequence_classification" if is_classifier else "causal_lm",
        label_names=label_names(saved) if is_classifier else (),
        bits=bits,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )
    with silenced(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        try:
            PeftModel.from_pretrained(model, str(adapter), autocast_adapter_dtype=False)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            raise ConfigError("model", "hold an intact adapter", str(adapter), hint=one_line(error)) from error
    return model


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
