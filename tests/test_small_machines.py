"""Limits of the machine made for real, in a mount namespace of the command's own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.tiny import write_tiny_jsonl, write_tiny_model


def run_with_mount(options: str, at: Path, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run the command line where a small or read-only file system is mounted at a folder."""
    namespace = ["unshare", "--mount", "--map-root-user"]
    try:
        tried = subprocess.run([*namespace, "mount", "-t", "tmpfs", "tmpfs", str(at)], capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("no unshare command here")
    if tried.returncode:
        pytest.skip("mount namespaces are not permitted here")
    script = 'mount -t tmpfs -o "$1" tmpfs "$2" && shift 2 && exec "$@"'
    command = [*namespace, "sh", "-c", script, "sh", options, str(at), sys.executable, "-m", "lsp_ray.run", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)


def test_a_container_with_64_megabytes_of_shared_memory_is_told_before_ray_starts(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", "llama")
    data = write_tiny_jsonl(tmp_path / "data.jsonl", "prompt_completion", 50)
    arguments = [
        *("--model_name_or_path", str(model), "--dataset", str(data), "--output_dir", str(tmp_path / "out")),
        *("--lsp.subspace_dim", "16", "--lsp.nnz_per_row", "2"),
    ]
    ended = run_with_mount("size=64m", Path("/dev/shm"), arguments)
    assert ended.returncode == 2, ended.stderr
    line = ended.stderr.splitlines()[-1]  # a library may log an import's failure before it
    assert line.startswith("error: method must fit its slots into 0.07 GB of shared memory")
    assert "--shm-size" in line
    assert "Traceback" not in ended.stderr
    assert "starting Ray" not in ended.stdout
    assert not (tmp_path / "out").exists()


def test_a_read_only_output_folder_is_one_line(tmp_path: Path) -> None:
    ended = run_with_mount("ro", tmp_path, ["--output_dir", str(tmp_path / "out")])
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.startswith("error: output_dir must be writable (Read-only file system), got ")
    assert ended.stderr.count("\n") == 1
