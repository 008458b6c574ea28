"""Load a model and its tokenizer from a Hugging Face folder.

Everything is read from the local folder (see `resolve_model`) and no code from it is ever run.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.utils import logging as transformers_logging

from lsp_ray.config import Bits, Task
from lsp_ray.errors import ConfigError
from lsp_ray.models.aliases import FIELD
from lsp_ray.models.layers import linears_outside_blocks
from lsp_ray.models.quantized import (
    check_gradients,
    check_quantizer,
    freeze_biases,
    keep_type,
    keep_weights,
    loading_options,
    quantization_of,
)
from lsp_ray.special_tokens import SpecialTokens, special_tokens

_CLASSIFIER_COLUMNS = "sentence and label, or sentence1, sentence2 and label"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
_INDEX = "model.safetensors.index.json"
_FOREIGN = (OSError, ImportError, AttributeError, LookupError, TypeError, ValueError, RuntimeError, SafetensorError)
_IN_A_BLOCK = re.compile(r"\.\d+\.")


def load_config(folder: Path) -> PreTrainedConfig:
    """Return the model's configuration.

    Raises:
        ConfigError: There is no config.json, or transformers does not know what is in it.
    """
    with silenced(), _loading(folder, "hold a config.json of an architecture that transformers has built in"):
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    text = config.get_text_config()
    if (getattr(text, "pad_token_id", None) or 0) >= getattr(text, "vocab_size", sys.maxsize):
        text.pad_token_id = None  # no row of the embeddings, which torch would refuse to leave out
    return config


def load_skeleton(folder: Path, *, task: Task, num_labels: int = 2) -> PreTrainedModel:
    """Return the model without weights, on the meta device: names and shapes of its modules for almost no memory.

    Args:
        folder: A Hugging Face folder; only its config.json is read.
        task: Which head the model has.
        num_labels: Rows of a classifier's head; a causal LM has none.

    Raises:
        ConfigError: The folder's architecture cannot do the task.
    """
    config = load_config(folder)
    auto_class = _auto_class(config, task)
    if task == "sequence_classification":
        config.num_labels = num_labels
    found = quantization_of(config)
    if found is not None:
        del config.quantization_config
    model = _on_meta(auto_class, config)
    if found is not None:
        freeze_biases(model, found)
    model.tie_weights()
    return model


def _on_meta(auto_class: Any, config: PreTrainedConfig) -> PreTrainedModel:
    with silenced(), torch.device("meta"):
        model: PreTrainedModel = auto_class.from_config(config, trust_remote_code=False)
    return model


def check_weights(folder: Path) -> None:
    """Raise ConfigError where weights are missing, cut off or damaged at their head; reads only the heads."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = [path.name for path in sorted(folder.glob("*.bin"))]
        hint = f"{pickled[0]} is a pickle, which could run any code and is never read" if pickled else ""
        raise ConfigError(FIELD, "hold its weights as .safetensors", str(folder), hint=hint)
    for file in files:
        with _loading(folder, f"hold intact weights ({file.name})"), safe_open(file, framework="pt") as content:
            content.keys()
    with _loading(folder, f"hold intact weights ({_INDEX})"):
        for name in shard_names(folder):
            if name not in {file.name for file in files}:  # nor may it lie elsewhere
                raise ConfigError(
                    FIELD, f"hold the weights that its {_INDEX} names", str(folder), hint=f"without {name!r}"
                )


def shard_names(folder: Path) -> list[str]:
    """Files that the index of split weights names; none where there is no index.

    Raises:
        ValueError: It is no index.
    """
    index = folder / _INDEX
    if not index.is_file():
        return []
    content = json.loads(index.read_text(encoding="utf-8"))
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError("it has no weight_map from names to files")
    return sorted(set(weight_map.values()))


