"""What a classifier's data set is labelled with: classes, by index and name, or the numbers of a regression."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from lsp_ray.data.dataset import Rows
from lsp_ray.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset

_CLASS_DTYPES = ("int", "uint", "bool", "string", "large_string")
_NUMBER_DTYPES = ("float", "int", "uint")
_LARGEST = (2.0 - 2.0**-23) * 2.0**127  # of float32, in which the loss sees labels


@dataclass(frozen=True, slots=True, kw_only=True)
class Classes:
    """Maps labels to class indices 0 … len(names) - 1."""

    filler: ClassVar[float] = -100
    """Stands where a row is unlabelled, in the type of `target`."""
    names: tuple[str, ...]
    index_of: dict[str, int] = field(repr=False)
    """Class index by a label's text; 1 and "1" are the same label, as one file may be CSV and the other JSON."""
    minus_is_none: bool = False
    """Whether rows have the label -1, which is no class."""

    def target(self, label: object) -> int | None:
        """Return the class index of `label`, or None where the row is unlabelled."""
        return None if label is None else self.index_of.get(str(label))


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """Takes labels as they are: the model has one output, which transformers calls regression."""

    filler: ClassVar[float] = -100.0
    """See `Classes`."""
    names: ClassVar[tuple[str, ...]] = ("LABEL_0",)
    """The name that transformers gives to an only output."""

    def target(self, label: object) -> float | None:
        """Return the label, or None where the row is unlabelled."""
        return None if label is None else float(str(label))


def read_labels(rows: Rows) -> Classes | Numbers:
    """Find the classes of both splits; labels that are floats in train, as STS-B has them, are no classes but numbers.

    A ClassLabel column brings its own names and order; other labels, whole numbers or words, are numbered in their
    sorted order. Null and the empty string mean unlabelled, and so does -1 in a split of its own where train has no -1
    (as in public test splits).

    Raises:
        ConfigError: Labels are neither (lists), there are fewer than two different ones, or one is no finite number.
    """
    from datasets import ClassLabel, Value

    feature = rows.train.features["label"]
    if isinstance(feature, ClassLabel):
        return _named_classes(rows, tuple(feature.names))
    if isinstance(feature, Value) and feature.dtype.startswith("float"):
        return _numbers(rows)
    known, held_out = _labels(rows.name, rows.train), _labels(rows.name, rows.eval)
    minus_is_none = rows.split_seed is None and "-1" in held_out - known  # which rows were drawn decides nothing
    names = _in_order(known | (held_out - {"-1"} if minus_is_none else held_out))
    if len(names) < 2:
        raise ConfigError("dataset", "have at least 2 classes in column 'label'", names, hint=f"in {rows.name}")
    indices = {name: index for index, name in enumerate(names)}
    return Classes(names=names, index_of=indices, minus_is_none=minus_is_none)


def _numbers(rows: Rows) -> Numbers:
    from datasets import Value

    for split in (rows.train, rows.eval):
        feature = split.features["label"]
        if not (isinstance(feature, Value) and feature.dtype.startswith(_NUMBER_DTYPES)):
            bound = "hold numbers in column 'label' of every split"
            raise ConfigError("dataset", bound, _dtype(split), hint=f"in {rows.name}, whose train split has floats")
        for label in split.unique("label"):
            if label is not None and not abs(label) <= _LARGEST:  # NaN is not either
                raise ConfigError("dataset", "hold finite numbers in column 'label'", label, hint=f"in {rows.name}")
    different = [label for label in rows.train.unique("label") if label is not None]
    if len(different) < 2:
        bound = "have at least 2 different numbers in column 'label'"
        raise ConfigError("dataset", bound, different, hint=f"in {rows.name}")
    return Numbers()


def _named_classes(rows: Rows, names: tuple[str, ...]) -> Classes:
    # a cast of the other split may have spelled its labels out
    by_name = {name: index for index, name in enumerate(names)}
    indices = by_name | {str(index): index for index in range(len(names))}
    found = _labels(rows.name, rows.train) | _labels(rows.name, rows.eval)
    unknown = found - {*indices, "-1"}
    if unknown:
        bound = f"hold labels from 0 to {len(names) - 1} in column 'label'"
        raise ConfigError("dataset", bound, ", ".join(sorted(unknown)[:3]), hint=f"in {rows.name}")
    return Classes(names=names, index_of=indices, minus_is_none="-1" in found - {*indices})


def _labels(name: str, rows: Dataset) -> set[str]:
    dtype = _dtype(rows)
    if not dtype.startswith(_CLASS_DTYPES):
        hint = f"in {name}; floats would mean regression, but not all of its labels are"
        hint = hint if dtype.startswith("float") else f"in {name}"
        raise ConfigError("dataset", "hold whole numbers or names in column 'label'", dtype, hint=hint)
    return {str(label) for label in rows.unique("label") if label is not None and label != ""}


def _dtype(rows: Dataset) -> str:
    from datasets import ClassLabel, Value

    feature = rows.features["label"]
    return feature.dtype if isinstance(feature, Value | ClassLabel) else str(feature)


def _in_order(labels: Iterable[str]) -> tuple[str, ...]:
    try:
        return tuple(sorted(labels, key=lambda label: (int(label), label)))
    except ValueError:
        return tuple(sorted(labels))
