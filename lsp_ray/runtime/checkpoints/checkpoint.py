"""Checkpoints of a run: folders `checkpoint-N` beside its metrics, each of them whole or not there.

    checkpoint-N/               N optimizer updates are done; the folder loads like any other of Hugging Face's
        model.safetensors … trainer_state.json
        lsp_state/
            state.json                      facts about the run, and every file's size and CRC-32
            moments-I.safetensors           Adam's state of shard I's layers
            lsp_projectors.safetensors      (method lsp)
            refit_*.safetensors             lessons and projectors that have not taken over yet, if there are any
            galore_bases.safetensors        (method galore)
            trained.safetensors             (lora, beside the merged model; lsp.delta apart, without a model)
            deltas.safetensors              what a stale policy has not added yet, if it is one

Everything random in a run follows from its seed and the step, so no generator's state is needed but a lesson's.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lsp_ray.errors import CheckpointError

STATE = "lsp_state"
FACTS = f"{STATE}/state.json"
TRAINED = f"{STATE}/trained.safetensors"
FORMAT = 1
_NAME = re.compile(r"checkpoint-(\d+)")
_CHUNK_BYTES = 8 << 20


def checkpoints(run_folder: Path) -> dict[int, Path]:
    """Return the folder's whole checkpoints by their number of updates, in that order."""
    found = {int(match[1]): path for path in run_folder.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))}
    return {step: found[step] for step in sorted(found) if (found[step] / FACTS).is_file()}


def unfinished(run_folder: Path) -> list[Path]:
    """Return folders that were to become checkpoints, or are no more; nobody may be at work in `run_folder`."""
    return sorted(run_folder.glob(".checkpoint-*"))


def way_on(run_folder: Path) -> str:
    """Say which checkpoint is the last, and with which command the run goes on from it."""
    saved = list(checkpoints(run_folder).values())
    if not saved:
        return "no checkpoint was written"
    config, folder = (shlex.quote(str(path)) for path in (run_folder / "config.yaml", run_folder))
    command = f"python -m lsp_ray.run --config {config} --output_dir {folder} --resume_from_checkpoint last"
    return f"the last checkpoint is {saved[-1]}; to go on: {command}"


class Checkpoints:
    """Writes a run's checkpoints; a context manager, on whose leaving the last one is on the disk, or given up.

    A checkpoint is written into a folder of another name, flushed to the disk and renamed. Whatever ends the process
    before that leaves the earlier ones as they were. Flushing, checksums and renaming run beside the next steps.

    Args:
        run_folder: Where they go.
        keep: How many, the newest, are kept; None keeps all. The one of `protected` updates is kept besides.
    """

    protected: int | None = None

    def __init__(self, run_folder: Path, *, keep: int | None) -> None:
        self._run_folder = run_folder
        self._keep = keep
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._underway: Future[None] | None = None
        self._is_given_up = False
        for path in unfinished(run_folder):  # what was lost with its actor
            shutil.rmtree(path, ignore_errors=True)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_error: object) -> None:
        self._is_given_up = kind is KeyboardInterrupt  # someone wants to stop at once
        try:
            self.wait()
        except CheckpointError:
            if kind is None:
                raise
        finally:
            self._thread.shutdown()

    def save(
        self,
        step: int,
        write: Callable[[Path], None],
        write_beside: Callable[[Path], None],
        facts: Mapping[str, Any],
    ) -> None:
        """Let `write` fill a folder; return when it has, and finish the rest beside what follows.

        Args:
            step: Updates done.
            write: Writes model and state into the folder that it is given.
            write_beside: Writes into it what the next steps do not change, beside them.
            facts: For state.json.

        Raises:
            CheckpointError: This checkpoint, or the one before, could not be written.
        """
        self.wait()
        staging = self._run_folder / f".checkpoint-{step}.saving"
        with self._cleaning(staging), writing(staging):
            (staging / STATE).mkdir(parents=True)
            write(staging)
        self._underway = self._thread.submit(
            self._finish, staging, write_beside, {"format": FORMAT, "step": step, **facts}
        )

    def wait(self) -> None:
        """Return when nothing is being written any more.

        Raises:
            CheckpointError: It could not be written.
        """
        underway, self._underway = self._underway, None
        if underway is not None:
            underway.result()

    def _finish(self, staging: Path, write_beside: Callable[[Path], None], facts: dict[str, Any]) -> None:
        with self._cleaning(staging), writing(staging):
            write_beside(staging)
            files = {path.relative_to(staging).as_posix(): self._sealed(path) for path in _files(staging)}
            state = staging / FACTS
            state.write_text(json.dumps({**facts, "files": files}, indent=1) + "\n")
            self._sealed(state)
            mode = state.stat().st_mode  # safetensors' own files are closed to others, umask or not
            for path in _files(staging):
                path.chmod(mode)
            for folder in (*(path for path in staging.rglob("*") if path.is_dir()), staging):
                _flush(folder)
            target = self._run_folder / f"checkpoint-{facts['step']}"
            if target.exists():  # of a run that went on from an earlier one
                self._remove(target)
            staging.rename(target)
            _flush(self._run_folder)
            if self._keep is not None:
                for step, path in list(checkpoints(self._run_folder).items())[: -self._keep]:
                    if step != self.protected:
                        self._remove(path)

    def _sealed(self, path: Path) -> list[int]:
        """See `checksum`; on return the file is on the disk."""
        if self._is_given_up:
            raise CheckpointError("the checkpoint was given up")
        _flush(path)
        return checksum(path)

    @contextmanager
    def _cleaning(self, staging: Path) -> Iterator[None]:
        """A failure leaves nothing half written behind, which would fill the disk further."""
        try:
            yield
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise

    def _remove(self, path: Path) -> None:
        """Under another name first: what is half removed is no checkpoint."""
        doomed = path.with_name(f".{path.name}.removing")
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn a file that cannot be written into one line about the folder, which a process may pass on to another.

    Raises:
        CheckpointError: The disk is full, or the like.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or " ".join(str(error).split())
        name = folder.name.removeprefix(".").removesuffix(".saving")
        raise CheckpointError(f"{name} could not be written to {folder.parent} ({why})") from error


def checksum(path: Path) -> list[int]:
    """Return a file's size in bytes and its CRC-32."""
    size_bytes = crc = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            size_bytes += len(chunk)
            crc = zlib.crc32(chunk, crc)
    return [size_bytes, crc]


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
