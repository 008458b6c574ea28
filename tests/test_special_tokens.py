"""One place decides what pads, ends and begins a text, for data, evaluation, generate and export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from lsp_ray.data.dataset import load_rows
from lsp_ray.data.tokenize import IGNORED, tokenize_rows
from lsp_ray.device.evaluate import generate
from lsp_ray.errors import ConfigError
from lsp_ray.generate import Sampling, Speaker
from lsp_ray.models.load import load_config, load_model, load_tokenizer, tokens_of
from lsp_ray.models.save import save_model
from lsp_ray.models.trained import load_trained
from lsp_ray.special_tokens import SpecialTokens, prompt_ids, special_tokens
from tests.tiny import character_tokenizer, tiny_model, tiny_tokenizer, write_tiny_jsonl, write_tiny_model
from tests.tiny_jobs import run_on_threads, tiny_job

AROUND = [("", ""), ("<bos>", ""), ("", "<eos>"), ("<bos>", "<eos>")]


def trained(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, row: dict[str, str]) -> tuple[str, str]:
    """The text that is trained, and what of it is learnt."""
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(row)}\n" * 3, encoding="utf-8")
    tokenized = tokenize_rows(load_rows(str(path), seed=0, cache_dir=tmp_path), tokenizer, max_seq_length=64)
    learnt = [label for label in tokenized.train[0]["labels"] if label != IGNORED]
    return str(tokenizer.decode(tokenized.train[0]["input_ids"])), str(tokenizer.decode(learnt))


@pytest.mark.parametrize(("before", "after"), AROUND)
@pytest.mark.parametrize("start", ["", "<bos>"])
@pytest.mark.parametrize("end", ["", "<eos>", "<eos>\n"])
def test_nothing_is_between_prompt_and_completion_and_nothing_twice(
    tmp_path: Path, before: str, after: str, start: str, end: str
) -> None:
    tokenizer = character_tokenizer(before=before, after=after)
    begin = start or before
    both = trained(tmp_path, tokenizer, {"prompt": f"{start}q: ", "completion": f"a{end}"})
    assert both == (f"{begin}q: a{end or '<eos>'}", f"a{end or '<eos>'}")
    text, _ = trained(tmp_path, tokenizer, {"text": f"{start}one{end}"})
    assert text == f"{begin}one{end or '<eos>'}"
    assert tokenizer.decode(prompt_ids(tokenizer, [f"{start}q: "])[0]) == f"{begin}q: "


class Holder:
    """Something that names tokens."""

    def __init__(self, **ids: Any) -> None:
        self.__dict__.update(ids)

    def get_text_config(self) -> Holder:
        return self


@pytest.mark.parametrize(
    ("config", "generation", "pad", "ends"),
    [
        ({"eos_token_id": 2}, None, 0, (2,)),
        ({}, None, 0, (2,)),
        ({"eos_token_id": None, "pad_token_id": -1}, {"eos_token_id": [2, 7]}, 0, (2, 7)),
        ({"eos_token_id": [6, 5000]}, {"eos_token_id": 7}, 0, (2, 6, 7)),
    ],
)
def test_ends_are_what_anything_names(
    config: dict[str, Any], generation: dict[str, Any] | None, pad: int, ends: tuple[int, ...]
) -> None:
    holder = None if generation is None else Holder(**generation)
    found = special_tokens(tiny_tokenizer(), Holder(**config), holder, num_rows=128)
    assert (found.pad, found.ends) == (pad, ends)


def test_a_pad_token_outside_of_the_embeddings_gives_way() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<another>"})
    assert tokenizer.pad_token_id == 128
    assert special_tokens(tokenizer, Holder(), None, num_rows=128).pad == tokenizer.eos_token_id
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="have a tokenizer with a pad or an end token"):
        special_tokens(tokenizer, Holder(), None, num_rows=128)


def with_ids(folder: Path, **ids: Any) -> Path:
    """A tiny model whose config.json names these ids and no others."""
    write_tiny_model(folder, "llama")
    for name in ("config.json", "generation_config.json"):
        facts = json.loads((folder / name).read_text())
        for key in ("eos_token_id", "pad_token_id", "bos_token_id"):
            facts.pop(key, None)
        facts |= ids if name == "config.json" else {}
        (folder / name).write_text(json.dumps(facts), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "ids", [{}, {"eos_token_id": None, "pad_token_id": None}, {"pad_token_id": -1}, {"pad_token_id": 128}]
)
def test_any_ids_of_a_config_train_and_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ids: dict[str, Any]
) -> None:
    folder = with_ids(tmp_path / "llama", **ids)
    write_tiny_jsonl(tmp_path / "llama.jsonl", "prompt_completion", 20)
    job = tiny_job(tmp_path, max_steps=1, per_device_train_batch_size=2)
    run_on_threads(job, tmp_path / "out")
    capsys.readouterr()
    speaker = Speaker("it", load_trained(tmp_path / "out"), load_tokenizer(tmp_path / "out"), raw=True)
    speaker.answer("w1 w2", Sampling(max_new_tokens=2))
    assert capsys.readouterr().err == ""
    model, tokenizer = load_model(folder, dtype=torch.float32, task="causal_lm"), load_tokenizer(folder)
    tokens = tokens_of(model, tokenizer)
    assert tokens == SpecialTokens(pad=0, ends=(2,))
    assert len(generate(model, [[20, 21, 22], [23]], 2, tokens)) == 2


def test_an_end_that_only_generation_config_names_ends_an_answer_and_is_saved(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    prompt = [20, 21, 22]
    free = generate(model, [prompt], 8, tokens_of(model, tokenizer))[0]
    end = free[0]
    assert len(free) > 1
    assert model.generation_config is not None
    model.generation_config.eos_token_id = [end]
    tokens = tokens_of(model, tokenizer)
    assert tokens.ends == (2, end)
    assert generate(model, [prompt], 8, tokens)[0] == [end]
    save_model(model, tokenizer, tmp_path / "saved")
    assert GenerationConfig.from_pretrained(tmp_path / "saved").eos_token_id == [2, end]
    loaded = load_model(tmp_path / "saved", dtype=torch.float32, task="causal_lm")
    assert tokens_of(loaded, load_tokenizer(tmp_path / "saved")) == tokens


def test_a_token_without_a_row_is_named_before_anything_starts(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "llama", "llama")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    data = tmp_path / "llama.jsonl"
    data.write_text('{"prompt": "w1", "completion": "w2"}\n' * 20, encoding="utf-8")
    tiny_job(tmp_path)  # no row has it
    data.write_text('{"prompt": "w1", "completion": "w2 <new>"}\n' * 20, encoding="utf-8")
    said = r"embeddings for every token of the data: they have 128 rows, got \"token '<new>' of id 128\""
    with pytest.raises(ConfigError, match=said):
        tiny_job(tmp_path)


def test_a_pad_id_of_no_row_is_none_of_the_configs(tmp_path: Path) -> None:
    LlamaConfig(vocab_size=128, pad_token_id=128).save_pretrained(tmp_path)
    assert load_config(tmp_path).pad_token_id is None
