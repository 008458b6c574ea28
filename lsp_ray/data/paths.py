"""Files of a data set: which formats there are, and what lies at a path. Needs neither torch nor `datasets`."""

from __future__ import annotations

import re
from pathlib import Path

from lsp_ray.config import BUILT_IN_DATASET
from lsp_ray.errors import ConfigError

_FORMATS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
SUFFIXES = ", ".join(_FORMATS)

_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
    "test": "test",
    "testing": "test",
}
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.-]+)?")


def file_format(path: Path) -> str | None:
    """Return json, csv or parquet by the file's suffix, None where it has another."""
    return _FORMATS.get(path.suffix.lower())


def absolute_path(name: str) -> str:
    """Return the file or folder of this name from the root on, and any other name (an alias, a hub id) as it is."""
    try:
        path = Path(name).expanduser()
        return str(path.absolute()) if path.exists() else name
    except (OSError, RuntimeError, ValueError):
        return name


def files_of(name: str) -> dict[str, list[Path]] | None:
    """Return the files at the path `name` by split, or None where it must be a hub id.

    Raises:
        ConfigError: Nothing is there, or a folder without a file of a known format.
    """
    try:
        path = Path(name).expanduser()
        if name and path.is_file():
            if file_format(path) is None:
                raise ConfigError("dataset", f"be a file of a known format ({SUFFIXES})", name)
            return {"train": [path]}
        if name and path.is_dir():
            return _files_by_split(path)
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: ~someone without a home
        if isinstance(error, ConfigError):
            raise
        raise ConfigError("dataset", "be a file or folder that can be read", name, hint=str(error)) from error
    if file_format(path) or not _HUB_ID.fullmatch(name):
        raise ConfigError("dataset", f"be an existing file or folder, {BUILT_IN_DATASET} or a hub id", name)
    return None


def _files_by_split(folder: Path) -> dict[str, list[Path]]:
    """Group the folder's data files, also one level down, by the split that their names tell; the rest is train.

    Unnamed files beside a named train split (a label list, dataset_info.json) are no rows and left out.
    """
    found = sorted(path for path in (*folder.glob("*"), *folder.glob("*/*")) if file_format(path))
    groups: dict[str, list[Path]] = {}
    for path in found:
        inside = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in inside.parts):
            groups.setdefault(_split_of(inside), []).append(path)
    unnamed = groups.pop("", [])
    if unnamed and "train" not in groups:
        groups["train"] = unnamed
    if not groups:
        raise ConfigError("dataset", f"hold files of a known format ({SUFFIXES})", str(folder))
    return groups


def _split_of(path: Path) -> str:
    words = re.findall(r"[a-z]+", path.with_suffix("").as_posix().lower())
    return next((_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS), "")
