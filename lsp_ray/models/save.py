"""Save a model and its tokenizer into a folder that `from_pretrained` and `AutoProcessor` load."""

from __future__ import annotations

import copy
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME

from lsp_ray.errors import ConfigError
from lsp_ray.models.aliases import FIELD
from lsp_ray.models.load import num_token_rows, one_line, silenced, tokens_of
from lsp_ray.models.processor_files import copy_processor_files
from lsp_ray.output_folder import SAVING

_SHARD_OR_INDEX = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    state: Mapping[str, torch.Tensor] | None = None,
    source: Path | None = None,
) -> None:
    """Write safetensors, configuration and tokenizer into the folder, so that `from_pretrained` loads it.

    Linears may have been replaced by modules with the same parameter names; where other names came with them, `state`
    is what the plain model would hold. What a processor needs besides is copied from `source`, where the model came
    from. Files are written aside and moved into place one by one: a reader sees each old or new, never half of it. The
    folder's other files stay. The weights are in their place before anything else is tried.

    Raises:
        OSError: The folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    staging = folder / f"{SAVING}{uuid4().hex}"
    staging.mkdir()
    try:
        with silenced(), _without_generation_config(model):
            model.save_pretrained(staging, state_dict=dict(state or model.state_dict()))
        weights = _move(staging, folder)
        for path in folder.iterdir():  # an older save's shards would be loaded instead of this one's
            if _SHARD_OR_INDEX.fullmatch(path.name) and path.name not in weights:
                path.unlink()
        save_description(model, tokenizer, staging, source=source)
        _move(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_saving(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Try to save all but weights, so that nothing of it can fail once a model is trained.

    Args:
        model: A skeleton will do.
        tokenizer: Its own.
        folder: Where both are from.

    Raises:
        ConfigError: It cannot be saved.
    """
    with tempfile.TemporaryDirectory(prefix="lsp_ray-trial-") as trial:
        try:
            save_description(model, tokenizer, Path(trial))
        except Exception as error:  # whatever it is would be raised again after training
            raise ConfigError(FIELD, "be a model that can be saved", str(folder), hint=one_line(error)) from error


def save_description(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, *, source: Path | None = None
) -> None:
    """Write all but weights: configurations, tokenizer, chat template and, from `source`, a processor's files."""
    _name_ends(model, tokenizer)
    with silenced():
        _saved_config(model).save_pretrained(folder)
        generation = getattr(model, "generation_config", None)  # a classifier has none
        if generation is not None:  # as it is: its own save_pretrained refuses many that people publish
            generation.to_json_file(folder / GENERATION_CONFIG_NAME, keys_to_pop=["compile_config"])
        tokenizer.save_pretrained(folder)
    if source is not None:
        copy_processor_files(source, folder)


@contextmanager
def _without_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """Within the context the model has a default one, which can always be saved."""
    generation = getattr(model, "generation_config", None)
    if generation is None:
        yield
        return
    model.generation_config = type(generation)()
    try:
        yield
    finally:
        model.generation_config = generation


def _move(staging: Path, folder: Path) -> set[str]:
    """Move all files, readable to whom the configuration is; returns their names."""
    names = {path.relative_to(staging).as_posix() for path in staging.rglob("*") if path.is_file()}
    mode = (staging / "config.json").stat().st_mode  # safetensors' own files are closed to others, umask or not
    for name in sorted(names):
        (folder / name).parent.mkdir(exist_ok=True)  # a tokenizer of several chat templates has a folder of them
        (staging / name).chmod(mode)
        (staging / name).replace(folder / name)
    return names


def _name_ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let whoever generates with the saved model stop at every end, and pad with a token that it has."""
    generation = getattr(model, "generation_config", None)
    if generation is None or tokenizer.eos_token_id is None:
        return
    tokens = tokens_of(model, tokenizer)
    known = generation.eos_token_id
    if set(known if isinstance(known, list) else [known]) != set(tokens.ends):
        generation.eos_token_id = tokens.ends[0] if len(tokens.ends) == 1 else list(tokens.ends)
    if generation.pad_token_id is not None and not 0 <= generation.pad_token_id < num_token_rows(model):
        generation.pad_token_id = tokens.pad


def _saved_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The model's configuration with generation's cache on again."""
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    if hasattr(text, "use_cache"):
        text.use_cache = True
    return config
