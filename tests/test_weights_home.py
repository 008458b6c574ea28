"""`runtime.weights auto`: on the device as long as they fit with the reserve."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig

from lsp_ray.config import RunConfig
from lsp_ray.errors import ConfigError
from lsp_ray.models.layers import find_layers
from lsp_ray.models.load import load_config, load_skeleton
from lsp_ray.runtime.prepare.device_choice import device_bytes
from lsp_ray.runtime.prepare.job import prepare_job
from lsp_ray.runtime.prepare.weights_home import with_weights
from lsp_ray.sim.hardware_profile import RESERVE_BYTES
from tests.tiny import task_of
from tests.tiny_jobs import deepen, tiny_config, tiny_job


def decided(config: RunConfig, device_bytes: int | None) -> tuple[RunConfig, list[str]]:
    found, _, notes = prepared(config, device_bytes)
    return found, notes


def prepared(config: RunConfig, device_bytes: int | None) -> tuple[RunConfig, int, list[str]]:
    path = Path(config.model_name_or_path)
    skeleton = load_skeleton(path, task=task_of("llama"))
    notes: list[str] = []
    found, num_buffers = with_weights(
        replace(config, max_seq_length=64),
        load_config(path),
        skeleton,
        find_layers(skeleton),
        device_bytes,
        notes.append,
        quantized=config.bits is not None,
        bf16=True,
    )
    return found, num_buffers, notes


@pytest.mark.parametrize("changes", [{"lsp": {"delta": "apart"}}, {"load_in_4bit": True, "lsp": {"delta": "apart"}}])
def test_weights_leave_the_device_where_they_would_take_of_the_reserve(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = tiny_config(tmp_path, **changes)
    for there, home in (
        (None, "device"),
        (int(RESERVE_BYTES) + (64 << 20), "device"),
        (int(RESERVE_BYTES) + 1000, "host"),
    ):
        found, notes = decided(config, there)
        assert found.runtime.weights == home
        assert found.recomputes == (home == "host")
        assert (found.lsp.check_every == 0) == (home == "host")
        assert bool(notes) == (home == "host")
    line = r"runtime.weights auto: host, as 0\.0\d+ GB and 1 GB to spare do not fit into the device's 1 GB"
    assert re.fullmatch(line, notes[0])


@pytest.mark.parametrize(
    "changes",
    [
        {"lsp": {"delta": "merged"}},
        {"method": "native"},
        {"method": "lora", "load_in_4bit": True},
        {"load_in_8bit": True, "lsp": {"delta": "apart"}},
        {"lsp": {"delta": "apart"}, "torch_compile": True},
        {"lsp": {"delta": "apart"}, "runtime": {"weights": "device"}},
    ],
)
def test_what_could_not_come_up_stays_where_it_is(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert decided(tiny_config(tmp_path, **changes), 1000)[0].runtime.weights == "device"


def test_as_many_blocks_are_on_the_device_as_fit(tmp_path: Path) -> None:
    deepen(tmp_path, "llama", 6)
    config = tiny_config(tmp_path, runtime={"weights": "host"}, lsp={"delta": "apart"})
    least = int(RESERVE_BYTES) + 7_000_000  # what weights are rounded with alone takes 6
    found = [prepared(config, there)[1] for there in range(least, least + 1_500_000, 50_000)]
    assert sorted(found) == found
    assert set(found) == {2, 3, 4, 5, 6, 7}  # and the output embedding, in one piece
    assert prepared(config, None)[1] == 2
    # a memory that was given is left a tenth, not what a desktop takes
    limited = replace(config, runtime=replace(config.runtime, device_memory_gb=0.01))
    assert prepared(limited, 10_000_000)[1] == 7


@pytest.mark.parametrize(
    ("family", "note"),
    [("llama", None), ("bert", "as it is trained"), ("gemma2", "as this model changes its answer")],
)
def test_an_output_layer_that_cannot_come_up_is_said_to_stay(tmp_path: Path, family: Any, note: str | None) -> None:
    config = tiny_config(tmp_path, "llama" if family == "gemma2" else family, runtime={"weights": "host"})
    if family == "gemma2":
        sizes = LlamaConfig.from_pretrained(config.model_name_or_path).to_dict()
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        model = Gemma2ForCausalLM(Gemma2Config(head_dim=16, **{name: sizes[name] for name in names}))
        model.save_pretrained(config.model_name_or_path)
    notes: list[str] = []
    prepare_job(config, notes.append)
    found = [line for line in notes if "the output layer stays on the device" in line]
    assert [line.partition(", ")[2] for line in found] == ([] if note is None else [note])


def test_no_more_than_there_is_can_be_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(tmp_path, runtime={"device_memory_gb": 4.0})
    assert device_bytes(config, "cpu") == 4_000_000_000
    assert device_bytes(tiny_config(tmp_path), "cpu") is None

    class Card:
        total_memory = 3 << 30

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _index: Card)
    assert device_bytes(tiny_config(tmp_path), "cuda") == 3 << 30
    with pytest.raises(ConfigError, match=r"runtime.device_memory_gb must be at most 3.22, all of the GPU's, got 4.0"):
        device_bytes(config, "cuda")


def test_a_cpus_device_is_main_memory_itself(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, lsp={"delta": "apart"})
    assert job.config.runtime.weights == "device"
    assert job.streamed_bytes == 0
