"""A checkpoint of several modalities, trained on text: what text reaches is trained, all else stays as it is."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import (
    AutoProcessor,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    TrainingArguments,
    XLNetConfig,
    XLNetLMHeadModel,
)

from lsp_ray.config import GaloreConfig, Method
from lsp_ray.export import export
from lsp_ray.models.layers import find_layers
from lsp_ray.models.load import load_model, load_skeleton
from lsp_ray.models.processor_files import copy_processor_files
from lsp_ray.models.text_reach import parts_of, unreached_by_text
from lsp_ray.plan.skeleton import shape_of
from lsp_ray.runtime.prepare.job import Job, prepare_job, resumed
from lsp_ray.trainer import LSPTrainer
from tests.tiny import FAMILIES, HIDDEN_SIZE, Family, tiny_model, tiny_tokenizer, write_tiny_jsonl
from tests.tiny_jobs import Recorder, run_on_threads, saved_weights, tiny_config

IMAGE, BEGIN, END = "#", "(", ")"
TEXT: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "sliding_window": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# larger than the language model, as no rule may go by size
VISION: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
TOWER = {"model.vision_tower", "model.multi_modal_projector"}


def with_image_tokens() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer("gemma")
    marks = {"image_token": IMAGE, "boi_token": BEGIN, "eoi_token": END}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens=marks,
    )


def gemma3() -> Gemma3ForConditionalGeneration:
    torch.manual_seed(0)
    config = Gemma3Config(text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4)
    return Gemma3ForConditionalGeneration(config)


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**TEXT, num_local_experts=4))


def xlnet() -> XLNetLMHeadModel:
    torch.manual_seed(0)
    return XLNetLMHeadModel(XLNetConfig(vocab_size=128, d_model=32, n_layer=2, n_head=2, d_inner=64))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, its processor and data."""
    folder = tmp_path_factory.mktemp("gemma3")
    processor = Gemma3Processor(
        Gemma3ImageProcessor(size={"height": 28, "width": 28}), with_image_tokens(), image_seq_length=4
    )
    processor.save_pretrained(folder / "gemma")
    gemma3().save_pretrained(folder / "gemma")
    write_tiny_jsonl(folder / "gemma.jsonl", "prompt_completion", 60)
    return folder


def job_of(folder: Path, method: Method = "lsp", **changes: Any) -> tuple[Job, list[str]]:
    recorder = Recorder()
    galore = GaloreConfig(rank=16)
    config = tiny_config(folder, "gemma", method=method, weight_decay=0.5, max_steps=3, galore=galore, **changes)
    return prepare_job(config, recorder.note), recorder.notes


@pytest.mark.parametrize("family", FAMILIES)
def test_text_reaches_all_of_a_language_model(family: Family) -> None:
    assert unreached_by_text(tiny_model(family)) == frozenset()


@pytest.mark.parametrize("new_model", [gemma3, mixtral, xlnet])
def test_text_reaches_what_a_backward_gives_a_gradient(new_model: Any) -> None:
    model: PreTrainedModel = new_model()
    model.train(False)
    names = unreached_by_text(model)
    tokens = torch.randint(8, 100, (8, 32), generator=torch.Generator().manual_seed(0))
    model(input_ids=tokens).logits.square().sum().backward()
    assert names == {name for name, parameter in model.named_parameters() if parameter.grad is None}


def test_a_model_without_weights_is_reached_as_one_with_them(written: Path) -> None:
    assert unreached_by_text(load_skeleton(written / "gemma", task="causal_lm")) == unreached_by_text(gemma3())


def test_looking_at_a_model_leaves_it_as_it_was() -> None:
    model = gemma3().train()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    unreached_by_text(model)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_where_a_forward_asks_for_values_what_is_beside_the_decoder_is_not_reached() -> None:
    class Asking(Gemma3ForConditionalGeneration):
        def forward(self, input_ids: torch.Tensor, **inputs: Any) -> Any:
            assert int(input_ids.sum())  # a value, which the meta device has not
            return super().forward(input_ids, **inputs)

    torch.manual_seed(0)
    model = Asking(Gemma3Config(text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4))
    assert unreached_by_text(model) == unreached_by_text(gemma3())


def test_the_parts_are_the_outermost_modules_and_their_elements() -> None:
    model = gemma3()
    parts = parts_of(model, unreached_by_text(model))
    assert parts == {name: sum(p.numel() for p in model.get_submodule(name).parameters()) for name in TOWER}


def test_single_parameters_are_parts_of_their_own() -> None:
    model = xlnet()
    assert "transformer.mask_emb" in parts_of(model, unreached_by_text(model))


def test_the_layers_are_the_language_models_however_large_the_tower_is() -> None:
    model = gemma3()
    layers = find_layers(model, unreached_by_text(model))
    assert [layer.name for layer in layers if layer.block is not None] == [
        f"model.language_model.layers.{index}" for index in range(2)
    ]
    assert not any(parameter.requires_grad for name in TOWER for parameter in model.get_submodule(name).parameters())


