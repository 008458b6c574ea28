"""Tasks: a model, its data, and how each method is set for it."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lsp_ray.data.stdlib_docstrings import stdlib_pairs

_NUM_PAIRS = 4000

# With ranks of 8, LoRA and GaLore take more of the device than LSP at r = 4 does; the page says how much. They want
# higher rates, as their updates are smaller than full fine-tuning's.
METHOD_OPTIONS: Mapping[str, Mapping[str, str]] = {
    "lsp": {"--learning_rate": "1e-4"},
    "zero_offload": {"--learning_rate": "1e-4"},
    "native": {"--learning_rate": "1e-4"},
    "lora": {"--learning_rate": "1e-3", "--lora.r": "8", "--lora.lora_alpha": "16"},
    "galore": {"--learning_rate": "2e-4", "--galore.rank": "8", "--galore.scale": "4"},
}
METHODS = tuple(METHOD_OPTIONS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """`score` is the name of the eval score that is compared beside the loss."""

    name: str
    score: str
    options: Mapping[str, str]


def tasks(data_dir: Path | None, scratch: Path) -> dict[str, Task]:
    """Those whose data are there, by name. `data_dir` holds folders gsm8k and sst2_glue; the others need no files."""
    pairs = scratch / "docstring_pairs.jsonl"
    _write_pairs(pairs)
    found = [
        Task(name="docstrings", score="perplexity", options={"--dataset": "stdlib-docstrings"}),
        _encoder("docstring-pairs", pairs),
    ]
    if data_dir is not None:
        gsm8k = {"--dataset": str(data_dir / "gsm8k"), "--max_seq_length": "256", "--max_eval_answers": "64"}
        found.append(Task(name="gsm8k", score="answer_accuracy", options=gsm8k))
        found.append(_encoder("sst2", data_dir / "sst2_glue"))
    return {task.name: task for task in found}


def _encoder(name: str, data: Path) -> Task:
    options = {"--model_name_or_path": "all-minilm-l6-v2", "--dataset": str(data), "--max_eval_samples": "872"}
    return Task(name=name, score="accuracy", options=options | {"--per_device_train_batch_size": "16"})


def _write_pairs(path: Path) -> None:
    """A function's source and a docstring: label 1 where it is its own, 0 where it is another's; half and half."""
    generator = random.Random(0)
    pairs = generator.sample(stdlib_pairs(), _NUM_PAIRS)
    with path.open("w", encoding="utf-8") as file:
        for at, pair in enumerate(pairs):
            label = at % 2
            docstring = pair.completion if label else pairs[at - 1].completion
            row = {"sentence1": docstring, "sentence2": pair.prompt.strip(), "label": label}
            file.write(json.dumps(row) + "\n")
