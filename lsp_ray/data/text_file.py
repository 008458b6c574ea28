"""TextFile: the rows of a JSON or CSV file as Python's own json and csv modules read them, one at a time.

Readers that guess types make 731 of 00731, and take a file's first block for the whole of it. Here a CSV's values are
its text; a JSON value is what it is, and a number also knows how it is written.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lsp_ray.errors import ConfigError

MAX_LINE_CHARACTERS = 64 << 20
MAX_DEPTH = 64

Row = Mapping[str, object]


class WrittenFloat(float):
    """A number with its text, such as 2.00."""

    __slots__ = ("text",)
    text: str


class WrittenInt(int):
    """A whole number with its text, such as -0."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TextFile:
    """A JSON Lines, JSON, CSV or TSV file.

    `columns` are those of its head or, in JSON, of any row, in the order in which they appear; `rows` reads all rows
    anew, each with its number from 1, and raises ConfigError, which names the line, where a file is malformed.
    """

    path: Path
    columns: tuple[str, ...]
    rows: Callable[[], Iterator[tuple[int, Row]]]


def open_json(path: Path) -> TextFile:
    """Read through a file of one object a line or, in a .json file, of a list of objects or texts, or of columns.

    Objects in objects may go `MAX_DEPTH` deep, lines be `MAX_LINE_CHARACTERS` long.

    Raises:
        ConfigError: It is nothing of the kind; names the line.
    """
    rows = partial(_json_lines, path)
    try:
        columns = _keys(rows())
    except ConfigError:
        whole = _whole(path) if path.suffix.lower() == ".json" else None
        if whole is None:
            raise
        rows = partial(_numbered, whole)
        columns = _keys(rows())
    return TextFile(path=path, columns=columns, rows=rows)


def open_csv(path: Path) -> TextFile:
    """Read the head of a file of comma-separated values, of tabs where it is called .tsv; its first line names them.

    Raises:
        ConfigError: It has no head, or names a column twice.
    """
    with closing(_csv_values(path)) as found:
        _, head = next(found, (0, list[str]()))
    for column in head:
        if column and head.count(column) > 1:
            raise ConfigError("dataset", f"have only one column {column!r}", str(path))
    return TextFile(path=path, columns=tuple(head), rows=partial(_csv_rows, path))


def _csv_rows(path: Path) -> Iterator[tuple[int, Row]]:
    found = _csv_values(path)
    _, columns = next(found, (0, list[str]()))
    for number, (line, values) in enumerate(found, start=1):
        if len(values) != len(columns):
            fault = f"line {line}: {len(values)} values for {len(columns)} columns"
            raise ConfigError("dataset", "be well-formed csv", str(path), hint=fault)
        yield number, dict(zip(columns, values, strict=True))


def _csv_values(path: Path) -> Generator[tuple[int, list[str]], None, None]:
    """Yield the values of each line that has some, and the number of the line that they end in."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    # strict: an open quote is a fault, where csv would else guess
    reader = csv.reader(_csv_lines(path), delimiter=delimiter, strict=True)
    limit = csv.field_size_limit(MAX_LINE_CHARACTERS)
    try:
        for values in reader:
            if values:
                yield reader.line_num, values
    except csv.Error as error:
        hint = f"line {reader.line_num}: {error}"
        raise ConfigError("dataset", "be well-formed csv", str(path), hint=hint) from error
    finally:
        csv.field_size_limit(limit)


def _csv_lines(path: Path) -> Iterator[str]:
    for number, line in enumerate(_lines(path, newline=""), start=1):
        if "\0" in line:
            raise ConfigError("dataset", "be well-formed csv", str(path), hint=f"line {number}: a NUL character")
        yield line


def _json_lines(path: Path) -> Iterator[tuple[int, Row]]:
    lines = ((number, line) for number, line in enumerate(_lines(path), start=1) if line.strip())
    for row_number, (line_number, line) in enumerate(lines, start=1):
        yield row_number, _object(path, line_number, line)


def _lines(path: Path, newline: str | None = None) -> Iterator[str]:
    with path.open(encoding="utf-8-sig", newline=newline) as file:
        try:
            for number, line in enumerate(iter(partial(file.readline, MAX_LINE_CHARACTERS + 1), ""), start=1):
                if len(line) > MAX_LINE_CHARACTERS:
                    bound = f"have lines of at most {MAX_LINE_CHARACTERS} characters"
                    raise ConfigError("dataset", bound, str(path), hint=f"line {number} is longer")
                yield line
        except UnicodeDecodeError as error:
            raise ConfigError("dataset", "be UTF-8 text", str(path), hint=str(error)) from error


def _object(path: Path, number: int, line: str) -> Row:
    row: object = None
    try:
        row = _parsed(line)
        fault = "" if isinstance(row, dict) else "no object"
    except json.JSONDecodeError as error:
        fault = error.msg
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or brackets of thousands
        fault = str(error)
    if not fault and _is_deeper(row, MAX_DEPTH):
        fault = f"nested more than {MAX_DEPTH} deep"
    if fault or not isinstance(row, dict):
        raise ConfigError("dataset", "be well-formed json", str(path), hint=f"line {number}: {fault}")
    return row


def _whole(path: Path) -> list[Row] | None:
    """Return the rows of a file that is one value; None where no rows can be made of it."""
    try:
        value = _parsed(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    if _is_deeper(value, MAX_DEPTH):
        return None
    if isinstance(value, list) and all(isinstance(row, dict) for row in value):
        return value
    if isinstance(value, list) and all(isinstance(row, str) for row in value):
        return [{"text": row} for row in value]
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        return _of_columns(value)
    return None


def _of_columns(columns: Mapping[str, list[object]]) -> list[Row] | None:
    try:
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    except ValueError:  # they are not of one length
        return None


def _parsed(text: str) -> object:
    value: object = json.loads(text, parse_float=_float, parse_int=_int, parse_constant=_float)
    return value


def _float(text: str) -> WrittenFloat:
    number = WrittenFloat(text)
    number.text = text
    return number


def _int(text: str) -> WrittenInt:
    number = WrittenInt(text)
    number.text = text
    return number


def _keys(rows: Iterator[tuple[int, Row]]) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for _, row in rows:
        found.update(dict.fromkeys(row))
    return tuple(found)


def _numbered(rows: Sequence[Row]) -> Iterator[tuple[int, Row]]:
    yield from enumerate(rows, start=1)


def _is_deeper(value: object, levels: int) -> bool:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return bool(inside) and (levels == 0 or any(_is_deeper(item, levels - 1) for item in inside))
