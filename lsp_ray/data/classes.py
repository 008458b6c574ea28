"""The classes of a classifier's data set: from whatever stands in its label column to indices and names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from datasets import ClassLabel, Dataset, Value

from lsp_ray.data.dataset import Rows
from lsp_ray.errors import ConfigError

_CLASS_DTYPES = ("int", "uint", "bool", "string", "large_string")


@dataclass(frozen=True, slots=True, kw_only=True)
class Classes:
    """Maps labels to class indices 0 … len(names) - 1."""

    names: tuple[str, ...]
    index_of: dict[str, int] = field(repr=False)
    """Class index by a label's text; 1 and "1" are the same label, as one file may be CSV and the other JSON."""

    def index(self, label: object) -> int | None:
        """Return the class index of `label`, or None where the row is unlabelled."""
        return None if label is None else self.index_of.get(str(label))


def read_classes(rows: Rows) -> Classes:
    """Find the classes of both splits.

    A ClassLabel column brings its own names and order; other labels, numbers or words, are numbered in their sorted
    order. Null and the empty string mean unlabelled, and so does -1 where train has no -1 (as in public test splits).

    Raises:
        ConfigError: Labels are no classes (floats of a regression, lists), or there are fewer than two classes.
    """
    feature = rows.train.features["label"]
    if isinstance(feature, ClassLabel):
        return _named_classes(rows, tuple(feature.names))
    known = _labels(rows.name, rows.train)
    known |= _labels(rows.name, rows.eval) - {"-1"}
    names = _in_order(known)
    if len(names) < 2:
        raise ConfigError("dataset", "have at least 2 classes in column 'label'", names, hint=f"in {rows.name}")
    return Classes(names=names, index_of={name: index for index, name in enumerate(names)})


def _named_classes(rows: Rows, names: tuple[str, ...]) -> Classes:
    # a cast of the other split may have spelled its labels out
    by_name = {name: index for index, name in enumerate(names)}
    classes = Classes(names=names, index_of=by_name | {str(index): index for index in range(len(names))})
    unknown = (_labels(rows.name, rows.train) | _labels(rows.name, rows.eval)) - {*classes.index_of, "-1"}
    if unknown:
        bound = f"hold labels from 0 to {len(names) - 1} in column 'label'"
        raise ConfigError("dataset", bound, ", ".join(sorted(unknown)[:3]), hint=f"in {rows.name}")
    return classes


def _labels(name: str, rows: Dataset) -> set[str]:
    feature = rows.features["label"]
    dtype = feature.dtype if isinstance(feature, Value | ClassLabel) else str(feature)
    if not dtype.startswith(_CLASS_DTYPES):
        hint = f"in {name}; regression is not supported" if dtype.startswith("float") else f"in {name}"
        raise ConfigError("dataset", "hold whole numbers or names in column 'label'", dtype, hint=hint)
    return {str(label) for label in rows.unique("label") if label is not None and label != ""}


def _in_order(labels: Iterable[str]) -> tuple[str, ...]:
    try:
        return tuple(sorted(labels, key=int))
    except ValueError:
        return tuple(sorted(labels))
