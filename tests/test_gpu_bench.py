"""scripts/gpu_bench.py: every path runs on a CPU, and whatever fails costs nobody else a figure."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lsp_ray.sim.hardware_profile import load_hardware
from scripts.gpu_bench import _forecast, _Model, main
from scripts.gpu_bench_parts.activity import activity_of
from scripts.gpu_bench_parts.host_profile import FunctionProfile, OperatorProfile
from scripts.gpu_bench_parts.measured import Failed, apart, profile_setting
from scripts.gpu_bench_parts.ours import run_ours
from scripts.gpu_bench_parts.phases import Phase
from scripts.gpu_bench_parts.random_model import random_model, write_folder
from scripts.gpu_bench_parts.settings import NAMES, SIZES, Setting, settings_of

CPU = torch.device("cpu")


def test_figures_are_printed_and_written_and_what_is_missing_is_said(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scripts.gpu_bench_parts.settings.NEEDS", {"deepspeed": "no_such_module"})
    path = tmp_path / "figures.json"
    words = ["--models", "tiny", "--device", "cpu", "--only", "lsp,hf_lora,deepspeed", "--steps", "2", "--json"]
    assert main([*words, str(path)]) == 0
    machine, _, lsp, lora, deepspeed = capfd.readouterr().out.splitlines()
    assert machine.startswith("CPU, ")
    assert lsp.split()[:3] == ["tiny", "lsp", "d=16"]
    assert lora.split()[:2] == ["tiny", "hf_lora"]
    assert deepspeed.split() == ["tiny", "deepspeed", "left", "out:", "no_such_module", "is", "not", "installed"]
    ours, peer, missing = json.loads(path.read_text())["measurements"]
    for entry in (ours, peer):
        assert entry["tokens_per_s"] == pytest.approx(32 / entry["step_s"])
        assert entry["last_loss"] == pytest.approx(4.85, abs=0.3)  # of 128 words, about log 128
    assert 0 <= ours["exposed"] < 1
    assert "left_out" in missing


def test_nothing_is_begun_that_would_not_end_in_time(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "figures.json"
    assert main(["--models", "7b", "--device", "cpu", "--minutes", "0.2", "--only", "lsp", "--json", str(path)]) == 1
    assert capfd.readouterr().out.count("left out: needs about") == len(SIZES["7b"].dims)
    assert len(json.loads(path.read_text())["measurements"]) == len(SIZES["7b"].dims)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--models", "2b"], "models must be of tiny, 1b, 3b, 7b, got '2b'"),
        (["--only", "lsp,adam"], "only must be of"),
        (["--json", "/no/such/folder/x.json"], "json must be a file in a folder that is there"),
    ],
)
def test_a_wrong_option_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_what_tells_most_comes_first() -> None:
    titles = [f"{setting.size} {setting.title}" for setting in settings_of(["1b", "7b"], NAMES)]
    assert titles[:3] == ["1b lsp d=256", "1b lsp d=1024", "1b native"]
    assert titles.index("7b hf_lora") < titles.index("1b zero_offload")
    assert len(titles) == 2 * (len(NAMES) + 1)


@pytest.mark.usefixtures("cluster")
def test_lsp_on_rays_actors_trains_the_same_random_weights_as_on_threads(tmp_path: Path) -> None:
    size = SIZES["tiny"]
    folder = write_folder(tmp_path / "tiny", size)
    on_threads, on_ray = (setting for setting in settings_of(["tiny"], ["lsp", "native"], on_ray=True) if setting.dim)
    assert (on_threads.title, on_ray.title) == ("lsp d=16", "lsp d=16 ray")
    phases = [Phase(num_steps=2), Phase(num_steps=3)]
    threads, actors = (run_ours(setting, size, folder, CPU, phases) for setting in (on_threads, on_ray))
    assert actors.last_loss == threads.last_loss
    assert [len(times_s) for times_s in actors.step_s] == [2, 3]
    assert actors.exposed_s is not None
    assert actors.peak_bytes > 0


def fails() -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore lines")


def test_a_measurement_that_fails_or_hangs_is_told_on_one_line() -> None:
    found = apart(fails, timeout_s=60.0)
    assert isinstance(found, Failed)
    assert found.why == "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert "in fails" in found.trace
    assert apart(time.sleep, 600.0, timeout_s=0.5) == Failed(why="cut off after 0 s")


def test_forecasts_tell_what_does_not_fit(tmp_path: Path) -> None:
    model = _Model(folder=write_folder(tmp_path / "7b", SIZES["7b"]), hardware=load_hardware("h100-pcie"))
    lsp, native = (
        _forecast(setting, model)
        for setting in (Setting(size="7b", name="lsp", dim=1024), Setting(size="7b", name="native"))
    )
    assert lsp is not None
    assert not lsp.misfits
    assert native is not None
    assert native.misfits[0].where == "device"
    assert _forecast(Setting(size="7b", name="hf"), model) is None


def test_a_model_is_drawn_on_the_device_in_its_type(tmp_path: Path) -> None:
    size = SIZES["tiny"]
    model = random_model(write_folder(tmp_path / "tiny", size), torch.bfloat16, CPU)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.training
    assert sum(parameter.numel() for parameter in model.parameters()) < 100_000


def event(cat: str, name: str, dur: float, tid: int = 1) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "dur": dur, "tid": tid, "ts": 0.0}


def test_a_trace_tells_launches_device_time_and_waits_of_the_threads_that_launch() -> None:
    launches = [event("cuda_runtime", "cudaLaunchKernel", 5.0) for _ in range(19)]
    launches.append(event("cuda_driver", "cuLaunchKernelEx", 300.0))  # the queue was full
    others = [
        event("cuda_runtime", "cudaStreamSynchronize", 1000.0),
        event("cuda_runtime", "cudaEventSynchronize", 9000.0, tid=2),  # a thread that only waits
        event("cuda_runtime", "cudaMemcpyAsync", 20.0),
        event("kernel", "gemm", 400.0, tid=7),
        event("kernel", "add", 200.0, tid=7),
        event("gpu_memcpy", "Memcpy DtoH", 50.0, tid=8),
        {"ph": "M", "name": "process_name"},
    ]
    found = activity_of({"traceEvents": [*launches, *others]}, num_steps=2)
    assert (found.launches, found.syncs) == (10, 0.5)
    assert found.kernel_s == pytest.approx(300e-6)
    assert found.copy_s == pytest.approx(25e-6)
    assert found.waits_s == pytest.approx(650e-6)


def inner(number: int) -> int:
    return sum(range(number))


def test_python_functions_are_timed_without_their_callees() -> None:
    profile = FunctionProfile(1)
    profile.start()
    for _ in range(5):
        inner(20_000)
    profile.stop()
    line = next(line for line in profile.lines if " sum (C)" in line or line.endswith("sum (C)"))
    calls, own = next(line for line in profile.lines if line.endswith("inner")).split()[1::-1]
    assert float(calls) == 5.0
    assert float(own) < float(line.split()[0])


def test_operators_are_listed_by_their_own_time() -> None:
    profile, table = OperatorProfile(2), torch.ones(64, 64)
    profile.start()
    for _ in range(2):
        table @ table
    profile.stop()
    assert any(line.split()[1:] == ["1.0", "aten::mm"] for line in profile.lines)


def test_both_profiles_of_a_run_are_there(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "tiny", SIZES["tiny"])
    lines = profile_setting(Setting(size="tiny", name="native"), folder, "cpu")
    assert any("aten::mm" in line for line in lines)
    assert any("run_backward" in line for line in lines)
