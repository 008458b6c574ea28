"""Whole runs whose blocks' inputs wait in main memory for the backward: the same bits as with all on the device."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from lsp_ray.config import GaloreConfig
from lsp_ray.device.backend import CpuBackend
from lsp_ray.device.host_activations import HostActivations
from lsp_ray.errors import ConfigError
from lsp_ray.methods.lora import ADAPTER_FOLDER
from lsp_ray.models.layers import find_layers
from lsp_ray.runtime.checkpoints.checkpoint import checkpoints
from lsp_ray.runtime.prepare.host_memory import HostMemory, check_memory
from lsp_ray.runtime.prepare.job import resumed
from lsp_ray.trace import WorkStream
from lsp_ray.trace_file import read_trace
from tests.tiny import HIDDEN_SIZE, VOCAB_SIZE, Family, deep_model
from tests.tiny_jobs import (
    assert_same_bits,
    deepen,
    run_on_threads,
    saved_weights,
    tiny_config,
    tiny_job,
    weights_after,
)

HOST: dict[str, Any] = {"activations": "host"}
EVERYTHING: dict[str, Any] = {
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
    "gradient_accumulation_steps": 2,
    "max_steps": 3,
}
APART: dict[str, Any] = {"delta": "apart", "check_every": 0}
NUM_BLOCKS = 6  # more than there are buffers
GBPS = 0.002  # a link that hides behind nothing


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where `tiny_config` finds models that are deeper than its own."""
    families: tuple[Family, ...] = ("llama", "gpt2", "opt", "bert")
    for family in families:
        deepen(tmp_path, family, NUM_BLOCKS)
    return tmp_path


@pytest.mark.parametrize(
    ("family", "method", "runtime"),
    [
        ("llama", "lsp", {"policy": "delayed"}),
        ("gpt2", "zero_offload", {}),
        ("bert", "native", {}),
        ("opt", "galore", {}),
        ("llama", "lsp", {"weights": "host"}),
    ],
)
def test_a_run_trains_the_same_bits_as_with_activations_on_the_device(
    folder: Path, family: Any, method: Any, runtime: dict[str, Any]
) -> None:
    lsp = APART if "weights" in runtime else {}
    changes: dict[str, Any] = {"family": family, "method": method, "lsp": lsp, **EVERYTHING}
    changes["galore"] = GaloreConfig(rank=16)
    device = weights_after(folder, "device", runtime=runtime, gradient_checkpointing=True, **changes)
    host = weights_after(folder, "host", runtime={**runtime, **HOST}, **changes)
    assert_same_bits(device, host)


def test_lora_trains_the_same_bits(folder: Path) -> None:
    for name, runtime in (("device", {}), ("host", HOST)):
        job = tiny_job(folder, method="lora", bf16=True, gradient_checkpointing=True, runtime=runtime, **EVERYTHING)
        run_on_threads(job, folder / name)
    tensors = "adapter_model.safetensors"
    device, host = ((folder / name / ADAPTER_FOLDER / tensors).read_bytes() for name in ("device", "host"))
    assert device == host


def test_a_checkpoint_goes_on_to_the_same_bits_with_activations_wherever_they_are(folder: Path) -> None:
    changes: dict[str, Any] = {**EVERYTHING, "max_steps": 6, "save_steps": 3, "num_replicas": 2}
    host, device = (tiny_job(folder, runtime=runtime, gradient_checkpointing=True, **changes) for runtime in (HOST, {}))
    run_on_threads(host, folder / "whole")
    run_on_threads(resumed(device, checkpoints(folder / "whole")[3]), folder / "device")
    assert_same_bits(saved_weights(host, folder / "whole"), saved_weights(device, folder / "device"))


