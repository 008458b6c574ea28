"""Rows: a data set by name, in one of the shapes that people have, with a held-out split."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lsp_ray.config import BUILT_IN_DATASET, Task
from lsp_ray.data.columns import Column, ConversationColumn, JsonColumn, LabelColumn, TextColumn, check_length
from lsp_ray.data.quiet import quiet
from lsp_ray.data.stdlib_docstrings import DocstringPair, stdlib_pairs
from lsp_ray.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset

    from lsp_ray.data.source import Source, Splits

_HELD_OUT_SHARE = 0.1
_MAX_HELD_OUT = 2000  # more rows make eval loss no steadier, and are missed in training


class Shape(StrEnum):
    """What a row holds; the columns in brackets are the names used from here on."""

    MESSAGES = "messages"
    """A conversation (messages: JSON of a list of role and content), and what else its template reads."""
    ALPACA = "alpaca"
    """An instruction, sometimes an input, and the answer (instruction, input, output)."""
    PROMPT_COMPLETION = "prompt_completion"
    """A text and how it goes on (prompt, completion)."""
    SENTENCE_PAIR = "sentence_pair"
    """Two texts and their class, or how alike they are (sentence1, sentence2, label)."""
    SENTENCE = "sentence"
    """A text and its class, or a number (sentence, label)."""
    TEXT = "text"
    """Plain text (text)."""

    @property
    def task(self) -> Task:
        """The kind of model that learns from such rows."""
        return "sequence_classification" if self in (Shape.SENTENCE, Shape.SENTENCE_PAIR) else "causal_lm"


# Looked for in this order: the columns that a data set must have -> the names they get. Others are left out.
_FORMS: Sequence[tuple[Shape, Mapping[str, str]]] = (
    (Shape.MESSAGES, {"messages": "messages"}),
    (Shape.MESSAGES, {"conversations": "messages"}),
    (Shape.ALPACA, {"instruction": "instruction", "output": "output"}),
    (Shape.PROMPT_COMPLETION, {"prompt": "prompt", "completion": "completion"}),
    (Shape.SENTENCE_PAIR, {"sentence1": "sentence1", "sentence2": "sentence2", "label": "label"}),
    (Shape.SENTENCE_PAIR, {"premise": "sentence1", "hypothesis": "sentence2", "label": "label"}),
    (Shape.SENTENCE, {"sentence": "sentence", "label": "label"}),
    (Shape.SENTENCE, {"text": "sentence", "label": "label"}),
    (Shape.PROMPT_COMPLETION, {"question": "prompt", "answer": "completion"}),
    (Shape.TEXT, {"text": "text"}),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """A data set of one shape. Text columns are strings without nulls; both splits have at least one row."""

    name: str
    """The data set as the user named it."""
    shape: Shape
    train: Dataset
    eval: Dataset
    split_seed: int | None = None
    """Seed by which `eval` was drawn from one split, None where the data set brought it."""
    row_numbers: tuple[Sequence[int], Sequence[int]] | None = None
    """Of `train` and `eval` in the file, from 1, where they are not simply counted."""
    notes: tuple[str, ...] = ()
    """What a person would want to know of what was read, a line each."""


def load_rows(name: str, *, seed: int, cache_dir: Path | None = None, template_columns: Collection[str] = ()) -> Rows:
    """Load a data set and hold rows out where it brings no labelled validation or test split.

    Held out is a tenth of the train split, at most 2,000 rows, drawn by `seed`.

    Args:
        name: `stdlib-docstrings`, a JSONL, JSON, CSV, TSV or Parquet file, a folder of those, or a hub id, with
            `:configuration` after it where the hub has several.
        seed: Seed of what is held out.
        cache_dir: Folder for Arrow files; that of `datasets` unless given. Nothing is written beside the user's files.
        template_columns: What the chat template reads beside the messages; such columns of conversations are kept.

    Raises:
        ConfigError: Field `dataset`: it is missing, cannot be read, has no known shape, no rows, only one row that
            cannot be split, a null or something other than text in a text column.
    """
    if name == BUILT_IN_DATASET:
        return _load_stdlib()
    from lsp_ray.data.source import read_splits

    splits = read_splits(name, cache_dir=cache_dir)
    with quiet():
        return _rows_of(name, splits, seed, template_columns)


def _rows_of(name: str, splits: Splits, seed: int, template_columns: Collection[str]) -> Rows:
    main = splits[_main_split(splits)]
    if not main.columns:
        raise ConfigError("dataset", "have rows", name)
    shape, columns = _form(name, main.columns)
    notes: list[str] = []
    train = _read(name, shape, columns, main, template_columns, notes)
    if not len(train):
        raise ConfigError("dataset", "have rows", name)
    for split in _eval_splits(splits):
        lacking = sorted(set(columns).difference(splits[split].columns))
        if lacking:
            notes.append(f"{split} rows are not used, as they have no column {', '.join(lacking)}")
            continue
        held_out = _read(name, shape, columns, splits[split], template_columns, notes)
        if len(held_out) and (shape.task == "causal_lm" or _is_labelled(held_out)):
            held_out = _with_columns(held_out, train.column_names)
            return Rows(name=name, shape=shape, train=train, eval=held_out, notes=_unique(notes))
        notes.append(f"{split} rows are not used, as {'none has a label' if len(held_out) else 'there are none'}")
    return _split(name, shape, train, seed, _unique(notes))


def _unique(notes: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(notes))


def _load_stdlib() -> Rows:
    pairs = stdlib_pairs()
    train, held_out = (_as_dataset([pair for pair in pairs if pair.is_held_out is side]) for side in (False, True))
    if not len(train) or not len(held_out):
        raise ConfigError("dataset", "be something else: this Python has no library sources", BUILT_IN_DATASET)
    return Rows(name=BUILT_IN_DATASET, shape=Shape.PROMPT_COMPLETION, train=train, eval=held_out)


def _as_dataset(pairs: Sequence[DocstringPair]) -> Dataset:
    from datasets import Dataset

    columns = {"prompt": [pair.prompt for pair in pairs], "completion": [pair.completion for pair in pairs]}
    return Dataset.from_dict(columns)


def _main_split(splits: Splits) -> str:
    return "train" if "train" in splits else next(iter(splits))


def _eval_splits(splits: Splits) -> list[str]:
    """Name the splits to hold out, best first; hub data sets also have such as validation_matched."""
    others = [split for split in splits if split != _main_split(splits)]
    return [split for word in ("validation", "dev", "test") for split in others if split.startswith(word)]


def _form(name: str, columns: Sequence[str]) -> tuple[Shape, dict[str, str]]:
    """Return the shape that `columns` have, and the new name of each column it takes."""
    for shape, renamed in _FORMS:
        if set(renamed) <= set(columns):
            optional = {"input": "input"} if shape is Shape.ALPACA and "input" in columns else {}
            return shape, {**renamed, **optional}
    known = ", ".join("/".join(renamed) for _, renamed in _FORMS)
    raise ConfigError("dataset", f"have the columns of a known shape ({known})", "/".join(columns), hint=f"in {name}")


def _read(
    name: str,
    shape: Shape,
    columns: Mapping[str, str],
    source: Source,
    template_columns: Collection[str],
    notes: list[str],
) -> Dataset:
    """Return rows with the shape's own columns alone, each text column a string without nulls."""
    read: dict[str, Column] = {old: _column(new, old, source) for old, new in columns.items()}
    if shape is Shape.MESSAGES:
        kept = [column for column in source.columns if column in template_columns and column not in columns]
        read |= {column: JsonColumn(column) for column in kept}
    left_out = [column for column in source.columns if column not in read]
    if left_out:
        notes.append(f"columns not used: {', '.join(left_out[:8])}{' …' if len(left_out) > 8 else ''}")
    rows = source.read(read)
    for original, column in columns.items():
        rows = _checked(name, original, column, rows)
    notes += _notes(read)
    for original, handler in read.items():
        if isinstance(handler, LabelColumn) and source.kind != "typed":
            rows = _with_labels(rows, original, handler, notes)
    return rows.rename_columns({old: new for old, new in columns.items() if old != new})


