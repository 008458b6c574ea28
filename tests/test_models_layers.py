from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from lsp_ray.errors import ConfigError
from lsp_ray.models.layers import Layer, find_layers
from tests.tiny import CAUSAL_LMS, CLASSIFIERS, FAMILIES, HIDDEN_SIZE, NUM_BLOCKS, Family, tiny_model


def trained_parameters(layers: list[Layer]) -> list[nn.Parameter]:
    linears = [site.module.get_parameter("weight") for layer in layers for site in layer.linears]
    return linears + [site.parameter for layer in layers for site in layer.parameters]


def blocks(layers: list[Layer]) -> list[Layer]:
    return [layer for layer in layers if layer.block is not None]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_is_a_layer_in_forward_order(family: Family) -> None:
    found = blocks(find_layers(tiny_model(family)))
    assert len(found) == NUM_BLOCKS
    assert [layer.name.rpartition(".")[2] for layer in found] == ["0", "1"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_parameter_is_trained_once_or_frozen(family: Family) -> None:
    model = tiny_model(family)
    trained = trained_parameters(find_layers(model))
    assert len({id(parameter) for parameter in trained}) == len(trained)
    assert {id(parameter) for parameter in trained} == {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize("family", FAMILIES)
def test_all_that_is_frozen_is_an_embedding(family: Family) -> None:
    model = tiny_model(family)
    find_layers(model)
    embeddings = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    output = model.get_output_embeddings()
    if isinstance(output, nn.Module):
        embeddings |= {id(parameter) for parameter in output.parameters()}
    assert {id(p) for p in model.parameters() if not p.requires_grad} == embeddings


@pytest.mark.parametrize("family", CAUSAL_LMS)
def test_a_language_models_output_embedding_is_frozen_tied_or_not(family: Family) -> None:
    model = tiny_model(family)
    find_layers(model)
    assert not model.get_output_embeddings().weight.requires_grad


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_a_classifiers_head_is_trained_as_the_last_layer(family: Family) -> None:
    head = find_layers(tiny_model(family))[-1]
    assert head.name == "head"
    assert any("classifier" in site.name for site in head.linears)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sites_parent_and_attribute_lead_to_its_module(family: Family) -> None:
    for layer in find_layers(tiny_model(family)):
        for site in layer.linears:
            assert getattr(site.parent, site.attribute) is site.module


@pytest.mark.parametrize("family", FAMILIES)
def test_parameter_names_are_those_of_the_model(family: Family) -> None:
    model = tiny_model(family)
    for layer in find_layers(model):
        for site in layer.linears:
            assert model.get_parameter(f"{site.name}.weight") is site.module.get_parameter("weight")
        for parameter_site in layer.parameters:
            assert model.get_parameter(parameter_site.name) is parameter_site.parameter


@pytest.mark.parametrize(("family", "linears_per_block"), [("llama", 7), ("gpt2", 4), ("opt", 6), ("bert", 6)])
def test_a_block_holds_its_linears(family: Family, linears_per_block: int) -> None:
    for layer in blocks(find_layers(tiny_model(family))):
        assert len(layer.linears) == linears_per_block


def test_gpt2s_conv1d_is_transposed_and_its_shape_is_out_by_in() -> None:
    sites = {site.name: site for layer in find_layers(tiny_model("gpt2")) for site in layer.linears}
    site = sites["transformer.h.0.attn.c_attn"]
    assert site.transposed
    assert site.shape == (3 * HIDDEN_SIZE, HIDDEN_SIZE)


def test_a_linears_shape_is_out_by_in() -> None:
    sites = {site.name: site for layer in find_layers(tiny_model("llama")) for site in layer.linears}
    site = sites["model.layers.0.self_attn.k_proj"]
    assert not site.transposed
    assert site.shape == (HIDDEN_SIZE // 2, HIDDEN_SIZE)


def test_the_stem_comes_before_the_blocks_and_the_head_after() -> None:
    names = [layer.name for layer in find_layers(tiny_model("bert"))]
    assert names == ["stem", "bert.encoder.layer.0", "bert.encoder.layer.1", "head"]


def test_a_model_without_blocks_is_refused() -> None:
    model = tiny_model("llama")
    inner = model.get_submodule("model")
    assert isinstance(inner, PreTrainedModel)
    inner.layers = nn.ModuleList()
    with pytest.raises(ConfigError, match="model_name_or_path must be a transformer with a list of blocks"):
        find_layers(model)


def test_a_weight_two_blocks_share_is_trained_by_the_first() -> None:
    model = tiny_model("llama")
    first, second = (model.get_submodule(f"model.layers.{index}.mlp.up_proj") for index in range(2))
    second.weight = first.get_parameter("weight")
    names = [site.name for layer in find_layers(model) for site in layer.linears]
    assert "model.layers.0.mlp.up_proj" in names
    assert "model.layers.1.mlp.up_proj" not in names


@pytest.mark.parametrize("family", FAMILIES)
def test_a_backward_gives_every_trained_parameter_a_gradient(family: Family) -> None:
    model = tiny_model(family)
    trained = trained_parameters(find_layers(model))
    token_ids = torch.randint(8, 128, (2, 6), generator=torch.Generator().manual_seed(0))
    model(input_ids=token_ids, attention_mask=torch.ones_like(token_ids)).logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in trained)