@pytest.mark.parametrize("method", get_args(Method))
def test_every_method_trains_the_language_model_leaves_the_tower_and_says_so(
    written: Path, tmp_path: Path, method: Method
) -> None:
    job, notes = job_of(written, method)
    kept = sum(p.numel() for name in TOWER for p in gemma3().get_submodule(name).parameters())
    [line] = [line for line in notes if "text does not reach" in line]
    assert line.startswith(f"{kept:,} of {sum(p.numel() for p in gemma3().parameters()):,} parameters stay as they are")
    assert all(name in line for name in TOWER)
    run_on_threads(job, tmp_path / "out")
    before, after = gemma3().state_dict(), saved_weights(job, tmp_path / "out")
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert any(name.startswith("model.language_model.layers.") for name in changed)
    assert not changed & job.unreached
    assert isinstance(AutoProcessor.from_pretrained(tmp_path / "out"), Gemma3Processor)


@pytest.mark.parametrize("method", ["lsp", "lora"])
def test_a_run_goes_on_bit_for_bit(written: Path, tmp_path: Path, method: Method) -> None:
    job, _ = job_of(written, method, save_steps=1, save_total_limit=None)
    run_on_threads(job, tmp_path / "whole")
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert isinstance(AutoProcessor.from_pretrained(checkpoint), Gemma3Processor)
    run_on_threads(resumed(job, checkpoint), tmp_path / "again")
    whole = saved_weights(job, tmp_path / "whole")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in saved_weights(job, tmp_path / "again").items())


def test_an_export_loads_with_its_processor(written: Path, tmp_path: Path) -> None:
    job, _ = job_of(written, "native")
    run_on_threads(job, tmp_path / "out")
    export(tmp_path / "out", tmp_path / "exported", "bfloat16")
    assert isinstance(AutoProcessor.from_pretrained(tmp_path / "exported"), Gemma3Processor)


def test_the_planner_counts_what_is_trained(written: Path) -> None:
    shape, model = shape_of(written / "gemma"), gemma3()
    find_layers(model, unreached_by_text(model))
    assert shape.num_trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert shape.num_parameters == sum(p.numel() for p in model.parameters())
    assert shape.hidden_size == HIDDEN_SIZE


def test_a_classifier_of_a_model_with_a_tower_reads_padded_rows(written: Path, tmp_path: Path) -> None:
    data = write_tiny_jsonl(tmp_path / "labels.jsonl", "sentence_label", 60)
    recorder = Recorder()
    config = replace(tiny_config(written, "gemma", max_steps=2), dataset=str(data))
    job = prepare_job(config, recorder.note)
    run_on_threads(job, tmp_path / "out")
    assert any("text does not reach" in line for line in recorder.notes)
    assert load_model(
        tmp_path / "out", dtype=torch.float32, task="sequence_classification", label_names=job.label_names
    ).num_labels == len(job.label_names)


def test_a_trainer_takes_a_processor_and_saves_it(written: Path, tmp_path: Path) -> None:
    rows = [{"input_ids": [1, 9, 10, 2], "labels": [-100, 9, 10, 2]}] * 4
    trainer = LSPTrainer(
        gemma3(),
        TrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True, report_to=[], max_steps=1),
        train_dataset=rows,
        processing_class=AutoProcessor.from_pretrained(written / "gemma"),
    )
    trainer.save_model(str(tmp_path / "saved"))
    assert isinstance(AutoProcessor.from_pretrained(tmp_path / "saved"), Gemma3Processor)
    assert isinstance(load_model(tmp_path / "saved", dtype=torch.float32, task="causal_lm"), PreTrainedModel)


def test_where_only_the_language_model_is_loaded_it_is_said_and_no_processor_is_copied(tmp_path: Path) -> None:
    text = {**TEXT, "layer_types": ["full_attention"] * 2}
    text.pop("sliding_window")
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": HIDDEN_SIZE}
    folder = tmp_path / "gemma"
    model = Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=text, vision_config=vision))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text("{}")
    write_tiny_jsonl(tmp_path / "gemma.jsonl", "prompt_completion", 60)
    job, notes = job_of(tmp_path, "native")
    assert "only the language model of this qwen3_5 is trained and saved: Qwen3_5ForCausalLM" in notes
    run_on_threads(job, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()
    assert not (tmp_path / "out" / "preprocessor_config.json").exists()


def test_no_file_of_a_processor_is_missing_and_no_other_is_copied(tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "folder"
    for path in (source, folder):
        path.mkdir()
        (path / "config.json").write_text('{"model_type": "gemma3"}')
    names = {
        "processor_config.json",
        "preprocessor_config.json",
        "video_preprocessor_config.json",
        "audio_tokenizer_config.json",
        "chat_template.json",
    }
    for name in (*names, "model.safetensors", "README.md", "tokenizer.json"):
        (source / name).write_text(name)
    copy_processor_files(source, folder)
    assert {path.name for path in folder.iterdir()} == {*names, "config.json"}
    assert all((folder / name).read_text() == name for name in names)
    shutil.rmtree(source)
    copy_processor_files(source, folder)  # a model in memory has none
