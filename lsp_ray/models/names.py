"""What a model's name can be, told without torch: an alias, a folder, a .gguf file or a hub id."""

from __future__ import annotations

import re
from pathlib import Path

from lsp_ray.errors import ConfigError
from lsp_ray.models.aliases import ALIASES, FIELD

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def local_model(name: str) -> Path | None:
    """Return the folder or file that `name` is; None for an alias or a hub id.

    Raises:
        ConfigError: It can be none of them, or is a folder without a config.json.
    """
    if name in ALIASES:
        return None
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            if not (path / "config.json").is_file():
                raise ConfigError(FIELD, "be a folder with a config.json", name)
            return path
        if path.is_file():
            return path
    except (OSError, RuntimeError) as error:  # RuntimeError: ~someone without a home
        raise ConfigError(FIELD, "be a folder or file that can be read", name, hint=str(error)) from error
    if not is_hub_id(name):
        raise ConfigError(FIELD, f"be {', '.join(ALIASES)}, an existing folder or .gguf file, or a hub id", name)
    return None


def is_hub_id(name: str) -> bool:
    """Whether a model of this name may be on the hub."""
    return bool(_HUB_ID.fullmatch(name)) and not name.startswith(".") and not name.endswith(".gguf")
