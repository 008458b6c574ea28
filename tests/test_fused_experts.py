"""Experts that transformers keeps in one weight: no method treats them as linears, and each says what it does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import (
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from lsp_ray.config import GaloreConfig, Method
from lsp_ray.runtime.prepare.job import Job, prepare_job
from lsp_ray.sim.store import size_text
from tests.tiny import HIDDEN_SIZE, tiny_tokenizer, write_tiny_jsonl
from tests.tiny_jobs import Recorder, run_on_threads, saved_weights, tiny_config

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def mixtral() -> PreTrainedModel:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))


def qwen3_moe() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {**SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes))


def mamba() -> PreTrainedModel:
    torch.manual_seed(0)
    return MambaForCausalLM(MambaConfig(vocab_size=128, hidden_size=HIDDEN_SIZE, num_hidden_layers=2, pad_token_id=0))


def job_of(folder: Path, model: PreTrainedModel, method: Method) -> tuple[Job, list[str]]:
    model.save_pretrained(folder / "llama")
    tiny_tokenizer().save_pretrained(folder / "llama")
    write_tiny_jsonl(folder / "llama.jsonl", "prompt_completion", 60)
    recorder = Recorder()
    job = prepare_job(tiny_config(folder, method=method, max_steps=2, galore=GaloreConfig(rank=8)), recorder.note)
    return job, recorder.notes


def experts(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if ".experts." in name and tensor.ndim == 3}


@pytest.mark.parametrize("new_model", [mixtral, qwen3_moe])
@pytest.mark.parametrize("method", get_args(Method))
def test_it_is_said_what_a_method_does_with_experts_and_it_does_it(
    tmp_path: Path, new_model: Any, method: Method
) -> None:
    model = new_model()
    job, notes = job_of(tmp_path, model, method)
    found, lines = experts(model), [line for line in notes if "as experts are" in line]
    numel = sum(tensor.numel() for tensor in found.values())
    assert len(lines) == (method in ("lsp", "lora", "galore"))
    for line in lines:
        assert f"{numel:,}" in line
        first = next(name for name in found if "gate_up_proj" in name)
        assert f"{first}: {' × '.join(map(str, found[first].shape))}" in line
    if method == "lsp":
        assert f"{size_text(2 * numel)} of {size_text(job.bytes_each_way)} each way a step" in lines[0]
    if method == "galore":
        assert "galore does not project them" in lines[0]
    run_on_threads(job, tmp_path / "out")
    after = saved_weights(job, tmp_path / "out")
    kept = [torch.equal(tensor, after[name]) for name, tensor in found.items()]
    assert all(kept) if method == "lora" else not any(kept)


def test_the_share_of_trained_parameters_is_that_of_the_model(tmp_path: Path) -> None:
    model = mixtral()
    _, notes = job_of(tmp_path, model, "lsp")
    [line] = [line for line in notes if "as experts are" in line]
    outside = {id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    trained = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in outside)
    match = re.match(r"([\d,]+) of ([\d,]+) trained parameters are ", line)
    assert match
    assert int(match[2].replace(",", "")) == trained


def test_a_convolutions_kernel_is_no_expert(tmp_path: Path) -> None:
    _, notes = job_of(tmp_path, mamba(), "lsp")
    assert not any("as experts are" in line for line in notes)
