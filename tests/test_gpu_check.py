"""scripts/gpu_check.py: its checks hold on the CPU's backend, and find what they are there to find."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Self

import pytest
import torch

from lsp_ray.device.backend import Backend, CpuBackend, Fence, HostStamp
from lsp_ray.device.rounding import Rounding, StepNoise
from lsp_ray.projection.sparse_projector import SparseProjector
from lsp_ray.trace import WorkStream
from scripts.gpu_check import main, report
from scripts.gpu_checks.check import Bench, Check, CheckFailedError, Sizes, relative_error
from scripts.gpu_checks.kernels import compression, kernel_checks, rounding
from scripts.gpu_checks.runs import SMALL, Load, run_checks, write_llama
from scripts.gpu_checks.streams import (
    callbacks,
    event_times,
    ordered_copies,
    page_locking,
    reused_buffers,
    stream_checks,
)

LEFT_OUT = ("native", "zero_offload", "layerwise_fcfs", "sequential")  # the same code as a check that stays
SIZES = Sizes(rows=96, columns=64, dim=16, num_tokens=32, copy_numel=1 << 10, busy_side=32)


def bench_with(backend: Backend) -> Bench:
    return Bench(backend=backend, sizes=SIZES)


BENCH = bench_with(CpuBackend())


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    sizes = SMALL | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    folder = write_llama(tmp_path_factory.mktemp("llama"), **sizes)
    return Load(folder=folder, batch_size=2, seq_length=16, subspace_dim=8, num_steps=6)


@pytest.mark.parametrize("check", [*stream_checks(BENCH), *kernel_checks(BENCH)], ids=lambda check: str(check[0]))
def test_a_check_of_the_device_passes_on_the_cpu(check: tuple[str, Check]) -> None:
    assert check[1]()


def test_the_checks_of_whole_runs_pass_on_the_cpu(
    load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    every = run_checks(BENCH, load, replace(load, num_steps=4))
    checks = [(name, check) for name, check in every if not any(left_out in name for left_out in LEFT_OUT)]
    assert report(checks, "this machine", tmp_path / "found.json") == 0
    content = json.loads((tmp_path / "found.json").read_text())
    assert [outcome["check"] for outcome in content["outcomes"]] == [name for name, _ in checks]
    lines = capsys.readouterr().out.splitlines()
    assert (lines[0], lines[-1]) == ("this machine", f"{len(checks)} of {len(checks)} checks passed")
    assert "tokens/s" in next(line for line in lines if line.startswith("a step of lsp"))


def test_one_failed_check_makes_the_exit_code_1_and_stops_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    def crashes() -> str:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore lines")

    assert report([("first", crashes), ("second", lambda: "fine")], "this machine", None) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].endswith("FAILED  RuntimeError: CUDA error: an illegal memory access was encountered")
    assert lines[2].split() == ["second", "ok", "fine"]
    assert lines[3] == "1 of 2 checks passed; failed: first"


class LosesTheLastToken(SparseProjector):
    """A compression whose kernel stops one token early."""

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> SparseProjector:
        moved = super().to(device, dtype)
        return LosesTheLastToken(moved.left, moved.right)

    def compress_outer(self, grad_output_TM: torch.Tensor, input_projected_TE: torch.Tensor) -> torch.Tensor:
        return super().compress_outer(grad_output_TM[:-1], input_projected_TE[:-1])


class RoundsDown(Rounding):
    """Truncates, as an addition without noise would."""

    def of_step(self, step: int) -> StepNoise:
        block, state = super().of_step(step)
        return StepNoise(torch.zeros_like(block), state)


@dataclass(frozen=True)
class LateFence:
    copies: list[Callable[[], object]]

    def synchronize(self) -> None:
        while self.copies:
            self.copies.pop(0)()


class CopiesShort(CpuBackend):
    def copy_async(self, stream: WorkStream, destination: torch.Tensor, source: torch.Tensor) -> None:
        destination[:-1].copy_(source[:-1])


class NeverWaits(CpuBackend):
    """Copies lag behind, and no stream waits for another."""

    def __init__(self) -> None:
        self._queued: dict[WorkStream, list[Callable[[], object]]] = {stream: [] for stream in WorkStream}

    def copy_async(self, stream: WorkStream, destination: torch.Tensor, source: torch.Tensor) -> None:
        self._queued[stream].append(partial(destination.copy_, source))

    def record(self, stream: WorkStream) -> Fence:
        return LateFence(self._queued[stream])

    def empty(self, stream: WorkStream, numel: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((numel,), torch.nan, dtype=dtype)


class ClaimsToLock(CpuBackend):
    def page_lock(self, slot: torch.Tensor) -> bool:
        return True


class TellsNobody(CpuBackend):
    def when_passed(self, fence: Fence, then: Callable[[], None]) -> Future[None]:
        told: Future[None] = Future()
        told.set_result(None)
        return told


class Milliseconds(HostStamp):
    def seconds_until(self, later: Self) -> float:
        return 1e3 * (later.at_s - self.at_s + 1e-5)


class CountsMilliseconds(CpuBackend):
    def stamp(self) -> HostStamp:
        return Milliseconds(at_s=time.monotonic())


@pytest.mark.parametrize(
    "check",
    [
        partial(compression, BENCH, torch.float32, LosesTheLastToken.random),
        partial(compression, BENCH, torch.bfloat16, LosesTheLastToken.random),
        partial(rounding, BENCH, RoundsDown),
        partial(page_locking, bench_with(ClaimsToLock())),
        partial(ordered_copies, bench_with(CopiesShort())),
        partial(ordered_copies, bench_with(NeverWaits())),
        partial(reused_buffers, bench_with(NeverWaits())),
        partial(callbacks, bench_with(TellsNobody())),
        partial(event_times, bench_with(CountsMilliseconds())),
    ],
)
def test_a_planted_fault_is_found(check: Check) -> None:
    with pytest.raises(CheckFailedError):
        check()


def test_what_is_not_a_number_is_an_error() -> None:
    with pytest.raises(CheckFailedError):
        relative_error(torch.tensor([1.0, torch.nan]), torch.ones(2), 1.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run")
def test_without_a_gpu_it_says_so_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: the machine must have a GPU that torch finds, got 'torch ")
    assert said.err.count("\n") == 1
