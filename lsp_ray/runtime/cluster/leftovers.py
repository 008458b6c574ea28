"""Leftovers: what a run that was killed could not clear itself, and who clears it: the next one to start."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lsp_ray.errors import ConfigError, StoppedError
from lsp_ray.output_folder import SAVING
from lsp_ray.runtime.checkpoints.checkpoint import unfinished

PREFIX = "lsp_ray-"
_LOCK, _SESSION = "lock", "session"


@contextmanager
def own_folder(within: Path | None = None) -> Iterator[Path]:
    """Make a temporary folder, private to this user, gone at the end; `within` another one than the system's.

    Its lock lasts as long as this process, however that ends. A process's number would not tell: it is given anew, and
    is another one in another container.
    """
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=within))  # mode 0700
    aside = folder / f"{_LOCK}.new"
    with aside.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        aside.rename(folder / _LOCK)  # so that nobody finds it without its lock
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def note_session(folder: Path, session: str) -> None:
    """Write down which folder Ray keeps its session in, to be cleared with `folder`, one of `own_folder`."""
    (folder / _SESSION).write_text(session, encoding="utf-8")


@contextmanager
def cleared_session(folder: Path) -> Iterator[None]:
    """Remove the session noted in `folder` at the end, unless something has failed: Ray's logs may tell what."""
    has_failed = True
    try:
        yield
        has_failed = False
    except (ConfigError, StoppedError, KeyboardInterrupt):
        has_failed = False
        raise
    finally:
        for session in [] if has_failed else _session_of(folder):
            shutil.rmtree(session, ignore_errors=True)


def clear_leftovers(run_folder: Path, note: Callable[[str], None]) -> None:
    """Remove what killed runs left in this run's folder, and their temporary folders; say so."""
    found = [*unfinished(run_folder), *run_folder.glob(f"{SAVING}*")]
    for folder in (*Path(tempfile.gettempdir()).glob(f"{PREFIX}*"), *run_folder.glob(f"{PREFIX}*")):
        if _is_ours(folder) and _is_left(folder / _LOCK):
            found += [*_session_of(folder), folder]  # the folder last: it tells of the other
    for path in found:
        shutil.rmtree(path, ignore_errors=True)
    if found:
        note(f"cleared what a run that was killed had left: {', '.join(map(str, found))}")


def _is_ours(folder: Path) -> bool:
    """Whether it is this user's: anybody may make folders there, and name in them what is to be removed."""
    return not folder.is_symlink() and folder.is_dir() and folder.stat().st_uid == os.getuid()


def _is_left(lock: Path) -> bool:
    try:
        with lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # it is held; or there is none, and the folder is another program's
        return False
    return True


def _session_of(folder: Path) -> list[Path]:
    if not (folder / _SESSION).is_file():
        return []
    session = Path((folder / _SESSION).read_text(encoding="utf-8"))
    return [session] if session.name.startswith("session_") and session.is_dir() and _is_ours(session) else []
