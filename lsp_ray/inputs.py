"""What a run names on this machine's disk, looked at before anything slow is imported."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lsp_ray.config import BUILT_IN_DATASET, RunConfig
from lsp_ray.data.paths import files_of
from lsp_ray.errors import ConfigError
from lsp_ray.models.names import local_model

_SOCKET_BYTES = 107  # a socket's path has no more room on Linux


def check_temp_folder(environment: Mapping[str, str], pid: int) -> None:
    """Raise ConfigError where the sockets that Ray makes for process `pid` would have too long a path."""
    name = "RAY_TMPDIR" if "RAY_TMPDIR" in environment else "TMPDIR"
    folder = environment.get(name, "/tmp")
    room = _SOCKET_BYTES - len(f"/ray/session_2026-01-01_00-00-00_000000_{pid}/sockets/plasma_store")
    if len(folder.encode("utf-8", "surrogateescape")) > room:
        bound = f"be at most {room} bytes long, as the sockets of Ray's processes are in it"
        raise ConfigError(name, bound, folder, hint="RAY_TMPDIR may be another folder than TMPDIR: RAY_TMPDIR=/tmp")


def check_inputs(config: RunConfig, *, with_dataset: bool = True) -> None:
    """Raise ConfigError where a file or folder that the run names is missing."""
    local_model(config.model_name_or_path)
    if with_dataset and config.dataset != BUILT_IN_DATASET:
        files_of(config.dataset)
    checkpoint, projectors = config.resume_from_checkpoint, config.lsp.init_from
    if checkpoint not in (None, "last") and not Path(str(checkpoint)).is_dir():
        raise ConfigError("resume_from_checkpoint", "be last or the checkpoint-N folder of a run", checkpoint)
    if projectors is not None and not Path(projectors).exists():
        raise ConfigError("lsp.init_from", "be a file of projectors or the folder of a run that has one", projectors)
