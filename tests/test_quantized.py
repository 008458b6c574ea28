"""Runs on a base whose weights are quantised."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from bitsandbytes.functional import dequantize_4bit
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainingArguments

from lsp_ray.errors import ConfigError, LspRayError
from lsp_ray.export import export
from lsp_ray.methods.adapter_rank import truncated
from lsp_ray.methods.lora import ADAPTER_FOLDER
from lsp_ray.models.load import load_model, load_tokenizer
from lsp_ray.models.loss import num_targets, summed_loss
from lsp_ray.models.quantized import dense_weight, is_quantized_linear
from lsp_ray.models.trained import load_trained
from lsp_ray.runtime.checkpoints.checkpoint import TRAINED, checkpoints
from lsp_ray.runtime.prepare.job import Job, prepare_job, resumed
from lsp_ray.trainer import LSPTrainer
from tests.tiny_jobs import run_on_threads, tiny_config, tiny_job

QUANTISED: dict[str, Any] = {"load_in_4bit": True, "bf16": True}


def eval_loss(model: PreTrainedModel | PeftModel, job: Job) -> float:
    batches = job.micro_batches.eval_batches()
    model.eval()
    with torch.no_grad():
        losses = [float(summed_loss(model, batch)) for batch in batches]  # type: ignore[arg-type]
    return sum(losses) / sum(map(num_targets, batches))


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / ADAPTER_FOLDER / "adapter_model.safetensors")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers by that name
@pytest.mark.parametrize(
    ("family", "method", "options"),
    [
        ("llama", "lsp", {"load_in_4bit": True}),
        ("qwen2", "lsp", {"load_in_4bit": True, "gradient_checkpointing": True}),
        ("llama", "lsp", {"load_in_8bit": True}),
        ("llama", "lora", {"load_in_4bit": True}),
        ("gpt2", "lsp", {"load_in_4bit": True}),
    ],
)
def test_a_run_learns_and_leaves_an_adapter_for_the_same_base(
    tmp_path: Path, family: Any, method: str, options: dict[str, Any]
) -> None:
    rate = 1e-2 if method == "lora" else 3e-3
    config = tiny_config(tmp_path, family, method=method, bf16=True, max_steps=12, learning_rate=rate, **options)
    job = prepare_job(config, lambda _line: None)
    summary, _ = run_on_threads(job, tmp_path / "out")
    assert summary.eval_loss_after < 0.95 * summary.eval_loss_before
    assert not list((tmp_path / "out").glob("*.safetensors"))
    bits = job.config.bits
    assert bits is not None
    base = load_model(job.model_folder, dtype=torch.bfloat16, task="causal_lm", bits=bits)
    trained = PeftModel.from_pretrained(base, str(tmp_path / "out" / ADAPTER_FOLDER))
    assert eval_loss(trained, job) == pytest.approx(summary.eval_loss_after, rel=5e-3)  # sums in another order


def test_a_quantised_run_goes_on_bit_for_bit_and_its_checkpoints_hold_no_model(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, max_steps=8, save_steps=3, max_grad_norm=0.5, **QUANTISED)
    run_on_threads(job, tmp_path / "whole")
    [checkpoint, *_] = checkpoints(tmp_path / "whole").values()
    assert not list(checkpoint.glob("*.safetensors"))
    assert (checkpoint / TRAINED).is_file()
    runtime = {"num_shards": 2, "policy": "sequential"}
    again = tiny_job(tmp_path, max_steps=8, max_grad_norm=0.5, runtime=runtime, **QUANTISED)
    run_on_threads(resumed(again, checkpoint), tmp_path / "from")
    ours, theirs = adapter(tmp_path / "from"), adapter(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_folder_that_is_quantised_already_is_trained_and_loaded_as_it_is(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, max_steps=4, **QUANTISED)
    folder = tmp_path / "quantised"
    load_model(job.model_folder, dtype=torch.bfloat16, task="causal_lm", bits=4).save_pretrained(folder)
    for path in job.model_folder.glob("tokenizer*"):
        (folder / path.name).write_bytes(path.read_bytes())
    config = replace(job.config, load_in_4bit=False, model_name_or_path=str(folder), max_seq_length=None)
    notes: list[str] = []
    already = prepare_job(config, notes.append)
    assert already.payload_sizes == job.payload_sizes
    adapters = [prepare_job(replace(each.config, method="lora"), notes.append) for each in (job, already)]
    losses = [run_on_threads(each, tmp_path / f"lora {at}")[0].eval_loss_after for at, each in enumerate(adapters)]
    assert losses[0] == losses[1]
    summary, _ = run_on_threads(already, tmp_path / "lsp")
    assert summary.eval_loss_after < summary.eval_loss_before
    with pytest.raises(ConfigError, match="load_in_4bit must be left out, as the model is quantised already"):
        prepare_job(replace(config, load_in_4bit=True), notes.append)
    with pytest.raises(ConfigError, match="method must be lsp or lora, as the model's weights are quantised"):
        prepare_job(replace(config, method="native"), notes.append)
    with pytest.raises(ConfigError, match=r"lsp\.delta must be apart"):
        prepare_job(replace(config, lsp=replace(config.lsp, delta="merged")), notes.append)


def test_what_cannot_be_is_refused_by_its_option(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    for method in ("native", "zero_offload", "galore"):
        with pytest.raises(ConfigError, match="method must be lsp or lora with load_in_4bit"):
            replace(config, method=method, load_in_4bit=True)
    with pytest.raises(ConfigError, match="load_in_8bit must be left out beside load_in_4bit"):
        replace(config, load_in_4bit=True, load_in_8bit=True)
    with pytest.raises(ConfigError, match=r"lsp\.delta must be apart with load_in_8bit"):
        replace(config, load_in_8bit=True, lsp=replace(config.lsp, delta="merged"))


def test_a_refit_that_no_quantised_base_can_take_in_is_said(tmp_path: Path) -> None:
    notes: list[str] = []
    job = prepare_job(tiny_config(tmp_path, **QUANTISED), notes.append)
    assert job.config.lsp.check_every == 0
    assert len([line for line in notes if "lsp.check_every" in line]) == 1


@pytest.mark.parametrize("bits", [4, 8])
def test_the_weight_of_a_quantised_linear_is_what_it_computes_with(tmp_path: Path, bits: Any) -> None:
    job = tiny_job(tmp_path)
    plain = load_model(job.model_folder, dtype=torch.bfloat16, task="causal_lm")
    model = load_model(job.model_folder, dtype=torch.bfloat16, task="causal_lm", bits=bits)
    found = 0
    for name, module in model.named_modules():
        if is_quantized_linear(module):
            found += 1
            weight_MN = dense_weight(module, torch.bfloat16)
            was_MN: torch.Tensor = plain.get_parameter(f"{name}.weight")
            input_TN = torch.randn(8, weight_MN.shape[1]).bfloat16()
            expected = module(input_TN).float()
            bias = getattr(module, "bias", None)
            made = (input_TN @ weight_MN.t()).float() + (0.0 if bias is None else bias.float())
            assert (made - expected).norm() < 0.02 * expected.norm()
            if bits == 4:
                was_MN = dequantize_4bit(module.weight, module.weight.quant_state)
            assert (weight_MN.float() - was_MN.float()).norm() < (1e-6 if bits == 4 else 0.02) * was_MN.float().norm()
    assert found == 14


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float, Job]:
    """A finished run on a quantised base, its eval loss, and its job."""
    folder = tmp_path_factory.mktemp("quantised")
    job = tiny_job(folder, "qwen2", max_steps=12, learning_rate=1e-2, **QUANTISED)
    summary, _ = run_on_threads(job, folder / "out")
    (folder / "out" / "config.yaml").write_text(yaml.safe_dump(asdict(job.resolved_config)))
    return folder / "out", summary.eval_loss_after, job


def test_a_trained_folder_is_loaded_with_its_base(run_dir: tuple[Path, float, Job]) -> None:
    folder, loss, job = run_dir
    assert eval_loss(load_trained(folder), job) == pytest.approx(loss, rel=5e-3)


def test_a_base_that_has_moved_and_a_run_that_was_stopped_are_told(
    run_dir: tuple[Path, float, Job], tmp_path: Path
) -> None:
    config = yaml.safe_load((run_dir[0] / "config.yaml").read_text())
    folder = shutil.copytree(run_dir[0], tmp_path / "moved")
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"model_name_or_path": "/gone"}))
    with pytest.raises(ConfigError, match=r"have its base where it was, .* got '/gone'; .*config\.yaml says where"):
        load_trained(folder)
    shutil.rmtree(folder / ADAPTER_FOLDER)
    (folder / "summary.json").unlink(missing_ok=True)
    with pytest.raises(ConfigError, match=r"has not come to its end; to go on: .* --resume_from_checkpoint last$"):
        load_trained(folder)


def test_an_adapter_is_exported_whole_or_with_its_leading_directions(
    run_dir: tuple[Path, float, Job], tmp_path: Path
) -> None:
    folder, _, _ = run_dir
    exported = [export(folder, tmp_path / str(rank), rank=rank) for rank in (None, 16, 8, 2)]
    assert exported[0].relative_error == 0
    assert exported[0].kept == 1
    assert exported[1].kept == pytest.approx(1, abs=1e-5)  # all directions of every linear
    assert [each.kept for each in exported] == sorted((each.kept for each in exported), reverse=True)
    assert exported[3].kept < 0.99
    assert exported[1].relative_error < 0.02
    assert exported[1].relative_error < exported[3].relative_error
    tensors = load_file(tmp_path / "2" / "adapter_model.safetensors")
    assert {len(tensor) for name, tensor in tensors.items() if ".lora_A." in name} == {2}
    card = (tmp_path / "2" / "README.md").read_text()
    assert "library_name: peft" in card
    assert "PeftModel.from_pretrained" in card
    assert "quantization_config=BitsAndBytesConfig(load_in_4bit=True, " in card


def test_a_run_is_merged_into_a_whole_model(run_dir: tuple[Path, float, Job], tmp_path: Path) -> None:
    folder, loss, job = run_dir
    exported = export(folder, tmp_path / "merged", merge=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not hasattr(model.config, "quantization_config")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert exported.relative_error < 0.03
    assert eval_loss(model, job) == pytest.approx(loss, rel=0.02)


def test_what_cannot_be_exported_is_refused_in_one_line(run_dir: tuple[Path, float, Job], tmp_path: Path) -> None:
    folder, _, _ = run_dir
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="dtype must be left out for an adapter"):
        export(folder, out, "float32")
    with pytest.raises(ConfigError, match="export_rank must be at least 1"):
        export(folder, out, rank=0)
    with pytest.raises(ConfigError, match="export_rank must be left out beside merge"):
        export(folder, out, rank=2, merge=True)
    assert not out.exists()


def test_truncation_is_the_best_of_its_rank() -> None:
    up, down = torch.randn(24, 8), torch.randn(8, 40)
    left, right, squares = truncated(up, down, 3)
    u, s, v = torch.linalg.svd(up @ down, full_matrices=False)
    assert (left @ right - (u[:, :3] * s[:3]) @ v[:3]).norm() < 1e-4 * s.norm()
    assert torch.allclose(squares.float(), s[:8].square(), rtol=1e-3, atol=1e-3)


def test_a_trainer_takes_a_quantised_model_by_name_alone(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, **QUANTISED)
    model = load_model(job.model_folder, dtype=torch.bfloat16, task="causal_lm", bits=4)
    args = TrainingArguments(output_dir=str(tmp_path / "out"), report_to="none")
    with pytest.raises(ConfigError, match=r"^model must be given by name where its weights are quantised"):
        LSPTrainer(model, args, train_dataset=[], processing_class=load_tokenizer(job.model_folder))


@pytest.mark.parametrize("method", ["lsp", "lora"])
def test_a_classifiers_own_linears_are_not_quantised(tmp_path: Path, method: str) -> None:
    job = tiny_job(tmp_path, "bert", method=method, max_steps=2, **QUANTISED)
    summary, _ = run_on_threads(job, tmp_path / "out")
    assert summary.eval_loss_after < 2 * summary.eval_loss_before


def test_a_folders_quantiser_may_have_computed_in_another_type(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, bf16=False)
    folder = tmp_path / "quantised"
    load_model(job.model_folder, dtype=torch.float32, task="causal_lm", bits=4).save_pretrained(folder)
    for path in job.model_folder.glob("tokenizer*"):
        (folder / path.name).write_bytes(path.read_bytes())
    config = replace(job.config, model_name_or_path=str(folder), bf16=True, lsp=replace(job.config.lsp, delta=None))
    run_on_threads(prepare_job(config, lambda _line: None), tmp_path / "out")


def test_a_merged_conv1d_is_kept_as_it_was(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, "gpt2", max_steps=2, **QUANTISED)
    run_on_threads(job, tmp_path / "out")
    (tmp_path / "out" / "config.yaml").write_text(yaml.safe_dump(asdict(job.resolved_config)))
    assert export(tmp_path / "out", tmp_path / "merged", merge=True).relative_error < 0.03
    assert export(tmp_path / "out", tmp_path / "exact", "float32", merge=True).dtype == "float32"


@pytest.mark.parametrize("damage", ["cut", "text", "gone", "another", "config", "nan"])
def test_a_damaged_adapter_is_named_in_one_line(run_dir: tuple[Path, float, Job], tmp_path: Path, damage: str) -> None:
    folder = shutil.copytree(run_dir[0], tmp_path / "run")
    weights, config = (folder / ADAPTER_FOLDER / name for name in ("adapter_model.safetensors", "adapter_config.json"))
    tensors = load_file(weights)
    match damage:
        case "cut":
            weights.write_bytes(weights.read_bytes()[:1000])
        case "text":
            weights.write_text("none")
        case "gone":
            weights.unlink()
        case "another":
            save_file({name: tensor for name, tensor in tensors.items() if "norm" not in name}, weights)
        case "config":
            config.write_text("{")
        case "nan":
            save_file({name: tensor * torch.nan for name, tensor in tensors.items()}, weights)
    with pytest.raises(LspRayError, match="adapter") as raised:
        export(folder, tmp_path / "exported")
    assert "\n" not in str(raised.value)
