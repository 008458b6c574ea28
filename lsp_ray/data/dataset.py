"""Rows: a data set by name, in one of the shapes that people have, with a held-out split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc

from lsp_ray.config import Task
from lsp_ray.data.quiet import quiet
from lsp_ray.data.stdlib_docstrings import DocstringPair, stdlib_pairs
from lsp_ray.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset

    from lsp_ray.data.source import Splits

STDLIB_DOCSTRINGS = "stdlib-docstrings"

_HELD_OUT_SHARE = 0.1
_MAX_HELD_OUT = 2000  # more rows make eval loss no steadier, and are missed in training
_MAX_TEXT_BYTES = 10_000_000  # two Bibles; tokenising all of what is then cut off would look like a hang


class Shape(StrEnum):
    """What a row holds; the columns in brackets are the names used from here on."""

    MESSAGES = "messages"
    """A conversation (messages: list of role and content)."""
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


def load_rows(name: str, *, seed: int, cache_dir: Path | None = None) -> Rows:
    """Load a data set and hold rows out where it brings no labelled validation or test split.

    Held out is a tenth of the train split, at most 2,000 rows, drawn by `seed`.

    Args:
        name: `stdlib-docstrings`, a JSONL, JSON, CSV, TSV or Parquet file, a folder of those, or a hub id, with
            `:configuration` after it where the hub has several.
        seed: Seed of what is held out.
        cache_dir: Folder for Arrow files; that of `datasets` unless given. Nothing is written beside the user's files.

    Raises:
        ConfigError: Field `dataset`: it is missing, cannot be read, has no known shape, no rows, only one row that
            cannot be split, a null or something other than text in a text column.
    """
    if name == STDLIB_DOCSTRINGS:
        return _load_stdlib()
    from lsp_ray.data.source import read_splits

    splits = read_splits(name, cache_dir=cache_dir)
    with quiet():
        return _rows_of(name, splits, seed)


def _rows_of(name: str, splits: Splits, seed: int) -> Rows:
    main = splits[_main_split(splits)]
    shape, columns = _form(name, main.column_names)
    train = _normalised(name, columns, main)
    if not len(train):
        raise ConfigError("dataset", "have rows", name)
    for split in _eval_splits(splits):
        if set(columns) <= set(splits[split].column_names):
            held_out = _normalised(name, columns, splits[split])
            if len(held_out) and (shape.task == "causal_lm" or _is_labelled(held_out)):
                return Rows(name=name, shape=shape, train=train, eval=held_out)
    return _split(name, shape, train, seed)


def _load_stdlib() -> Rows:
    pairs = stdlib_pairs()
    train, held_out = (_as_dataset([pair for pair in pairs if pair.is_held_out is side]) for side in (False, True))
    if not len(train) or not len(held_out):
        raise ConfigError("dataset", "be something else: this Python has no library sources", STDLIB_DOCSTRINGS)
    return Rows(name=STDLIB_DOCSTRINGS, shape=Shape.PROMPT_COMPLETION, train=train, eval=held_out)


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


def _normalised(name: str, columns: Mapping[str, str], rows: Dataset) -> Dataset:
    """Return `rows` with the shape's own columns alone, each text column a string without nulls."""
    rows = rows.select_columns(list(columns)).rename_columns({old: new for old, new in columns.items() if old != new})
    spelled = {new: old for old, new in columns.items()}
    for column, original in spelled.items():
        if column == "input":
            rows = _without_nulls(rows, column)
        if column not in ("messages", "label"):
            rows = _as_text(name, original, column, rows)
        if column != "label":
            _check_no_null(name, original, rows.data.column(column))
        if column not in ("messages", "label"):
            check_length(name, original, pc.max(pc.binary_length(rows.data.column(column))).as_py())
    return rows


def _without_nulls(rows: Dataset, column: str) -> Dataset:
    """Return `rows` with empty strings where an optional column is null."""
    if not rows.data.column(column).null_count:
        return rows
    filled = [value if value is not None else "" for value in rows[column]]
    return rows.remove_columns([column]).add_column(column, filled)


def _as_text(name: str, spelled: str, column: str, rows: Dataset) -> Dataset:
    from datasets import Value

    feature = rows.features[column]
    dtype = feature.dtype if isinstance(feature, Value) else ""
    if dtype in ("string", "large_string", "null"):
        return rows
    if dtype.startswith(("int", "uint", "float", "bool")):
        # numbers are what a CSV reader makes of short answers
        return rows.cast_column(column, Value("string"))
    raise ConfigError("dataset", f"hold text in column '{spelled}'", str(feature), hint=f"in {name}")


def _check_no_null(name: str, spelled: str, values: Any) -> None:
    if values.null_count:
        at = values.is_null().to_pylist().index(True) + 1
        hint = f"row {at} of {name} has none, as have {values.null_count - 1} others"
        raise ConfigError("dataset", f"have a value in every row of column '{spelled}'", None, hint=hint)


def check_length(name: str, spelled: str, num_bytes: int | None) -> None:
    """Raise ConfigError where a row's text in a column is too long; None: there is no row."""
    if num_bytes is not None and num_bytes > _MAX_TEXT_BYTES:
        bound = f"hold at most {_MAX_TEXT_BYTES} bytes of text in a row of column '{spelled}'"
        raise ConfigError("dataset", bound, num_bytes, hint=f"in {name}; max_seq_length would cut most of it off")


def _is_labelled(rows: Dataset) -> bool:
    """Tell whether any row has a label: public test splits of benchmarks have null, -1 or nothing there."""
    from datasets import ClassLabel, Value

    feature = rows.features["label"]
    return isinstance(feature, ClassLabel | Value) and any(
        value not in (None, "", -1) for value in rows.unique("label")
    )


def _split(name: str, shape: Shape, rows: Dataset, seed: int) -> Rows:
    if len(rows) < 2:
        raise ConfigError("dataset", "have at least 2 rows, one of them to hold out", len(rows), hint=f"in {name}")
    num_held_out = min(max(1, int(len(rows) * _HELD_OUT_SHARE)), _MAX_HELD_OUT)
    parts = rows.train_test_split(test_size=num_held_out, seed=seed)
    return Rows(name=name, shape=shape, train=parts["train"], eval=parts["test"])
