"""Rows that a script gives: which of them can be learned from, and what is held out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import Subset

from lsp_ray.config import Task
from lsp_ray.data.tokenize import IGNORED
from lsp_ray.errors import ConfigError

HELD_OUT_SHARE = 10  # one row in so many is held out where no eval_dataset is given
CHECKED_ROWS = 20_000  # of a data set, so that the start takes seconds; a batch's labels are looked at again
_COLUMNS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "labels", "label", "label_ids")
_SHOWN = 5

Collate = Callable[[list[Any]], Mapping[str, Any]]


def split(train: Any, held_out: Any, *, seed: int) -> tuple[Any, Any]:
    """Return both data sets; a tenth of the first is held out where there is no second.

    Raises:
        ConfigError: One of them is no sequence, or has too few rows.
    """
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


def with_model_columns(rows: Any) -> Any:
    """Without the columns of a datasets.Dataset that no model takes, as transformers' Trainer does."""
    if not isinstance(rows, Dataset):
        return rows
    return rows.select_columns([name for name in rows.column_names if name in _COLUMNS])


def usable(name: str, rows: Any, *, max_length: int, note: Callable[[str], None]) -> Any:
    """Return the rows of a language model from which something is learned, and say how many are left out.

    Args:
        name: The data set's, for messages.
        rows: A sequence of mappings with token ids; other rows are taken as they are, for their collator to read.
        max_length: Positions of the model.
        note: Told what is left out.

    Raises:
        ConfigError: A row is too long, or in none is anything to learn.
    """
    empty: list[int] = []
    num_checked = min(len(rows), CHECKED_ROWS)
    for index in range(num_checked):
        row = rows[index]
        if not (isinstance(row, Mapping) and "input_ids" in row):
            return rows
        length = len(row["input_ids"])
        if length > max_length:
            hint = f"row {index} has more; cut it, as by the tokenizer's truncation=True, max_length={max_length}"
            raise ConfigError(
                name, f"have rows of at most {max_length} tokens, what the model takes", length, hint=hint
            )
        if length < 2 or not _has_target(row):
            empty.append(index)
    if len(empty) == len(rows):
        raise ConfigError(
            name, "have a row of 2 tokens or more with a label that is not -100 after its first", len(rows)
        )
    if not empty:
        return rows
    shown = ", ".join(map(str, empty[:_SHOWN])) + (" …" if len(empty) > _SHOWN else "")
    note(f"{name}: {len(empty)} rows are left out, as nothing is learned from one token or all labels -100: {shown}")
    gone = set(empty)
    return _chosen(rows, [index for index in range(len(rows)) if index not in gone])


def _has_target(row: Mapping[str, Any]) -> bool:
    """Whether a token after the first has a label; a row without labels gets them from its collator."""
    labels = row.get("labels")
    return labels is None or any(label != IGNORED for label in torch.as_tensor(labels).reshape(-1)[1:].tolist())


def check_labels(row: Any, collate: Collate, task: Task) -> None:
    """Raise ConfigError where neither a row nor its collator has labels."""
    if _label(row) is None and task == "causal_lm":
        batch = collate([row])
        if not isinstance(batch.get("labels"), torch.Tensor):
            hint = "DataCollatorForLanguageModeling(tokenizer, mlm=False) makes labels of the input"
            found = sorted(row) if isinstance(row, Mapping) else type(row).__name__
            raise ConfigError("train_dataset", "have labels, or a data_collator that makes them", found, hint=hint)


def task_of(row: Any) -> Task:
    """A class is one number; what has a list of labels, or none before it is collated, is a language model's."""
    label = _label(row)
    return "causal_lm" if label is None or torch.as_tensor(label).ndim else "sequence_classification"


def check_classes(row: Mapping[str, Any], names: Sequence[str]) -> None:
    """As transformers has it: one output learns floats, several tell classes apart.

    Raises:
        ConfigError: The label is of the other kind.
    """
    label = _label(row)
    if torch.as_tensor(label).is_floating_point() != (len(names) == 1):
        kind = "floats" if len(names) == 1 else "whole numbers"
        raise ConfigError("train_dataset", f"have labels that are {kind} where num_labels is {len(names)}", label)


def _label(row: Any) -> Any:
    if not isinstance(row, Mapping):
        return None
    return next((row[name] for name in ("labels", "label", "label_ids") if row.get(name) is not None), None)


def _chosen(rows: Any, indices: list[int]) -> Any:
    return rows.select(indices) if isinstance(rows, Dataset) else Subset(rows, indices)
