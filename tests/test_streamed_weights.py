"""Whole runs whose frozen weights come up from main memory: the same bits as with weights on the device."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lsp_ray.device.backend import CpuBackend
from lsp_ray.device.frozen_block import FrozenBlock
from lsp_ray.device.streamed_weights import StreamedWeights
from lsp_ray.errors import ConfigError
from lsp_ray.methods.lora import ADAPTER_FOLDER
from lsp_ray.runtime.checkpoints.checkpoint import checkpoints
from lsp_ray.runtime.prepare.job import prepare_job, resumed
from lsp_ray.trace import WorkStream
from lsp_ray.trace_file import read_trace
from tests.tiny import Family
from tests.tiny_jobs import (
    assert_same_bits,
    deepen,
    run_on_threads,
    saved_weights,
    tiny_config,
    tiny_job,
    weights_after,
)

HOST: dict[str, Any] = {"weights": "host"}
APART: dict[str, Any] = {"delta": "apart", "check_every": 0}
EVERYTHING: dict[str, Any] = {"weight_decay": 0.1, "max_grad_norm": 0.5, "gradient_accumulation_steps": 2}


NUM_BLOCKS = 5  # more than there are buffers
NUM_ROWS = 20_000  # of embeddings, whose output's come up in two pieces
GBPS = 0.02  # a link that hides behind nothing, on which a block takes longer than a bucket saves up
LLAMA_LINEARS = [(64, 64), (32, 64), (32, 64), (64, 64), (96, 64), (96, 64), (64, 96)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where `tiny_config` finds models that are deeper than its own."""
    families: tuple[Family, ...] = ("llama", "qwen2", "gpt2")
    for family in families:
        deepen(tmp_path, family, NUM_BLOCKS, NUM_ROWS)
    return tmp_path


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / ADAPTER_FOLDER / "adapter_model.safetensors")


@pytest.mark.parametrize(("family", "policy"), [("llama", "layerwise"), ("qwen2", "delayed"), ("gpt2", "sequential")])
def test_a_run_trains_the_same_bits_as_with_weights_on_the_device(folder: Path, family: Any, policy: str) -> None:
    changes: dict[str, Any] = {"family": family, "lsp": APART, **EVERYTHING}
    device = weights_after(folder, "device", runtime={"policy": policy}, **changes)
    host = weights_after(folder, "host", runtime={"policy": policy, **HOST}, **changes)
    assert_same_bits(device, host)


def test_a_base_in_4_bits_trains_the_same_bits(folder: Path) -> None:
    for name, runtime in (("device", {}), ("host", HOST)):
        job = tiny_job(folder, "qwen2", load_in_4bit=True, bf16=True, runtime=runtime, **EVERYTHING)
        run_on_threads(job, folder / name)
    assert_same_bits(adapter(folder / "device"), adapter(folder / "host"))


def test_a_checkpoint_goes_on_to_the_same_bits_with_weights_wherever_they_are(folder: Path) -> None:
    changes: dict[str, Any] = {"lsp": APART, "max_steps": 6, "save_steps": 3, **EVERYTHING}
    host, device = (tiny_job(folder, runtime=runtime, **changes) for runtime in (HOST, {"policy": "delayed"}))
    run_on_threads(host, folder / "whole")
    whole = saved_weights(host, folder / "whole")
    checkpoint = checkpoints(folder / "whole")[3]
    run_on_threads(resumed(host, checkpoint), folder / "host")
    assert_same_bits(whole, saved_weights(host, folder / "host"))
    run_on_threads(device, folder / "delayed")
    again = resumed(
        tiny_job(folder, runtime={"policy": "delayed", **HOST}, **changes), checkpoints(folder / "delayed")[3]
    )
    run_on_threads(again, folder / "again")
    assert_same_bits(saved_weights(device, folder / "delayed"), saved_weights(device, folder / "again"))


def test_two_blocks_are_on_the_device_and_what_came_up_and_was_waited_for_is_told(folder: Path) -> None:
    changes: dict[str, Any] = {"lsp": APART, "max_steps": 4, "gradient_accumulation_steps": 2}
    changes["gradient_checkpointing"] = True
    device, host = (tiny_job(folder, runtime=runtime, **changes) for runtime in ({}, {**HOST, "link_gbps": GBPS}))
    gc.collect()  # the measure knows no difference between this run's tensors and what other tests left
    resident, _ = run_on_threads(device, folder / "device")
    gc.collect()
    streamed, listener = run_on_threads(host, folder / "host")
    block = 4 * sum(rows * columns for rows, columns in LLAMA_LINEARS)
    assert resident.peak_device_bytes is not None
    assert streamed.peak_device_bytes is not None
    saved = resident.peak_device_bytes - streamed.peak_device_bytes
    table = 4 * NUM_ROWS * 64
    assert saved == pytest.approx(NUM_BLOCKS * block + 2 * table - 2 * table / 2, rel=0.05)
    for metrics in listener.steps[2:]:  # the second is measured, and slow
        num_bytes = 2 * (2 * (NUM_BLOCKS - 1) * block + table)  # between two micro-batches the first ones stay
        assert metrics.bytes_h2d == num_bytes + host.bytes_each_way
        assert metrics.exposed_weights_s > 0
        assert metrics.h2d_busy_s > 0.9 * num_bytes / (GBPS * 1e9)
        assert metrics.gpu_busy_s + metrics.exposed_s == pytest.approx(metrics.step_time_s)
        assert metrics.gpu_busy_s > 0
    trace = read_trace(folder / "host" / "internals" / "trace.json")
    assert {(span.row, span.cause) for span in trace.spans if "weights" in (span.category, span.cause)} == {
        ("up-link", None),
        ("GPU waits", "weights"),
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "native"}, "runtime.weights must be device with method native"),
        ({"method": "lora"}, "runtime.weights must be device with method lora"),
        ({"lsp": {"delta": "merged"}}, "lsp.delta must be apart with runtime.weights host"),
        ({"load_in_8bit": True}, "runtime.weights must be device with load_in_8bit"),
        ({"torch_compile": True}, "torch_compile must be false with runtime.weights host"),
        ({"runtime": {"cuda_graphs": True}}, "runtime.cuda_graphs must be false with runtime.weights host"),
    ],
)
def test_what_cannot_be_is_refused_by_its_option(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        tiny_config(tmp_path, **{**changes, "runtime": {**changes.get("runtime", {}), **HOST}})


def test_deltas_are_apart_and_stay_in_their_subspace_without_being_asked(tmp_path: Path) -> None:
    notes: list[str] = []
    job = prepare_job(tiny_config(tmp_path, runtime=HOST), notes.append)
    assert job.config.lsp.is_apart
    assert [note for note in notes if "lsp.check_every is 0" in note]


def test_an_error_of_the_thread_that_copies_ends_the_forward_that_waits() -> None:
    class Broken(CpuBackend):
        def copy_async(self, stream: WorkStream, destination: torch.Tensor, source: torch.Tensor) -> None:
            raise RuntimeError("no link")

    block = torch.nn.Linear(8, 8)
    weights = StreamedWeights([FrozenBlock(block, 0, [block.weight])], Broken())
    weights.start()
    with pytest.raises(RuntimeError, match="no link"):
        block(torch.zeros(2, 8))
    weights.close()
    block(torch.zeros(2, 8))
