"""Tasks: a model, its data, and how each method is set for it."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lsp_ray.config import Task as Kind
from lsp_ray.data.stdlib_docstrings import DocstringPair
from scripts.method_bench.memory import Shapes, equal_ranks, shapes_of

# adapters and one-sided projections want higher rates: their updates are smaller than full fine-tuning's
_RATES = {"lsp": 1e-4, "zero_offload": 1e-4, "native": 1e-4, "lora": 1e-3, "galore": 2e-4}
_GALORE_SCALE = {"--galore.scale": "4"}  # as its authors fine-tune
METHODS = tuple(_RATES)
SCORED = ("native", "lsp", "lora", "galore")  # zero_offload computes what native does


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """`score` is the name of the eval score that is shown beside the loss; `num_steps` of a run that is scored."""

    name: str
    model: str
    kind: Kind
    score: str
    num_steps: int
    options: Mapping[str, str]

    @property
    def shapes(self) -> Shapes:
        """Of its model."""
        return shapes_of(self.model, self.kind)

    def warmup(self, num_steps: int) -> Mapping[str, str]:
        """Options: a classifier's head starts at random, and without a slow start some seeds break down."""
        return {"--warmup_steps": str(num_steps // 10)} if self.kind == "sequence_classification" else {}

    @property
    def judged_by(self) -> str:
        """The score that methods are compared by: a small model's answers are nearly all wrong, so not by these."""
        return "accuracy" if self.score == "accuracy" else "loss"


def options_of(method: str, *, rate_factor: float = 1.0, shapes: Shapes | None = None) -> Mapping[str, str]:
    """Return a method's options: with its default ranks, or with those that keep equal bytes of these shapes."""
    own = dict(equal_ranks(shapes).get(method, {})) if shapes is not None else {}
    if method == "galore" and shapes is not None:
        own |= _GALORE_SCALE
    return {**own, "--learning_rate": f"{rate_of(method) * rate_factor:g}"}


def rate_of(method: str) -> float:
    """The learning rate of a method."""
    return _RATES[method]


def tasks(data_dir: Path | None, docstring_pairs: Path) -> dict[str, Task]:
    """Those that have data, by name.

    Args:
        data_dir: Holds folders gsm8k and sst2_glue.
        docstring_pairs: What `write_pairs` wrote.
    """
    found = [
        _language("docstrings", {"--dataset": "stdlib-docstrings"}, "perplexity", num_steps=100),
        _encoder("docstring-pairs", docstring_pairs, num_steps=300),
    ]
    if data_dir is not None:
        gsm8k = {"--dataset": str(data_dir / "gsm8k"), "--max_seq_length": "256", "--max_eval_answers": "32"}
        found.append(_language("gsm8k", gsm8k, "answer_accuracy", num_steps=60))
        found.append(_encoder("sst2", data_dir / "sst2_glue", num_steps=600))
    return {task.name: task for task in found}


def _language(name: str, options: Mapping[str, str], score: str, *, num_steps: int) -> Task:
    model = "smollm2-135m"
    return Task(name=name, model=model, kind="causal_lm", score=score, num_steps=num_steps, options=options)


def _encoder(name: str, data: Path, *, num_steps: int) -> Task:
    model = "all-minilm-l6-v2"
    options = {"--model_name_or_path": model, "--dataset": str(data), "--max_eval_samples": "872"}
    options |= {"--per_device_train_batch_size": "16"}
    kind: Kind = "sequence_classification"
    return Task(name=name, model=model, kind=kind, score="accuracy", num_steps=num_steps, options=options)


def write_pairs(path: Path, docstrings: Sequence[DocstringPair]) -> None:
    """A function's source and a docstring: label 1 where it is its own, 0 where it is another's; half and half."""
    generator = random.Random(0)
    pairs = generator.sample(docstrings, len(docstrings))
    with path.open("w", encoding="utf-8") as file:
        for at, pair in enumerate(pairs):
            label = at % 2
            docstring = pair.completion if label else pairs[at - 1].completion
            row = {"sentence1": docstring, "sentence2": pair.prompt.strip(), "label": label}
            file.write(json.dumps(row) + "\n")
