"""LoRA is PEFT's own model, trained by the same worker: its adapters load with PEFT, merged they are the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from lsp_ray.config import LoraConfig
from lsp_ray.errors import ConfigError
from lsp_ray.methods.lora import add_adapters, check_lora
from lsp_ray.models.layers import find_layers
from lsp_ray.models.load import load_model
from lsp_ray.models.loss import num_targets, summed_loss
from lsp_ray.runtime.actors.device_side import DeviceSide
from tests.tiny import CLASSIFIERS, Family, task_of, tiny_model
from tests.tiny_jobs import run_on_threads, tiny_job

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # asked for by peft

LORA = LoraConfig(r=4, lora_alpha=8.0)


def loaded(folder: Path | str, family: Family) -> PreTrainedModel:
    auto_class = AutoModelForSequenceClassification if family in CLASSIFIERS else AutoModelForCausalLM
    model: PreTrainedModel = auto_class.from_pretrained(folder)
    model.eval()
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids_BS = torch.arange(8, 40).view(2, 16)
    with torch.no_grad():
        output: torch.Tensor = model(input_ids=ids_BS, attention_mask=torch.ones_like(ids_BS)).logits
    return output


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "roberta"])
def test_the_merged_checkpoint_and_the_adapters_on_the_base_are_the_trained_model(
    tmp_path: Path, family: Family
) -> None:
    job = tiny_job(tmp_path, family, method="lora", lora=LORA)
    side = DeviceSide(job, lambda _ready: None)
    side.setup()
    for step in range(job.num_steps):
        side.run_step(step)
    side.save(tmp_path / "out")
    trained = logits(side.worker.model.eval())
    torch.testing.assert_close(logits(loaded(tmp_path / "out", family)), trained, rtol=1e-5, atol=1e-5)
    base = load_model(job.model_folder, dtype=job.dtype, task=job.task, label_names=job.label_names, seed=99).eval()
    before = logits(base)
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "out" / "adapter"))
    torch.testing.assert_close(logits(adapted), trained, rtol=1e-5, atol=1e-5)
    assert float((trained - before).abs().max()) > 0.01


def test_the_weights_after_some_steps_are_those_of_torchs_adamw_on_pefts_model(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, method="lora", lora=LORA)
    side = DeviceSide(job, lambda _ready: None)
    side.setup()
    model = load_model(job.model_folder, dtype=job.dtype, task=job.task)
    model.train()
    adapters, _ = add_adapters(model, find_layers(model), LORA, task=job.task, seed=job.config.seed)
    trained = [parameter for parameter in adapters.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0)
    for step, learning_rate in enumerate(job.learning_rates):
        side.run_step(step)
        optimizer.param_groups[0]["lr"] = learning_rate
        (batch,) = job.micro_batches.step(step)
        (summed_loss(model, batch) / num_targets(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
    ours = dict(side.worker.model.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "roberta"])
def test_adapters_stand_beside_every_linear_and_only_a_classifiers_head_trains_whole(family: Family) -> None:
    model = tiny_model(family)
    layers = find_layers(model)
    expected = {site.name for layer in layers for site in layer.linears if not site.name.startswith("classifier")}
    _, units = add_adapters(model, layers, LORA, task=task_of(family), seed=0)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert {name.split(".lora_")[0] for name in trained if ".lora_" in name} == expected
    whole = [name for name in trained if ".lora_" not in name]
    assert bool(whole) == (family in CLASSIFIERS)
    assert all(name.startswith("classifier.modules_to_save.default.") for name in whole)
    assert sum(len(unit.targets) for unit in units) == len(trained)


def test_adapters_depend_on_the_seed_alone() -> None:
    drawn = []
    for seed in (3, 3, 4):
        torch.rand(1)  # the global generator must not matter
        model = tiny_model("llama")
        add_adapters(model, find_layers(model), LORA, task="causal_lm", seed=seed)
        drawn.append(model.get_parameter("model.layers.0.self_attn.q_proj.lora_A.default.weight").clone())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_a_run_in_bfloat16_learns(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 16, "bf16": True, "learning_rate": 1e-2, "gradient_checkpointing": True}
    summary, _ = run_on_threads(tiny_job(tmp_path, method="lora", **options), tmp_path / "out")
    assert summary.eval_loss_after < 0.9 * summary.eval_loss_before
    assert (summary.policy, summary.num_shards, summary.bytes_d2h_per_step) == (None, 0, 0)


def test_a_rank_above_every_linears_sides_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"lora\.r must be at most 64, the shorter side of the largest linear, got 65"
    ):
        check_lora(find_layers(tiny_model("llama")), LoraConfig(r=65))
