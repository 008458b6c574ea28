"""Where rows come from: files of a known format, a folder of them, or the model hub."""

from __future__ import annotations

import glob
import hashlib
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol
from uuid import uuid4

import datasets
import huggingface_hub.constants
import huggingface_hub.errors
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, Features, Value
from datasets.packaged_modules.cache.cache import Cache

from lsp_ray.data.columns import Column, LabelColumn, TextColumn
from lsp_ray.data.paths import SUFFIXES, file_format, files_of
from lsp_ray.data.quiet import quiet
from lsp_ray.data.text_file import TextFile, open_csv, open_json
from lsp_ray.errors import ConfigError

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
_BATCH_ROWS, _BATCH_CHARACTERS = 1000, 16 << 20  # written at once


Kind = Literal["csv", "json", "typed"]


class Source(Protocol):
    """A split that is not read yet."""

    @property
    def columns(self) -> Sequence[str]:
        """Names of all of its columns."""

    @property
    def kind(self) -> Kind:
        """Whether values have no types but what is written (csv), each its own (json), or a column's (typed)."""

    def read(self, columns: Mapping[str, Column]) -> Dataset:
        """Return these columns alone, each row's value as `Column.keep` has it.

        Raises:
            ConfigError: Names the row.
        """


Splits = Mapping[str, Source]


def read_splits(name: str, *, cache_dir: Path | None = None) -> Splits:
    """Find every split that `name` has: train, validation or test for files, whatever it declares for a hub id.

    Args:
        name: A file, a folder, or `owner/name` on the hub, `owner/name:configuration` where it has several.
        cache_dir: Folder for the Arrow files that are mapped into memory; that of `datasets` unless given.

    Raises:
        ConfigError: Nothing is there, it cannot be read, or the hub cannot be reached; names the file.
    """
    files = files_of(name)
    cache = _writable(cache_dir or Path(datasets.config.HF_DATASETS_CACHE), name)
    with quiet():
        if files is not None:
            return {split: _files_source(paths, cache) for split, paths in files.items()}
        return {split: TypedSource(rows, name) for split, rows in _read_hub(name, str(cache)).items()}


def _writable(cache: Path, name: str) -> Path:
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            return cache
    except OSError as error:
        hint = f"{error.strerror}; HF_DATASETS_CACHE moves the cache"
        raise ConfigError("dataset", f"be convertible into the cache {cache}", name, hint=hint) from error


def _files_source(paths: Sequence[Path], cache: Path) -> Source:
    formats = {file_format(path) for path in paths}
    if len(formats) > 1:
        raise ConfigError("dataset", f"be files of one known format ({SUFFIXES})", ", ".join(map(str, paths)))
    if formats == {"parquet"}:
        return _ParquetSource(paths, cache)
    if formats == {"csv"}:
        return _TextSource("csv", [open_csv(path) for path in paths], cache)
    return _TextSource("json", [open_json(path) for path in paths], cache)


