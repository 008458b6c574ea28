"""A model's shape, for forecasts of its time and memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transformers import PreTrainedModel

from lsp_ray.models.attention import is_plainly_causal
from lsp_ray.models.layers import Layer
from lsp_ray.models.output_head import host_tables
from lsp_ray.models.shared_inputs import shared_inputs
from lsp_ray.sim.model_shape import LayerShape, LinearShape, ModelShape


def model_shape(model: PreTrainedModel, layers: Sequence[Layer]) -> ModelShape:
    """Return the shape of a model with these layers; one on the meta device will do."""
    config = model.config.get_text_config()
    first_reader = {name: names[0] for names in shared_inputs(model) for name in names}
    hidden, heads = int(config.hidden_size), int(config.num_attention_heads)
    head_width = int(getattr(config, "head_dim", None) or hidden // heads)
    is_repeated = heads > int(getattr(config, "num_key_value_heads", None) or heads) and not is_plainly_causal(
        config, 0
    )
    output, tables = model.get_output_embeddings(), host_tables(model)
    return ModelShape(
        layers=tuple(_layer_shape(layer, first_reader) for layer in layers),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        hidden_size=hidden,
        attention_width=heads * head_width,
        repeated_width=2 * heads * head_width if is_repeated else 0,
        num_logits=2 if output is None else int(output.get_parameter("weight").shape[0]),
        num_held=tables.numel,
        head_comes=tables.head is not None,
    )


def _layer_shape(layer: Layer, first_reader: Mapping[str, str]) -> LayerShape:
    read = [first_reader.get(site.name, site.name) for site in layer.linears]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(read))}
    return LayerShape(
        linears=tuple(
            LinearShape(rows=site.shape[0], columns=site.shape[1], input=numbers[name])
            for site, name in zip(layer.linears, read, strict=True)
        ),
        raw_numel=sum(site.parameter.numel() for site in layer.parameters),
        is_block=layer.block is not None,
    )
