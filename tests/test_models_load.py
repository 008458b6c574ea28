from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers import logging as transformers_logging

from lsp_ray.errors import ConfigError
from lsp_ray.models.layers import find_layers
from lsp_ray.models.load import load_config, load_model, load_skeleton, load_tokenizer, silenced
from lsp_ray.models.save import check_saving, save_model
from lsp_ray.output_folder import SAVING
from tests.tiny import (
    CHAT_TEMPLATE,
    CLASSIFIERS,
    FAMILIES,
    Family,
    assert_same_weights,
    task_of,
    tiny_model,
    tiny_tokenizer,
    write_tiny_model,
)
from tests.tiny_jobs import tiny_job

LABELS = ("no", "yes")


def load(folder: Path, family: Family, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    task = task_of(family)
    return load_model(folder, dtype=dtype, task=task, label_names=LABELS if task != "causal_lm" else ())


def load_causal(folder: Path) -> PreTrainedModel:
    return load_model(folder, dtype=torch.float32, task="causal_lm")


def load_classifier(folder: Path, *labels: str, seed: int = 0) -> PreTrainedModel:
    return load_model(
        folder, dtype=torch.float32, task="sequence_classification", label_names=labels or LABELS, seed=seed
    )


class SwappedLinear(nn.Module):
    """Stands where a linear stood and keeps its parameters' names, as a method's own module does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.weight = module.get_parameter("weight")
        self.register_parameter("bias", getattr(module, "bias", None))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_loads_saves_and_loads_again_with_the_same_weights(family: Family, tmp_path: Path) -> None:
    model = load(write_tiny_model(tmp_path / "start", family), family)
    assert_same_weights(model, tiny_model(family))
    save_model(model, load_tokenizer(tmp_path / "start"), tmp_path / "end")
    auto = AutoModelForSequenceClassification if family in CLASSIFIERS else AutoModelForCausalLM
    with silenced():
        assert_same_weights(auto.from_pretrained(tmp_path / "end"), model)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "end")
    assert tokenizer("w3 ?").input_ids == tiny_tokenizer(family)("w3 ?").input_ids
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert_same_weights(load(tmp_path / "end", family), model)


@pytest.mark.parametrize("family", FAMILIES)
def test_swapped_linears_are_saved_under_the_same_names(family: Family, tmp_path: Path) -> None:
    model = load(write_tiny_model(tmp_path / "start", family), family)
    for layer in find_layers(model):
        for site in layer.linears:
            setattr(site.parent, site.attribute, SwappedLinear(site.module))
            site.module.get_parameter("weight").data.mul_(2.0)
    save_model(model, tiny_tokenizer(), tmp_path / "end")
    assert_same_weights(load(tmp_path / "end", family), model)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_skeleton_has_the_models_layers_and_shapes_without_memory(family: Family, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path, family)
    (folder / "model.safetensors").unlink()
    skeleton = load_skeleton(folder, task=task_of(family))
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    for layer, reference in zip(find_layers(skeleton), find_layers(tiny_model(family)), strict=True):
        assert layer.name == reference.name
        assert [(site.name, site.shape) for site in layer.linears] == [(s.name, s.shape) for s in reference.linears]
        assert [site.name for site in layer.parameters] == [site.name for site in reference.parameters]


@pytest.mark.parametrize("family", ["qwen2", "gemma", "gpt2", "opt"])
def test_tied_weights_are_one_tensor_in_memory_and_in_the_file(family: Family, tmp_path: Path) -> None:
    model = load(write_tiny_model(tmp_path / "start", family), family)
    save_model(model, tiny_tokenizer(), tmp_path / "end")
    for loaded in (model, load(tmp_path / "end", family)):
        assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert "lm_head.weight" not in load_file(tmp_path / "end" / "model.safetensors")


def test_weights_come_in_the_type_asked_for(tmp_path: Path) -> None:
    model = load(write_tiny_model(tmp_path / "start", "llama"), "llama", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    save_model(model, tiny_tokenizer(), tmp_path / "end")
    assert load_config(tmp_path / "end").dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma", "bert"])
def test_a_new_head_depends_on_the_seed_alone(family: Family, tmp_path: Path) -> None:
    labels = ("a", "b", "c")
    folder = write_tiny_model(tmp_path, family)
    torch.manual_seed(1)
    first = load_classifier(folder, *labels, seed=3)
    torch.manual_seed(2)
    assert_same_weights(load_classifier(folder, *labels, seed=3), first)
    other = load_classifier(folder, *labels, seed=4)
    names = [name for name, tensor in other.state_dict().items() if not tensor.equal(first.state_dict()[name])]
    assert names in (["score.weight"], ["classifier.weight"])


def test_loading_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path, "llama")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_classifier(folder)
    assert torch.rand(3).equal(expected)


def test_a_classifiers_labels_are_in_its_config(tmp_path: Path) -> None:
    model = load_classifier(write_tiny_model(tmp_path / "start", "bert"), "neg", "mid", "pos")
    save_model(model, tiny_tokenizer(), tmp_path / "end")
    config = load_config(tmp_path / "end")
    assert config.id2label == {0: "neg", 1: "mid", 2: "pos"}
    assert config.label2id == {"neg": 0, "mid": 1, "pos": 2}
    assert config.num_labels == 3


def test_a_skeletons_head_has_as_many_rows_as_labels(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path, "llama")
    skeleton = load_skeleton(folder, task="sequence_classification", num_labels=5)
    assert skeleton.get_parameter("score.weight").shape == (5, 64)


def test_a_head_with_as_many_labels_is_kept(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path, "bert")
    kept = load_classifier(folder, seed=9).get_parameter("classifier.weight")
    assert kept.equal(tiny_model("bert").get_parameter("classifier.weight"))


def test_a_decoder_classifies_at_the_last_token_before_the_padding(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path, "gpt2")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": None}))
    model = load_classifier(folder)
    assert model.config.pad_token_id == 0
    short, padded = torch.tensor([[20, 21]]), torch.tensor([[20, 21, 0, 0]])
    mask = torch.tensor([[1, 1, 0, 0]])
    torch.testing.assert_close(model(input_ids=padded, attention_mask=mask).logits, model(input_ids=short).logits)


def test_one_label_means_regression_and_none_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path, "bert")
    config = load_classifier(folder, "LABEL_0").config
    assert (config.problem_type, config.num_labels) == ("regression", 1)
    with pytest.raises(ConfigError, match=r"dataset must have labels, got \[\]"):
        load_model(folder, dtype=torch.float32, task="sequence_classification")


@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        ("bert", "sentence and label"),
        ("roberta", "label"),
        ("t5", ""),
        ("pegasus", "an encoder with a decoder"),
        ("marian", "an encoder with a decoder"),
    ],
)
def test_only_a_decoder_is_taken_for_text_and_an_encoder_told_its_columns(
    kind: str, advice: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(ConfigError, match=f"causal language model for a dataset of text, got '{kind}'.*{advice}"):
        load_causal(tmp_path)
    with pytest.raises(ConfigError, match="causal language model"):
        load_skeleton(tmp_path, task="causal_lm")


@pytest.mark.parametrize(
    "text",
    ["{", '{"model_type": "no-such-kind"}', "{}", '{"auto_map": {"AutoConfig": "own.Own"}, "model_type": "own"}'],
)
def test_a_config_transformers_cannot_read_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"model_name_or_path must hold a config\.json") as caught:
        load_config(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.9])
def test_truncated_or_absent_weights_are_one_line(kept: float, tmp_path: Path) -> None:
    weights = write_tiny_model(tmp_path, "llama") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: int(kept * weights.stat().st_size)])
    if not kept:
        weights.unlink()
    with pytest.raises(ConfigError, match="model_name_or_path must hold intact weights") as caught:
        load_causal(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_blocks_missing_weight_is_named(family: Family, tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path, family) / "model.safetensors"
    weights = load_file(path)
    name = sorted(name for name in weights if ".1." in name and name.endswith("weight"))[0]
    save_file({key: tensor for key, tensor in weights.items() if key != name}, path, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="hold all weights") as caught:
        load(tmp_path, family)
    assert name in str(caught.value)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_weights_of_another_size_are_refused(family: Family, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path, family)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 112}))
    with pytest.raises(ConfigError, match="model_name_or_path must hold") as caught:
        load(folder, family)
    assert "\n" not in str(caught.value)


def test_weights_that_do_not_fit_are_named_before_anything_starts(tmp_path: Path) -> None:
    tiny_job(tmp_path)
    path = tmp_path / "llama" / "model.safetensors"
    weights = load_file(path)
    lost = weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"hold all weights .*; without model\.layers\.1\.mlp\.up_proj\.weight"):
        tiny_job(tmp_path)
    save_file({**weights, "model.layers.1.mlp.up_proj.weight": lost[:-1].clone()}, path, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="model_name_or_path must hold intact weights"):
        tiny_job(tmp_path)


def test_a_folder_without_tokenizer_is_one_line(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path, "llama")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ConfigError, match="model_name_or_path must hold a tokenizer") as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)


def test_the_end_token_pads_where_there_is_no_pad_token_and_one_must_exist(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(write_tiny_model(tmp_path, "llama"))
    assert load_tokenizer(tmp_path).pad_token == "<eos>"
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="a pad or an end token"):
        load_tokenizer(tmp_path)


def test_the_cache_is_off_in_training_and_on_in_the_saved_model(tmp_path: Path) -> None:
    model = load_causal(write_tiny_model(tmp_path / "start", "llama"))
    assert model.config.use_cache is False
    save_model(model, tiny_tokenizer(), tmp_path / "end")
    assert load_config(tmp_path / "end").use_cache is True


@pytest.mark.parametrize(
    "content",
    [{"do_sample": False, "temperature": 0.5}, {"num_beams": 1, "early_stopping": True}],
    ids=["sampling without sampling", "beams without beams"],
)
def test_a_generation_config_that_transformers_would_refuse_to_save_is_saved_as_it_is(
    tmp_path: Path, content: dict[str, Any]
) -> None:
    folder = write_tiny_model(tmp_path / "start", "llama")
    (folder / "generation_config.json").write_text(json.dumps(content))
    model = load_causal(folder)
    assert model.generation_config is not None
    model.generation_config.eos_token_id = 3  # transformers is strict with what was changed
    check_saving(model, tiny_tokenizer(), folder)
    save_model(model, tiny_tokenizer(), tmp_path / "end")
    saved = json.loads((tmp_path / "end" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [2, 3]  # every end that is known
    again = load_causal(tmp_path / "end").generation_config
    assert again is not None
    assert {name: getattr(again, name) for name in content} == content


class Unsavable(PreTrainedTokenizerFast):
    def save_pretrained(self, *_args: object, **_kwargs: object) -> tuple[str, ...]:
        raise TypeError("Object of type set is not JSON serializable")


def test_what_cannot_be_saved_is_refused_before_and_costs_no_weights_after(tmp_path: Path) -> None:
    model = tiny_model("llama")
    tokenizer = Unsavable(tokenizer_object=Tokenizer(WordLevel()))  # type: ignore[no-untyped-call]
    with pytest.raises(ConfigError, match=r"model_name_or_path must be a model that can be saved.*not JSON serial"):
        check_saving(model, tokenizer, tmp_path)
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_model(model, tokenizer, tmp_path / "end")
    assert {"config.json", "model.safetensors"} <= {path.name for path in (tmp_path / "end").iterdir()}
    assert not list((tmp_path / "end").glob(f"{SAVING}*"))


def test_saving_keeps_other_files_and_removes_an_older_saves_shards(tmp_path: Path) -> None:
    model = load_causal(write_tiny_model(tmp_path / "start", "llama"))
    end = tmp_path / "end"
    with silenced():
        tiny_model("llama", seed=1).save_pretrained(end, max_shard_size="100KB")
    assert (end / "model.safetensors.index.json").exists()
    (end / "metrics.jsonl").write_text("{}\n")
    save_model(model, tiny_tokenizer(), end)
    assert sorted(path.name for path in end.iterdir() if "model" in path.name) == ["model.safetensors"]
    assert (end / "metrics.jsonl").read_text() == "{}\n"
    assert_same_weights(load_causal(end), model)


def test_a_tokenizer_of_several_chat_templates_is_saved_and_saved_again(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    templates = {"default": str(tokenizer.chat_template), "tool_use": "{{ messages }}"}
    tokenizer.chat_template = templates
    for _ in range(2):
        save_model(tiny_model("llama"), tokenizer, tmp_path)
        assert load_tokenizer(tmp_path).chat_template == templates
    assert all(path.stat().st_mode & 0o100 for path in tmp_path.iterdir() if path.is_dir())  # or nobody gets in
    assert not list(tmp_path.glob(f"{SAVING}*"))


def test_saved_files_are_as_readable_as_any_other(tmp_path: Path) -> None:
    save_model(tiny_model("llama"), tiny_tokenizer(), tmp_path / "end")
    (tmp_path / "other").touch()
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "end").iterdir()}
    assert modes == {(tmp_path / "other").stat().st_mode & 0o777}


def test_a_save_that_fails_leaves_the_older_checkpoint(tmp_path: Path) -> None:
    class DiskFull(PreTrainedModel):
        def save_pretrained(self, *_args: object, **_kwargs: object) -> None:
            raise OSError("No space left on device")

    save_model(tiny_model("llama"), tiny_tokenizer(), tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OSError, match="No space left"):
        save_model(DiskFull(load_config(tmp_path)), tiny_tokenizer(), tmp_path)
    assert sorted(tmp_path.iterdir()) == before
    assert_same_weights(load_causal(tmp_path), tiny_model("llama"))


def test_loading_and_saving_print_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = write_tiny_model(tmp_path / "start", "gpt2")
    capfd.readouterr()
    save_model(load_classifier(folder), load_tokenizer(folder), tmp_path / "end")
    assert capfd.readouterr() == ("", "")


def test_silence_ends_with_its_context() -> None:
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    with silenced():
        assert transformers_logging.get_verbosity() == logging.ERROR
    assert transformers_logging.get_verbosity() == verbosity
    assert transformers_logging.is_progress_bar_enabled() == bars
