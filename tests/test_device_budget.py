"""What may be taken of a device's memory: counted on a CPU, forecast, and kept to."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from lsp_ray.device import noise
from lsp_ray.device.memory import LiveStorage, peak_of
from lsp_ray.device.step_report import StepReport
from lsp_ray.models.layers import find_layers
from lsp_ray.models.load import load_skeleton
from lsp_ray.models.loss import num_targets
from lsp_ray.runtime.actors.device_side import DeviceSide
from lsp_ray.runtime.prepare.job import Job
from lsp_ray.runtime.prepare.model_shape import model_shape
from lsp_ray.sim import memory
from lsp_ray.sim.workload import Workload
from tests.tiny_jobs import tiny_config, tiny_job

NUM_BLOCKS, DIM = 6, 64


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a model whose blocks are large beside what a process has of its own."""
    tiny_config(tmp_path)
    config = LlamaConfig.from_pretrained(tmp_path / "llama")
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 512, 1024, NUM_BLOCKS
    config.head_dim = config.hidden_size // config.num_attention_heads
    config.vocab_size = 20_000
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "llama")
    return tmp_path


def elsewhere_bytes() -> int:
    """What this process holds besides, as other tests' models."""
    gc.collect()
    live = LiveStorage()
    live.watch_all()
    return live.live_bytes


def step_of(job: Job) -> StepReport:
    """The first step of a job, without anyone who takes its gradients."""
    side = DeviceSide(job, lambda _news: None)
    try:
        side.setup()
        gc.collect()  # what loading has left is not this step's
        return side.run_step(0)
    finally:
        side.close()


def job_of(folder: Path, home: str, **runtime: Any) -> Job:
    return tiny_job(
        folder,
        max_steps=1,
        load_in_4bit=True,
        bf16=True,
        gradient_checkpointing=True,
        lsp={"subspace_dim": DIM, "check_every": 0, "fit": "random"},
        runtime={"weights": home, **runtime},
    )


@pytest.mark.parametrize("home", ["host", "device"])
def test_the_peak_of_a_step_is_forecast_within_a_twentieth(folder: Path, home: Any) -> None:
    job = job_of(folder, home)
    batch = job.micro_batches.step(0)[0]
    besides = elsewhere_bytes()
    found = step_of(job).peak_device_bytes
    assert found is not None
    skeleton = load_skeleton(job.model_folder, task=job.task)
    work = Workload(
        method="lsp",
        batch_size=batch["input_ids"].shape[0],
        seq_length=batch["input_ids"].shape[1],
        typical_targets=num_targets(batch),
        bits=4,
        weights=home,
        gradient_checkpointing=True,
        subspace_dim=DIM,
        nnz_per_row=job.config.lsp.nnz_per_row,
    )
    shape = model_shape(skeleton, find_layers(skeleton))
    # nobody takes the payloads here, so all of them lie there at the end
    payloads = sum(map(work.payload_bytes, shape.layers))
    assert found - besides == pytest.approx(memory.device_memory(shape, work, payloads).peak_bytes, rel=0.05)


def test_a_cpu_keeps_to_what_may_be_taken_of_its_memory(folder: Path) -> None:
    streamed, resident = (job_of(folder, home) for home in ("host", "device"))
    besides = elsewhere_bytes()
    free = step_of(streamed)
    assert free.peak_device_bytes is not None
    own_bytes = free.peak_device_bytes - besides
    enough_gb = (besides + 1.05 * own_bytes) / 1e9
    kept = step_of(_within(streamed, enough_gb))
    assert kept.losses == free.losses
    with pytest.raises(torch.OutOfMemoryError, match=r"GB of tensors are alive, \d\.\d+ GB may be"):
        step_of(_within(resident, enough_gb))
    with pytest.raises(torch.OutOfMemoryError):
        step_of(_within(streamed, (besides + 0.9 * own_bytes) / 1e9))


def _within(job: Job, device_memory_gb: float) -> Job:
    runtime = replace(job.config.runtime, device_memory_gb=device_memory_gb)
    return replace(job, config=replace(job.config, runtime=runtime))


def test_what_is_let_go_may_be_taken_again() -> None:
    live = LiveStorage(limit_bytes=1000)
    for _ in range(3):
        tensor = torch.empty(900, dtype=torch.uint8)
        live.watch(tensor)
        with pytest.raises(torch.OutOfMemoryError, match=r"^0.000 GB of tensors are alive"):
            live.watch(torch.empty(200, dtype=torch.uint8))
        del tensor
    with (
        pytest.raises(torch.OutOfMemoryError),
        peak_of(torch.device("cpu"), limit_bytes=1),
    ):
        torch.empty(1)


def test_the_noise_is_as_large_as_forecast() -> None:
    assert noise.noise_block(torch.Generator(), torch.device("cpu")).nbytes == memory.NOISE_BYTES
