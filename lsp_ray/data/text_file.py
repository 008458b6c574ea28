"""TextFile: what a JSON or CSV file is checked for before `datasets` reads it.

Its readers trust a file more than one should: pyarrow's ends the process (a segmentation fault, no exception) on a line
`null` or thousands of brackets, archives are unpacked whatever their name is, and a line without end is read whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from lsp_ray.errors import ConfigError

MAX_LINE_CHARACTERS = 64 << 20
MAX_DEPTH = 64


def check_json(path: Path) -> None:
    """Raise ConfigError unless each line is an object or, in a .json file, all of it is a list of objects or of texts.

    Objects in objects may go `MAX_DEPTH` deep, lines be `MAX_LINE_CHARACTERS` long.
    """
    try:
        for number, line in enumerate(_lines(path), start=1):
            _check_object(path, number, line)
    except ConfigError:
        if path.suffix.lower() != ".json" or not _is_whole(path):
            raise


def check_csv(path: Path) -> None:
    """Raise ConfigError where a file is not text."""
    for number, line in enumerate(_lines(path), start=1):
        if "\0" in line:
            raise ConfigError("dataset", "be well-formed csv", str(path), hint=f"line {number}: a NUL character")


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig") as file:
        try:
            for number, line in enumerate(iter(partial(file.readline, MAX_LINE_CHARACTERS + 1), ""), start=1):
                if len(line) > MAX_LINE_CHARACTERS:
                    bound = f"have lines of at most {MAX_LINE_CHARACTERS} characters"
                    raise ConfigError("dataset", bound, str(path), hint=f"line {number} is longer")
                yield line
        except UnicodeDecodeError as error:
            raise ConfigError("dataset", "be UTF-8 text", str(path), hint=str(error)) from error


def _check_object(path: Path, number: int, line: str) -> None:
    if not line.strip():
        return
    try:
        row = json.loads(line)
        fault = "" if isinstance(row, dict) else "no object"
    except json.JSONDecodeError as error:
        row, fault = None, error.msg
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or brackets of thousands
        row, fault = None, str(error)
    if not fault and _is_deeper(row, MAX_DEPTH):
        fault = f"nested more than {MAX_DEPTH} deep"
    if fault:
        raise ConfigError("dataset", "be well-formed json", str(path), hint=f"line {number}: {fault}")


def _is_whole(path: Path) -> bool:
    """Tell whether the file is one value of which rows can be made."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError):
        return False
    same = any(all(isinstance(row, kind) for row in rows) for kind in (dict, str)) if isinstance(rows, list) else False
    return (same or isinstance(rows, dict)) and not _is_deeper(rows, MAX_DEPTH)


def _is_deeper(value: object, levels: int) -> bool:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return bool(inside) and (levels == 0 or any(_is_deeper(item, levels - 1) for item in inside))