class _TextSource:
    """Rows of text files, kept as text columns in an Arrow file of the cache."""

    def __init__(self, kind: Kind, files: Sequence[TextFile], cache: Path) -> None:
        self.kind: Kind = kind
        self._files, self._cache = files, cache
        self.columns = tuple(dict.fromkeys(column for file in files for column in file.columns))

    def read(self, columns: Mapping[str, Column]) -> Dataset:
        """See `Source`."""
        schema = pa.schema([(column, pa.string()) for column in columns])
        folder = self._cache / "lsp_ray" / self._identity(columns)
        target, staging = folder / "rows.arrow", folder / f".{uuid4().hex}"
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with pa.OSFile(str(staging), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
                for batch in _batches(self._kept(columns)):
                    writer.write_batch(pa.record_batch(list(zip(*batch, strict=True)), schema=schema))
            staging.replace(target)  # a run that maps the old one keeps it
        finally:
            staging.unlink(missing_ok=True)
        return Dataset.from_file(str(target))

    def _identity(self, columns: Iterable[str]) -> str:
        """Differs where a file or the choice of columns does, as an actor that starts late maps the same file."""
        facts = [
            (str(file.path.absolute()), file.path.stat().st_size, file.path.stat().st_mtime_ns) for file in self._files
        ]
        return hashlib.sha256(repr((facts, list(columns))).encode()).hexdigest()[:24]

    def _kept(self, columns: Mapping[str, Column]) -> Iterator[tuple[str | None, ...]]:
        for file in self._files:
            for number, row in file.rows():
                with in_row(number, file.path):
                    yield tuple(column.keep(row.get(name)) for name, column in columns.items())


def _batches(rows: Iterator[tuple[str | None, ...]]) -> Iterator[list[tuple[str | None, ...]]]:
    batch: list[tuple[str | None, ...]] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += sum(len(value or "") for value in row)
        if len(batch) == _BATCH_ROWS or size > _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class TypedSource:
    """Rows that have types: the hub's, or a Parquet file's."""

    kind: Kind = "typed"

    def __init__(self, rows: Dataset, name: str) -> None:
        self._rows, self._name = rows, name
        self.columns: Sequence[str] = rows.column_names

    def read(self, columns: Mapping[str, Column]) -> Dataset:
        """See `Source`; text and labels stay as they are."""
        rows = self._rows.select_columns(list(columns))
        others = {name: column for name, column in columns.items() if not _is_text(rows.features[name], column)}
        if not others:
            return rows

        def keep(batch: dict[str, list[Any]], indices: Sequence[int]) -> dict[str, list[str | None]]:
            kept: dict[str, list[str | None]] = {name: [] for name in others}
            for name, column in others.items():
                for index, value in zip(indices, batch[name], strict=True):
                    with in_row(index + 1, self._name):
                        kept[name].append(column.keep(value))
            return kept

        features = Features({**rows.features, **{name: Value("string") for name in others}})
        kept = rows.map(keep, with_indices=True, batched=True, features=features, load_from_cache_file=False)
        return kept.select_columns(list(columns))


def _is_text(feature: object, column: Column) -> bool:
    known = isinstance(feature, Value) and feature.dtype in ("string", "large_string", "null")
    return isinstance(column, LabelColumn) or (isinstance(column, TextColumn) and known)


@contextmanager
def in_row(number: int, where: object) -> Iterator[None]:
    """Add the row to what is wrong with it."""
    try:
        yield
    except ConfigError as error:
        hint = f"in row {number} of {where}" + (f"; {error.hint}" if error.hint else "")
        raise ConfigError(error.field, error.bound, error.value, hint=hint) from error


class _ParquetSource:
    kind: Kind = "typed"

    def __init__(self, paths: Sequence[Path], cache: Path) -> None:
        self._paths, self._cache = paths, cache
        with _reading(paths[0]):
            self.columns: Sequence[str] = pq.read_schema(paths[0]).names

    def read(self, columns: Mapping[str, Column]) -> Dataset:
        """See `Source`."""
        try:
            name = self._paths[0] if len(self._paths) == 1 else self._paths[0].parent
            return TypedSource(self._read(self._paths, list(columns)), str(name)).read(columns)
        except ConfigError:
            for path in self._paths if len(self._paths) > 1 else ():
                self._read([path], list(columns))  # the file at fault fails again alone, and is named
            raise

    def _read(self, paths: Sequence[Path], columns: list[str]) -> Dataset:
        """Read with the reader of `datasets`; its `load_dataset` would tell the hub about it."""
        with _reading(paths[0]):
            names = [glob.escape(str(path)) for path in paths]
            rows: Dataset = Dataset.from_parquet(names, columns=columns, cache_dir=str(self._cache))
            # a reader that took any bytes for text would fail much later
            rows.data.table.validate(full=True)
        return rows


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn whatever a damaged file makes its readers raise into one line."""
    try:
        yield
    except ConfigError:
        raise
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: BaseException) -> ConfigError:
    """Return the one line for a file that `datasets` could not read."""
    if isinstance(error, StopIteration) or "corresponds to no data" in str(error) or not path.stat().st_size:
        return ConfigError("dataset", "have rows", str(path), hint="the file is empty")
    cause = error.__cause__ or error
    if isinstance(cause, UnicodeDecodeError) or "UTF8" in str(cause):
        return ConfigError("dataset", "be UTF-8 text", str(path), hint=_first_line(cause))
    return ConfigError("dataset", "be well-formed parquet", str(path), hint=_first_line(cause))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _read_hub(name: str, cache: str) -> Mapping[str, Dataset]:
    hub_id, _, configuration = name.partition(":")
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


def _read_cached(hub_id: str, configuration: str, cache: str) -> Mapping[str, Dataset]:
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
