"""The folder that a run writes to: its own, or that of the run which goes on."""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path

from lsp_ray.config import RunConfig
from lsp_ray.errors import ConfigError

DEFAULT_OUTPUT = "lsp_output"
CONFIG = "config.yaml"
SAVING = ".saving-"  # folders of saves that are not done begin so

INTERNALS = "internals"
"""Folder in a run's own for what no loader of models is to find: projectors, traces, decisions."""

BASE_MODEL = "base_model"
"""File among them with the name of a model that was given in memory."""


def internal(run_folder: Path, name: str) -> Path:
    """Return where a run keeps an internal file; runs of older versions have it beside the model."""
    path = run_folder / INTERNALS / name
    return path if path.exists() or not (run_folder / name).exists() else run_folder / name


@contextmanager
def claimed(config: RunConfig) -> Iterator[Path]:
    """Make the output folder, which must be new or empty: a run never writes over another one's results.

    Without a wish it is lsp_output, or lsp_output-2, lsp_output-3 … where that has content. A run that ends before its
    first step leaves nothing behind. Only a run that goes on keeps its folder.

    Raises:
        ConfigError: The folder asked for has content or cannot be written, or another run is at work in it.
    """
    continued = _continued(config)
    if continued is not None:
        with _alone_in(continued):
            yield continued
        return
    path = _first_free() if config.output_dir is None else Path(config.output_dir)
    if not _is_free(path):
        bound = (
            "be a new or empty folder, so that nothing is overwritten" if path.is_dir() else "be a folder, not a file"
        )
        raise ConfigError("output_dir", bound, str(path))
    existed = path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / CONFIG).touch()
    except OSError as error:
        raise ConfigError("output_dir", f"be writable ({error.strerror})", str(path)) from error
    try:
        with _alone_in(path):
            yield path
    except BaseException:
        metrics = path / "metrics.jsonl"
        if not metrics.exists() or metrics.stat().st_size == 0:
            _clear(path)
            if not existed:
                path.rmdir()
        raise


@contextmanager
def _alone_in(path: Path) -> Iterator[None]:
    """Keep other runs out of the folder for as long as this one, or its process, lasts.

    Raises:
        ConfigError: Another one is in it.
    """
    with ExitStack() as stack:
        try:
            lock = stack.enter_context((path / CONFIG).open("r+"))  # for writing, as NFS wants it
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            bound = "be the folder of a run that has ended, and one is at work there"
            raise ConfigError("output_dir", bound, str(path)) from None
        except OSError:
            pass  # nothing to go on in, or to write to, which whoever reads or writes it says; or no locks on this disk
        yield


def _clear(path: Path) -> None:
    """Remove what a run writes before its first step is done."""
    for name in (CONFIG, "metrics.jsonl"):
        (path / name).unlink(missing_ok=True)
    for name in (INTERNALS, "tensorboard", "wandb"):
        shutil.rmtree(path / name, ignore_errors=True)


def _continued(config: RunConfig) -> Path | None:
    """The folder of the run that goes on in it; None for a run in a folder of its own."""
    asked = config.resume_from_checkpoint
    if asked is None:
        return None
    if asked == "last" and config.output_dir is None:
        raise ConfigError("output_dir", "name the run whose last checkpoint is asked for", None)
    folder = Path(config.output_dir or Path(asked).absolute().parent)
    if asked != "last" and Path(asked).absolute().parent != folder.absolute():
        return None
    if (folder / "summary.json").exists():
        quoted = shlex.quote(str(folder))
        is_whole = any(folder.glob("model*.safetensors"))
        before = "start another run with" if is_whole else f"run lsp-ray export {quoted} NEW --merge, then another with"
        source = quoted if is_whole else "NEW"
        hint = f"to train its model longer, {before} --model_name_or_path {source}"
        raise ConfigError("output_dir", "be another folder, as this run is finished", str(folder), hint=hint)
    return folder


def _first_free() -> Path:
    numbered = (DEFAULT_OUTPUT if number == 1 else f"{DEFAULT_OUTPUT}-{number}" for number in count(1))
    return next(path for path in map(Path, numbered) if _is_free(path))


def _is_free(path: Path) -> bool:
    return not os.path.lexists(path) or (path.is_dir() and not any(path.iterdir()))
