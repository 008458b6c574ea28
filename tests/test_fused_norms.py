"""Fused norms: which modules are taken, and that outputs and gradients stay those of the model within rounding."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lsp_ray.device import fused_norms
from lsp_ray.device.fused_norms import fuse_norms
from tests.test_block_graphs import NUM_BLOCKS as NUM_LAYERS
from tests.test_block_graphs import Run, assert_same_bits
from tests.tiny import NUM_BLOCKS, Family, tiny_model

# two roundings to 8 bits, relative to the norm of all of them
ACCURACY = {torch.float32: 1e-6, torch.bfloat16: 2.0**-7}


class HalfNormed(LlamaRMSNorm):
    """Of the same name in a family and with the same eps, but another function."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = super().forward(hidden_states)
        return output / 2


HalfNormed.__name__ = "HalfRMSNorm"


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_norms, "is_launched", lambda _weight: True)


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize("dtype", list(ACCURACY))
def test_a_fused_norm_is_the_models_within_rounding(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    plain = LlamaRMSNorm(96, 1e-5).to(dtype)
    with torch.no_grad():
        plain.weight.copy_(torch.randn(96, generator=generator))
    fused = deepcopy(plain)
    assert fuse_norms(fused) == 1
    by = torch.randn(4, 7, 96, generator=generator).to(dtype)
    input_TN = (5 * torch.randn(4, 7, 96, generator=generator)).to(dtype).requires_grad_()
    found, expected = (
        (output, *torch.autograd.grad(output, (input_TN, norm.weight), by))
        for norm, output in ((norm, norm(input_TN)) for norm in (fused, plain))
    )
    for our, their in zip(found, expected, strict=True):
        assert our.dtype == dtype
        difference = (our.double() - their.double()).detach().norm()
        assert float(difference) <= ACCURACY[dtype] * float(their.detach().double().norm())


@pytest.mark.usefixtures("on_a_gpu")
def test_blocks_with_fused_norms_are_recorded_with_the_bits_of_their_operators() -> None:
    ours, theirs = Run(recorded=True), Run(recorded=False)
    assert [fuse_norms(run.model) for run in (ours, theirs)] == [2 * NUM_LAYERS + 1] * 2
    assert ours.train(steps=4) == theirs.train(steps=4)
    assert ours.backend is not None
    assert ours.backend.num_launched > 0
    assert not ours.notes
    assert_same_bits(ours, theirs)


@pytest.mark.usefixtures("on_a_gpu")
def test_an_input_of_another_type_is_the_modules_own_affair() -> None:
    plain = LlamaRMSNorm(8)
    fused = deepcopy(plain)
    fuse_norms(fused)
    input_TN = torch.randn(3, 8).bfloat16()
    assert torch.equal(fused(input_TN), plain(input_TN))


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize(
    ("family", "number"),
    [("llama", 2 * NUM_BLOCKS + 1), ("mistral", 2 * NUM_BLOCKS + 1), ("gemma", 0), ("gpt2", 0), ("bert", 0)],
)
def test_a_families_norms_are_fused_where_they_are_root_mean_square_norms(family: Family, number: int) -> None:
    assert fuse_norms(tiny_model(family)) == number


@pytest.mark.usefixtures("on_a_gpu")
def test_norms_of_heads_are_fused_and_other_functions_are_not() -> None:
    sizes: dict[str, Any] = {
        "vocab_size": 16,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "head_dim": 8,
    }
    assert fuse_norms(Qwen3ForCausalLM(Qwen3Config(**sizes, num_attention_heads=2, num_key_value_heads=2))) == 5
    assert [fuse_norms(norm(8)) for norm in (GemmaRMSNorm, HalfNormed, LlamaRMSNorm)] == [0, 0, 1]


def test_on_a_cpu_a_model_stays_as_it_is() -> None:
    assert fuse_norms(tiny_model("llama")) == 0
