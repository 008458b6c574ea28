"""Frozen weights that several processes use: the same bits, held once, never written, gone at the end."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from lsp_ray.device.backend import CpuBackend
from lsp_ray.device.compute_trace import ComputeTrace
from lsp_ray.device.shared_weights import CAN_SHARE, SharedWeights, WeightsPlace
from lsp_ray.device.streamed_weights import StreamedWeights
from lsp_ray.errors import WorkerLostError
from lsp_ray.methods.streaming import stream_weights
from lsp_ray.models.layers import find_layers
from lsp_ray.models.loss import summed_loss
from lsp_ray.runtime.actors.model_files import ModelFiles
from lsp_ray.runtime.prepare.job import Job
from tests.tiny_jobs import deepen, tiny_job

pytestmark = pytest.mark.skipif(not CAN_SHARE, reason="needs memory without a name")

OPEN_AND = """
import os, sys, time
from lsp_ray.device.shared_weights import SharedWeights, WeightsPlace
pid, fd, size = map(int, sys.argv[1:4])
shared = SharedWeights(WeightsPlace(pid=pid, fd=fd, sizes=(size,)))
piece = shared.take(size)
print(int(piece.sum()), os.getpid(), shared.place.fd, flush=True)
"""


def other(place: WeightsPlace, then: str) -> tuple[subprocess.Popen[str], list[int]]:
    """Another process that has opened the weights; their sum, its number and its file's."""
    command = [sys.executable, "-c", OPEN_AND + then, str(place.pid), str(place.fd), str(place.sizes[0])]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, [int(word) for word in process.stdout.readline().split()]


def test_a_planted_write_ends_the_process_that_makes_it() -> None:
    shared = SharedWeights()
    piece = shared.take(5000)
    piece.fill_(1)
    writer, (found, _, _) = other(shared.place, "shared.protect()\npiece[7] = 3")
    with writer:
        assert found == 5000
        assert writer.wait(60) == -signal.SIGSEGV
    assert int(piece.sum()) == 5000


def test_weights_outlive_who_made_them_and_go_with_the_last_who_has_them() -> None:
    shared = SharedWeights()
    shared.take(5000).fill_(1)
    holder, (found, pid, fd) = other(shared.place, "sys.stdin.read()")
    with holder:
        del shared
        gc.collect()
        again = SharedWeights(WeightsPlace(pid=pid, fd=fd, sizes=(5000,)))
        assert int(again.take(5000).sum()) == found == 5000
        holder.kill()
    place = again.place
    last = SharedWeights(place)
    assert int(last.take(5000).sum()) == 5000
    with pytest.raises(WorkerLostError, match="which has the frozen weights, is gone"):
        SharedWeights(WeightsPlace(pid=pid, fd=fd, sizes=(5000,)))
    del again, last
    gc.collect()
    assert not Path(f"/proc/self/fd/{place.fd}").exists()
    assert "lsp_ray-weights" not in Path("/proc/self/maps").read_text(), "nothing holds its pages"


def streamed(job: Job, model: PreTrainedModel, shared: SharedWeights | None) -> StreamedWeights:
    layers = find_layers(model, job.unreached)
    weights = stream_weights(model, layers, job.config.lsp, CpuBackend(), quantized=job.quantized, shared=shared)
    weights.start()
    return weights


def gradient_and_logits(model: PreTrainedModel, weights: StreamedWeights) -> list[torch.Tensor]:
    ids = torch.arange(5, 15)[None]
    model.train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    weights.begin_step(0, 1, ComputeTrace(CpuBackend(), is_on=False))
    weights.begin_pass()
    seen: list[torch.Tensor] = []

    def note(_module: nn.Module, _args: object, output: torch.Tensor) -> torch.Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[-1]

    handle = model.get_input_embeddings().register_forward_hook(note)
    summed_loss(model, {"input_ids": ids, "labels": ids}).backward()
    handle.remove()
    assert seen[0].grad is not None
    with torch.no_grad():
        return [model(input_ids=ids).logits, seen[0].grad]


@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", {}), ("gpt2", {"bf16": True}), ("qwen2", {"bf16": True, "load_in_4bit": True})],
    ids=["float32", "bf16", "NF4"],
)
def test_a_model_that_another_one_packed_computes_the_same_from_the_same_memory(
    tmp_path: Path, family: Any, changes: dict[str, Any]
) -> None:
    deepen(tmp_path, family, 4, 20_000)
    job = tiny_job(tmp_path, family, runtime={"weights": "host"}, lsp={"delta": "apart", "check_every": 0}, **changes)
    files = ModelFiles(job, torch.device("cpu"))
    plain, first = (files.load(job.model_folder) for _ in range(2))
    expected = [weight.clone() for weight in gradient_and_logits(plain, streamed(job, plain, None))]
    shared = SharedWeights()
    maker = streamed(job, first, shared)
    taken = SharedWeights(shared.place)
    second = taken.model()
    kinds = [[type(parameter) for parameter in model.parameters()] for model in (first, second)]
    assert kinds[0] == kinds[1]
    taker = streamed(job, second, taken)
    inode = os.fstat(shared.place.fd).st_ino
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if f" {inode} " in line]
    assert len(mapped) >= 2, "both see the same file"
    assert all(line.split()[1].startswith("r--") for line in mapped), "and nobody may write to it"
    for model, weights in ((first, maker), (second, taker)):
        for found, wanted in zip(gradient_and_logits(model, weights), expected, strict=True):
            assert torch.equal(found, wanted)
        weights.close()
