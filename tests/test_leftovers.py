"""What killed runs leave is cleared by the next one, and nothing else is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest

from lsp_ray.errors import StoppedError, WorkerLostError
from lsp_ray.runtime.cluster.leftovers import clear_leftovers, cleared_session, note_session, own_folder

KILLED = """
import os, signal
from pathlib import Path
from lsp_ray.runtime.cluster.leftovers import note_session, own_folder

with own_folder() as folder:
    session = folder.parent / "session_killed"
    session.mkdir()
    note_session(folder, str(session))
    print(folder, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(autouse=True)
def temp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Temporary folders of this test go here."""
    folder = tmp_path / "temp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_folders_of_a_killed_run_are_cleared_and_said_and_those_of_a_live_one_stay(tmp_path: Path, temp: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(temp)}
    ended = subprocess.run([sys.executable, "-c", KILLED], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    run = tmp_path / "out"
    for name in (".checkpoint-4.saving", ".checkpoint-2.removing", ".saving-1234", "checkpoint-2", "tensorboard"):
        (run / name).mkdir(parents=True)
    (temp / "lsp_ray-of-another-program").mkdir()
    said: list[str] = []
    with own_folder() as alive:
        (temp / "session_alive").mkdir()
        note_session(alive, str(temp / "session_alive"))
        clear_leftovers(run, said.append)
        left = {path.name for path in temp.iterdir()}
        assert left == {alive.name, "session_alive", "lsp_ray-of-another-program"}
    assert {path.name for path in run.iterdir()} == {"checkpoint-2", "tensorboard"}
    [line] = said
    for name in (ended.stdout.strip(), "session_killed", ".checkpoint-4.saving", ".checkpoint-2.removing", ".saving-"):
        assert name in line
    assert not alive.exists()
    clear_leftovers(run, said.append)
    assert len(said) == 1


@pytest.mark.parametrize(("error", "is_left"), [(None, False), (StoppedError, False), (WorkerLostError, True)])
def test_rays_logs_stay_where_they_may_tell_what_failed(
    tmp_path: Path, error: type[Exception] | None, is_left: bool
) -> None:
    session = tmp_path / "session_own"
    session.mkdir()
    with suppress(StoppedError, WorkerLostError), own_folder(tmp_path) as folder, cleared_session(folder):
        note_session(folder, str(session))
        if error is not None:
            raise error("")
    assert session.exists() == is_left


@pytest.mark.parametrize("named", ["../out", "session_link"])
def test_only_a_session_that_is_this_users_own_folder_is_removed(tmp_path: Path, temp: Path, named: str) -> None:
    precious = tmp_path / "out"
    precious.mkdir()
    (temp / "session_link").symlink_to(precious)
    left = temp / "lsp_ray-left"
    left.mkdir()
    (left / "lock").touch()
    note_session(left, str(temp / named))
    clear_leftovers(tmp_path / "run", lambda _line: None)
    assert precious.exists()
    assert not left.exists()
