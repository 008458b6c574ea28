"""Where rows come from: files of a known format, a folder of them, or the model hub. All read by `datasets`."""

from __future__ import annotations

import glob
import re
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import huggingface_hub.errors
import pyarrow as pa
from datasets import Dataset, DatasetDict
from datasets.packaged_modules.cache.cache import Cache

from lsp_ray.data.quiet import quiet
from lsp_ray.data.text_file import check_csv, check_json
from lsp_ray.errors import ConfigError

Splits = Mapping[str, Dataset]

_BUILDERS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
_CHECKS = {"json": check_json, "csv": check_csv}
_SUFFIXES = ", ".join(_BUILDERS)

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

_UNREADABLE = (
    datasets.exceptions.DatasetsError,
    pa.ArrowException,
    OSError,
    ValueError,
    StopIteration,  # datasets' own answer to a JSON file without rows
    # what odd metadata in a Parquet file makes it raise
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
)
# httpx's, by whatever name the installed hub client imports it
_HTTP_ERROR: type[Exception] = huggingface_hub.errors.HTTPError  # type: ignore[attr-defined]
_HUB_TIMEOUT_S = 5.0
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.-]+)?")


def read_splits(name: str, *, cache_dir: Path | None = None) -> Splits:
    """Read every split that `name` has: train, validation or test for files, whatever it declares for a hub id.

    Args:
        name: A file, a folder, or `owner/name` on the hub, `owner/name:configuration` where it has several.
        cache_dir: Folder for the Arrow files that `datasets` maps into memory; its own cache unless given.

    Raises:
        ConfigError: Nothing is there, it cannot be read, or the hub cannot be reached; names the file.
    """
    with quiet():
        files = _files_of(name) if name else None
        if files is not None:
            return {split: _read_files(paths, cache_dir) for split, paths in files.items()}
        if _format(Path(name)) or not _HUB_ID.fullmatch(name):
            raise ConfigError("dataset", "be an existing file or folder, stdlib-docstrings or a hub id", name)
        return _read_hub(name, cache_dir)


def _files_of(name: str) -> dict[str, list[Path]] | None:
    """Return the files at the path `name` by split, or None if nothing is there."""
    try:
        path = Path(name).expanduser()
        if path.is_file():
            return {"train": [path]}
        return _files_by_split(path) if path.is_dir() else None
    except (OSError, RuntimeError) as error:  # RuntimeError: ~someone without a home
        raise ConfigError("dataset", "be a file or folder that can be read", name, hint=str(error)) from error


def _files_by_split(folder: Path) -> dict[str, list[Path]]:
    """Group the folder's data files, also one level down, by the split that their names tell; the rest is train.

    Unnamed files beside a named train split (a label list, dataset_info.json) are no rows and left out.
    """
    found = sorted(path for path in (*folder.glob("*"), *folder.glob("*/*")) if _format(path))
    groups: dict[str, list[Path]] = {}
    for path in found:
        inside = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in inside.parts):
            groups.setdefault(_split_of(inside), []).append(path)
    unnamed = groups.pop("", [])
    if unnamed and "train" not in groups:
        groups["train"] = unnamed
    if not groups:
        raise ConfigError("dataset", f"hold files of a known format ({_SUFFIXES})", str(folder))
    return groups


def _format(path: Path) -> str | None:
    return _BUILDERS.get(path.suffix.lower())


def _split_of(path: Path) -> str:
    words = re.findall(r"[a-z]+", path.with_suffix("").as_posix().lower())
    return next((_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS), "")


def _read_files(paths: Sequence[Path], cache_dir: Path | None) -> Dataset:
    builders = {_format(path) for path in paths}
    builder = builders.pop()
    if builder is None or builders:
        raise ConfigError("dataset", f"be files of one known format ({_SUFFIXES})", ", ".join(map(str, paths)))
    try:
        for path in paths:
            if builder in _CHECKS:
                _CHECKS[builder](path)
        rows = _read(builder, paths, cache_dir)
        # a reader that took any bytes for text would fail much later
        rows.data.table.validate(full=True)
    except ConfigError:
        raise
    except _UNREADABLE as error:
        if len(paths) > 1:
            for path in paths:
                _read_files([path], cache_dir)  # the file at fault fails again alone, and is named
        raise _unreadable(paths[0], builder, error) from error
    return rows


def _read(builder: str, paths: Sequence[Path], cache_dir: Path | None) -> Dataset:
    """Read files of one format with the readers of `datasets`; its `load_dataset` would tell the hub about it."""
    names = [glob.escape(str(path)) for path in paths]
    options: dict[str, Any] = {"cache_dir": str(cache_dir)} if cache_dir else {}
    if builder == "json":
        return Dataset.from_json(names, **options)
    if builder == "parquet":
        return Dataset.from_parquet(names, **options)
    # otherwise the texts "NA", "None" and "null" would turn into missing values
    return Dataset.from_csv(
        names, keep_default_na=False, sep="\t" if paths[0].suffix.lower() == ".tsv" else ",", **options
    )


def _unreadable(path: Path, builder: str, error: BaseException) -> ConfigError:
    """Return the one line for a file that `datasets` could not read."""
    if isinstance(error, StopIteration) or "corresponds to no data" in str(error) or not path.stat().st_size:
        return ConfigError("dataset", "have rows", str(path), hint="the file is empty")
    cause = error.__cause__ or error
    if isinstance(cause, UnicodeDecodeError) or "UTF8" in str(cause):
        return ConfigError("dataset", "be UTF-8 text", str(path), hint=_first_line(cause))
    return ConfigError("dataset", f"be well-formed {builder}", str(path), hint=_first_line(cause))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _read_hub(name: str, cache_dir: Path | None) -> Splits:
    hub_id, _, configuration = name.partition(":")
    cache = str(cache_dir) if cache_dir else None
    if not _hub_answers():
        return _read_cached(hub_id, configuration, cache)
    try:
        splits = datasets.load_dataset(hub_id, configuration or None, cache_dir=cache)
    except (*_UNREADABLE, _HTTP_ERROR) as error:
        hint = " ".join(str(error).split())[:300]
        raise ConfigError("dataset", "be a data set that the hub can serve", name, hint=hint) from error
    return dict(splits)


def _hub_answers() -> bool:
    """Ask once, for a few seconds: `datasets` itself would retry a dead connection for half a minute."""
    if huggingface_hub.constants.is_offline_mode():
        return False
    request = urllib.request.Request(huggingface_hub.constants.ENDPOINT, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=_HUB_TIMEOUT_S):
            return True
    except urllib.error.HTTPError as error:
        error.close()
        return True
    except OSError:
        return False


def _read_cached(hub_id: str, configuration: str, cache: str | None) -> Splits:
    try:
        builder = Cache(
            cache_dir=cache,
            repo_id=hub_id,
            dataset_name=hub_id.rpartition("/")[2],
            config_name=configuration or None,
            version="auto",
            hash="auto",
        )
        builder.download_and_prepare()
        splits = builder.as_dataset()
    except _UNREADABLE as error:
        hint = f"{huggingface_hub.constants.ENDPOINT} cannot be reached and the data set is not in the local cache"
        raise ConfigError("dataset", "be a file, a folder or a hub id within reach", hub_id, hint=hint) from error
    return dict(splits) if isinstance(splits, DatasetDict) else {"train": splits}