def load_model(
    folder: Path,
    *,
    dtype: torch.dtype,
    task: Task,
    label_names: Sequence[str] = (),
    seed: int = 0,
    new_head: bool = True,
    bits: Bits | None = None,
    device: torch.device | None = None,
    on_meta: bool = False,
) -> PreTrainedModel:
    """Return the model with the folder's weights, ready to train: on the CPU, a quantised one on its device.

    A classifier keeps the folder's head if that has as many labels; else its head is drawn from `seed`, whatever the
    state of the global generator, which is left alone.

    Args:
        folder: A Hugging Face folder.
        dtype: Type of all weights.
        task: Which head the model gets.
        label_names: A classifier's labels in the order of their ids, one alone for a regression; none for a causal LM.
        seed: Seed of a new head.
        new_head: Whether a classifier may get one.
        bits: To which the blocks' linears are quantised, see `quantized`; default: they are as in the folder.
        device: Of a quantised model; default: the CPU.
        on_meta: Read only the heads of the files and return a model without weights, for what is raised besides.

    Raises:
        ConfigError: The architecture cannot do the task, a classifier has no label, or the weights are damaged or
            do not fit the config.json.
    """
    config = load_config(folder)
    auto_class = _auto_class(config, task)
    classifier = task == "sequence_classification"
    if classifier:
        _set_labels(config, label_names)
        pad = load_tokenizer(folder).pad_token_id
        config.get_text_config().pad_token_id = pad  # decoders classify at the last token before it
    device = device or torch.device("cpu")
    if not on_meta:
        check_quantizer(config, bits, on_gpu=device.type == "cuda")
    whole = () if bits is None else linears_outside_blocks(_on_meta(auto_class, config))
    with silenced(), _loading(folder, "hold intact weights"), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model: PreTrainedModel
        model, report = auto_class.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,  # the other format is a pickle, which may run anything
            output_loading_info=True,
            ignore_mismatched_sizes=classifier and new_head,
            **({"device_map": "meta"} if on_meta else loading_options(config, bits, dtype, device, whole)),
        )
    _check_complete(report, folder, classifier=classifier and new_head)
    _make_trainable(model)
    keep_weights(model)
    if not on_meta:
        keep_type(model, dtype)
        check_gradients(model, dtype)
    return model


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer; where it has no pad token that the model knows, its end token also pads.

    Raises:
        ConfigError: The folder has no tokenizer, or one with neither a pad nor an end token.
    """
    if not any((folder / name).exists() for name in _TOKENIZER_FILES):
        raise ConfigError(FIELD, f"hold a tokenizer ({', '.join(_TOKENIZER_FILES)})", str(folder))
    with silenced(), _loading(folder, "hold a tokenizer"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    tokens = _special_tokens(tokenizer, folder)
    if tokenizer.pad_token_id != tokens.pad:
        tokenizer.pad_token = str(tokenizer.convert_ids_to_tokens(tokens.pad))
    return tokenizer


def _special_tokens(tokenizer: PreTrainedTokenizerBase, folder: Path) -> SpecialTokens:
    """Of the model in the folder; of a tokenizer alone where there is none."""
    if not (folder / "config.json").is_file():
        return special_tokens(tokenizer, PreTrainedConfig(), None, len(tokenizer))
    config = load_config(folder)
    generation = None
    if (folder / "generation_config.json").is_file():
        with silenced(), _loading(folder, "hold a generation_config.json that can be read"):
            generation = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return special_tokens(tokenizer, config, generation, config.get_text_config().vocab_size)


def tokens_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> SpecialTokens:
    """What pads and ends the model's texts."""
    generation = getattr(model, "generation_config", None)
    return special_tokens(tokenizer, model.config, generation, num_token_rows(model))


def num_token_rows(model: PreTrainedModel) -> int:
    """Token ids that the model's embeddings have a row for."""
    return int(model.get_input_embeddings().get_parameter("weight").shape[0])


def num_positions(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens that a model takes at once."""
    # RoBERTa's config counts two positions that no token can have; its tokenizer knows. Others say 1e30
    known = getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    return min(known, tokenizer.model_max_length)


@contextmanager
def silenced() -> Iterator[None]:
    """Within the context transformers shows neither progress bars nor loading reports; errors still raise."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def one_line(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters: libraries write whole paragraphs."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]


@contextmanager
def _loading(folder: Path, bound: str) -> Iterator[None]:
    """Turn what a damaged or foreign folder makes transformers raise into one line."""
    try:
        yield
    except ConfigError:
        raise
    except _FOREIGN as error:
        raise ConfigError(FIELD, bound, str(folder), hint=one_line(error)) from error


def _auto_class(config: PreTrainedConfig, task: Task) -> Any:
    """The Auto class for the task. Encoders have a causal variant in transformers too, which nobody pretrained."""
    kind = config.model_type
    if task == "sequence_classification":
        if kind not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
            raise ConfigError(FIELD, f"be a classifier for a dataset with {_CLASSIFIER_COLUMNS}", kind)
        return AutoModelForSequenceClassification
    encoder = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    if encoder or kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        columns = f"{kind} models train on datasets with {_CLASSIFIER_COLUMNS}" if encoder else ""
        raise ConfigError(FIELD, "be a causal language model for a dataset of text", kind, hint=columns)
    if config.is_encoder_decoder:  # of whose halves transformers would take one
        hint = "it is an encoder with a decoder"
        raise ConfigError(FIELD, "be a causal language model for a dataset of text", kind, hint=hint)
    return AutoModelForCausalLM


def _set_labels(config: PreTrainedConfig, label_names: Sequence[str]) -> None:
    if not label_names:
        raise ConfigError("dataset", "have labels", list(label_names))
    config.num_labels = len(label_names)
    config.id2label = dict(enumerate(label_names))
    config.label2id = {name: index for index, name in enumerate(label_names)}
    config.problem_type = "regression" if len(label_names) == 1 else "single_label_classification"


def _check_complete(report: Mapping[str, Any], folder: Path, *, classifier: bool) -> None:
    """Only an untrained classifier may lack weights, and only outside its blocks: its head."""
    absent = [*report["missing_keys"], *(key[0] for key in report["mismatched_keys"])]
    wrong = sorted(name for name in absent if not classifier or _IN_A_BLOCK.search(name))
    if wrong:
        shown = ", ".join(wrong[:3]) + (", …" if len(wrong) > 3 else "")
        raise ConfigError(FIELD, "hold all weights that its config.json asks for", str(folder), hint=f"without {shown}")


def _make_trainable(model: PreTrainedModel) -> None:
    text = model.config.get_text_config()
    if hasattr(text, "use_cache"):
        text.use_cache = False  # keys and values of past tokens serve generation only