def test_two_inputs_are_on_the_device_and_what_was_copied_and_waited_for_is_told(folder: Path) -> None:
    changes: dict[str, Any] = {"max_steps": 4, "gradient_accumulation_steps": 2, "packing": True}
    changes |= {"max_seq_length": 64, "per_device_train_batch_size": 8, "gradient_checkpointing": True}
    device, host = (tiny_job(folder, runtime={"link_gbps": GBPS, **runtime}, **changes) for runtime in ({}, HOST))
    gc.collect()  # the measure knows no difference between this run's tensors and what other tests left
    resident, told = run_on_threads(device, folder / "device")
    gc.collect()
    parked, listener = run_on_threads(host, folder / "host")
    assert [metrics.loss for metrics in told.steps] == [metrics.loss for metrics in listener.steps]
    assert host.inputs is not None
    assert host.inputs.largest_bytes == 8 * 64 * HIDDEN_SIZE * 4
    assert resident.peak_device_bytes is not None
    assert parked.peak_device_bytes is not None
    saved = resident.peak_device_bytes - parked.peak_device_bytes
    assert saved == pytest.approx((NUM_BLOCKS - 3) * host.inputs.largest_bytes, rel=0.1)
    for metrics in listener.steps[2:]:  # the second is measured, and slow
        moved = metrics.bytes_d2h - host.bytes_each_way
        assert moved == metrics.bytes_h2d - host.bytes_each_way
        assert 0.8 * 2 * host.inputs.parked_bytes < moved <= 2 * host.inputs.parked_bytes
        assert metrics.exposed_activations_s > 0
        assert metrics.d2h_busy_s > 0.9 * moved / (GBPS * 1e9)
        assert metrics.gpu_busy_s + metrics.exposed_s == pytest.approx(metrics.step_time_s)
        assert metrics.gpu_busy_s > 0
    trace = read_trace(folder / "host" / "internals" / "trace.json")
    assert {(span.row, span.cause) for span in trace.spans if "activations" in (span.category, span.cause)} == {
        ("up-link", None),
        ("down-link", None),
        ("GPU waits", "activations"),
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"torch_compile": True}, "torch_compile must be false with runtime.activations host"),
        ({"runtime": {"cuda_graphs": True}}, "runtime.cuda_graphs must be false with runtime.activations host"),
    ],
)
def test_what_cannot_be_is_refused_by_its_option(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        tiny_config(tmp_path, **{**changes, "runtime": {**changes.get("runtime", {}), **HOST}})


def test_main_memory_that_would_hold_the_weights_alone_is_refused_with_what_is_needed(folder: Path) -> None:
    job = tiny_job(folder, runtime=HOST)
    assert job.inputs is not None
    needed = job.store_bytes + job.num_weights * 4 + job.inputs.parked_bytes
    check_memory(job, HostMemory(main_bytes=needed, shared_bytes=needed))
    with pytest.raises(ConfigError, match=r"^runtime.activations must be device, as with blocks' inputs of 0.\d\d GB"):
        check_memory(job, HostMemory(main_bytes=needed - 1, shared_bytes=needed))


def gradients_of(model: PreTrainedModel, ids: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def parked(model: PreTrainedModel, backend: CpuBackend) -> HostActivations:
    model.train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    blocks = [(unit, layer.block) for unit, layer in enumerate(find_layers(model)) if layer.block is not None]
    activations = HostActivations(blocks, backend, 2 * 4 * HIDDEN_SIZE * 4)
    activations.start()
    return activations


def test_memory_grows_for_a_longer_micro_batch_and_a_forward_without_a_backward_leaves_nothing() -> None:
    model = deep_model("llama", NUM_BLOCKS)
    batches = [torch.randint(3, VOCAB_SIZE, (2, length)) for length in (4, 24, 3, 16)]
    activations = parked(model, CpuBackend())
    with torch.no_grad():
        model(input_ids=batches[0], labels=batches[0])
    model(input_ids=batches[0], labels=batches[0], use_cache=False)
    activations.begin_pass()
    host = [gradients_of(model, ids) for ids in batches]
    assert {slot.nbytes for slot in activations.host_bytes} == {2 * 24 * HIDDEN_SIZE * 4}
    activations.close()
    for ids, ours in zip(batches, host, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(gradients_of(model, ids), ours, strict=True))


def test_blocks_that_have_no_part_in_the_loss_or_are_used_twice_change_nothing() -> None:
    model = deep_model("llama", NUM_BLOCKS)
    blocks = model.get_submodule("model.layers")
    assert isinstance(blocks, nn.ModuleList)
    activations = parked(model, CpuBackend())
    rotary = model.get_submodule("model.rotary_emb")

    def passes(order: list[int], ends_at: int) -> list[torch.Tensor]:
        model.zero_grad()
        hidden = torch.rand(2, 4, HIDDEN_SIZE, generator=torch.Generator().manual_seed(0)).requires_grad_()
        position_ids = torch.arange(4)[None]
        outputs = [hidden]
        for block in order:
            outputs.append(
                blocks[block](outputs[-1], position_embeddings=rotary(hidden, position_ids), use_cache=False)
            )
        outputs[ends_at].square().sum().backward()
        assert hidden.grad is not None
        return [hidden.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    cases = [([*range(6)], 2), ([0, 2, 5], 3), ([*range(6), 0, 1], 8), ([*range(6)], 6)]
    host = [passes(*case) for case in cases]
    activations.close()
    for case, ours in zip(cases, host, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(passes(*case), ours, strict=True))


def test_an_error_of_the_thread_that_copies_ends_the_pass_that_waits() -> None:
    class Broken(CpuBackend):
        def copy_async(self, stream: WorkStream, destination: torch.Tensor, source: torch.Tensor) -> None:
            raise RuntimeError("no link")

    model = deep_model("llama", NUM_BLOCKS)
    activations = parked(model, Broken())
    ids = torch.randint(3, VOCAB_SIZE, (2, 4))
    with pytest.raises(RuntimeError, match="no link"):
        gradients_of(model, ids)
    activations.close()
    gradients_of(model, ids)
