"""A model's shape from its configuration alone."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from lsp_ray.config import Bits
from lsp_ray.errors import ConfigError
from lsp_ray.models.layers import find_layers
from lsp_ray.models.load import load_config, load_skeleton
from lsp_ray.models.quantized import bits_of, quantization_of
from lsp_ray.models.text_reach import unreached_by_text
from lsp_ray.runtime.prepare.model_shape import model_shape
from lsp_ray.sim.model_shape import ModelShape


def shape_of(folder: Path) -> ModelShape:
    """Return the shape of the model whose config.json is in `folder`; an encoder's is a classifier's with 2 labels.

    Raises:
        ConfigError: The configuration is no model's that can be trained.
    """
    return shape_of_model(_skeleton(folder))


def positions_of(folder: Path) -> int | None:
    """Return the positions of the model whose config.json is in `folder`; None where it has no bound."""
    bound: int | None = getattr(load_config(folder).get_text_config(), "max_position_embeddings", None)
    return bound


def check_length(folder: Path, max_seq_length: int | None) -> None:
    """Refuse a length for which the model whose config.json is in `folder` has no positions, as a run does."""
    bound = positions_of(folder)
    if max_seq_length is not None and bound is not None and max_seq_length > bound:
        raise ConfigError("max_seq_length", f"be at most {bound}, the positions of this model", max_seq_length)


def quantized_bits(folder: Path) -> Bits | None:
    """Return to how many bits a folder's linears are quantised already, the nearer of 4 and 8; None: they are not."""
    found = quantization_of(load_config(folder))
    return None if found is None else bits_of(found)


def estimate_note(folder: Path) -> str | None:
    """Return a line for a folder whose quantised weights are only nearly as large as they are taken to be."""
    found = quantization_of(load_config(folder))
    if found is None or found["quant_method"] == "bitsandbytes":
        return None
    method, bits = found["quant_method"], bits_of(found)
    return f"the weights are of {method}: their bytes are estimated as those of bitsandbytes in {bits} bits"


def shape_of_model(model: PreTrainedModel) -> ModelShape:
    """Return a model's shape and freeze what is not trained; a model on the meta device will do."""
    return model_shape(model, find_layers(model, unreached_by_text(model)))


def _skeleton(folder: Path) -> PreTrainedModel:
    try:
        return load_skeleton(folder, task="causal_lm")
    except ConfigError as causal_error:
        try:
            return load_skeleton(folder, task="sequence_classification")
        except ConfigError:
            raise causal_error from None
