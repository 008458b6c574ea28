"""Which linears read the same input is seen in a forward; names say nothing, and nothing is left behind."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.llama.configuration_llama import LlamaConfig

from lsp_ray.config import LspConfig
from lsp_ray.methods.lsp import lsp_units
from lsp_ray.models.layers import find_layers
from lsp_ray.models.shared_inputs import shared_inputs
from tests.tiny import FAMILIES, NUM_BLOCKS, Family, assert_same_weights, tiny_model

LLAMA_LIKE = ["self_attn.q_proj self_attn.k_proj self_attn.v_proj", "mlp.gate_proj mlp.up_proj"]
GROUPS: dict[str, tuple[str, list[str]]] = {
    **dict.fromkeys(("llama", "qwen2", "mistral", "gemma"), ("model.layers", LLAMA_LIKE)),
    "gpt2": ("transformer.h", []),
    "opt": ("model.decoder.layers", ["self_attn.q_proj self_attn.k_proj self_attn.v_proj"]),
    "bert": ("bert.encoder.layer", ["attention.self.query attention.self.key attention.self.value"]),
    "roberta": ("roberta.encoder.layer", ["attention.self.query attention.self.key attention.self.value"]),
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_shares_what_its_blocks_read_together(family: Family, device: str) -> None:
    model = tiny_model(family)
    nn.Module.to(model, device)
    prefix, in_block = GROUPS[family]
    expected = [
        {f"{prefix}.{block}.{name}" for name in names.split()} for block in range(NUM_BLOCKS) for names in in_block
    ]
    assert [set(names) for names in shared_inputs(model)] == expected


@pytest.mark.parametrize("trains", [False, True])
def test_the_model_is_left_as_it_was(trains: bool) -> None:
    model = tiny_model("llama")
    model.train(trains)
    before = copy.deepcopy(model)
    shared_inputs(model)
    assert_same_weights(model, before)
    assert all(module.training is trains for module in model.modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


class Plain(PreTrainedModel):
    """Five linears with names that say nothing: a and d read x, c and e read a's output, b reads something else."""

    config_class = LlamaConfig

    def __init__(self, *, is_broken: bool = False) -> None:
        super().__init__(LlamaConfig(vocab_size=32, hidden_size=32, pad_token_id=0))
        self.table = nn.Embedding(32, 32)
        self.blocks = nn.ModuleList([nn.ModuleDict({name: nn.Linear(32, 32) for name in "abcde"})])
        self.is_broken = is_broken

    def forward(self, input_ids: torch.Tensor) -> BaseModelOutput:
        (block,) = self.blocks
        assert isinstance(block, nn.ModuleDict)
        x = self.table(input_ids)
        hidden = block["a"](x)
        if self.is_broken:
            raise ValueError("a picture is needed as well")
        total = block["b"](x.clone()) + block["c"](hidden) + block["d"](x) + block["e"](hidden)
        return BaseModelOutput(last_hidden_state=total)


def test_the_graph_decides_and_not_the_names() -> None:
    groups = shared_inputs(Plain())
    assert sorted(map(sorted, groups)) == [["blocks.0.a", "blocks.0.d"], ["blocks.0.c", "blocks.0.e"]]


def test_in_a_model_that_wants_more_than_token_ids_nothing_shares_and_no_hook_stays() -> None:
    model = Plain(is_broken=True)
    model.train()
    assert shared_inputs(model) == []
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_linears_that_share_an_input_get_one_right_factor_and_one_product_of_it() -> None:
    model = Plain()
    groups = shared_inputs(model)
    lsp = LspConfig(subspace_dim=8, nnz_per_row=4, fit="random")
    _, linears = lsp_units(find_layers(model), lsp, seed=0, shared=groups)
    modules = {name.removeprefix("blocks.0."): module for name, module in linears}
    rights = {name: id(module.projector.right) for name, module in modules.items()}
    projections = {name: id(module.input_projection) for name, module in modules.items()}
    for ids in (rights, projections):
        assert ids["a"] == ids["d"]
        assert ids["c"] == ids["e"]
        assert len(set(ids.values())) == 3
    assert len({id(module.projector.left) for module in modules.values()}) == 5