def _column(column: str, spelled: str, source: Source) -> Column:
    if column == "messages":
        return ConversationColumn(spelled, typed=source.kind == "typed")
    return LabelColumn(spelled, written=source.kind == "csv") if column == "label" else TextColumn(spelled)


def _checked(name: str, original: str, column: str, rows: Dataset) -> Dataset:
    if column == "input":
        rows = _without_nulls(rows, original)
    if column == "label":
        return rows
    values = rows.data.column(original)
    _check_no_null(name, original, values)
    if column != "messages":
        check_length(pc.max(pc.binary_length(values)).as_py(), original, where=name)
    return rows


def _notes(read: Mapping[str, Column]) -> list[str]:
    notes = []
    for name, column in read.items():
        if isinstance(column, TextColumn):
            for kind, count in column.others.items():
                notes.append(f"column '{name}' has {kind} in {count} rows, which are read as their text")
        if isinstance(column, ConversationColumn):
            notes += column.notes()
    return notes


def _with_labels(rows: Dataset, original: str, column: LabelColumn, notes: list[str]) -> Dataset:
    """Return rows whose labels have a type."""
    labels = column.typed(rows[original][:])
    if column.was_whole_floats:
        notes.append(f"column '{original}' has whole numbers such as 1.0 beside gaps, which are taken for classes")
    order = rows.column_names
    return rows.remove_columns([original]).add_column(original, pa.array(labels)).select_columns(order)


def _without_nulls(rows: Dataset, column: str) -> Dataset:
    """Return `rows` with empty strings where an optional column is null."""
    if not rows.data.column(column).null_count:
        return rows
    filled = [value if value is not None else "" for value in rows[column]]
    return rows.remove_columns([column]).add_column(column, filled)


def _with_columns(rows: Dataset, columns: Sequence[str]) -> Dataset:
    """Return `rows` with `columns` alone, null where a template's is missing: both splits are encoded alike."""
    for column in columns:
        if column not in rows.column_names:
            rows = rows.add_column(column, pa.array([None] * len(rows), pa.string()))
    return rows.select_columns(list(columns))


def _check_no_null(name: str, spelled: str, values: Any) -> None:
    if values.null_count:
        at = values.is_null().to_pylist().index(True) + 1
        hint = f"row {at} of {name} has none, as have {values.null_count - 1} others"
        raise ConfigError("dataset", f"have a value in every row of column '{spelled}'", None, hint=hint)


def _is_labelled(rows: Dataset) -> bool:
    """Tell whether any row has a label: public test splits of benchmarks have null, -1 or nothing there."""
    from datasets import ClassLabel, Value

    feature = rows.features["label"]
    return isinstance(feature, ClassLabel | Value) and any(
        value not in (None, "", -1) for value in rows.unique("label")
    )


def _split(name: str, shape: Shape, rows: Dataset, seed: int, notes: tuple[str, ...]) -> Rows:
    if len(rows) < 2:
        raise ConfigError("dataset", "have at least 2 rows, one of them to hold out", len(rows), hint=f"in {name}")
    train, held_out = split_indices(len(rows), seed)
    return Rows(
        name=name,
        shape=shape,
        train=rows.select(train),
        eval=rows.select(held_out),
        split_seed=seed,
        row_numbers=([at + 1 for at in train], [at + 1 for at in held_out]),
        notes=notes,
    )


def split_indices(num_rows: int, seed: int) -> tuple[list[int], list[int]]:
    """Return which of the rows to train on and which to hold out, as `Dataset.train_test_split` draws them."""
    num_held_out = min(max(1, int(num_rows * _HELD_OUT_SHARE)), _MAX_HELD_OUT)
    order = np.random.default_rng(seed).permutation(num_rows).tolist()
    return order[num_held_out:], order[:num_held_out]
