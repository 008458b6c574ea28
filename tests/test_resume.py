from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerState

from lsp_ray.config import GaloreConfig
from lsp_ray.errors import CheckpointError, ConfigError, StoppedError
from lsp_ray.runtime.checkpoints.checkpoint import Checkpoints, checkpoints
from lsp_ray.runtime.checkpoints.saved_run import check_same_run
from lsp_ray.runtime.prepare.job import resumed
from lsp_ray.runtime.training import NeverStop
from lsp_ray.trace import StepMetrics
from tests.tiny import Family
from tests.tiny_jobs import Recorder, run_on_threads, saved_weights, tiny_job

EVERY_STEP: dict[str, Any] = {"save_steps": 1, "save_total_limit": None, "eval_steps": 1}
REFITS: dict[str, Any] = {"check_every": 6, "max_bias": 0.0, "calibration_batches": 2}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_goes_on(tmp_path: Path, family: Family, steps: tuple[int, ...], **changes: Any) -> None:
    """An undisturbed run, one with a checkpoint and an evaluation after every step, and runs from some of these
    checkpoints all end with the same bits."""
    job = tiny_job(tmp_path, family, save_steps=0, **changes)
    run_on_threads(job, tmp_path / "whole")
    whole = saved_weights(job, tmp_path / "whole")
    first = tiny_job(tmp_path, family, **EVERY_STEP, **changes)
    run_on_threads(first, tmp_path / "saving")
    folders = [tmp_path / "saving"]
    eval_losses = [line["eval_loss"] for line in lines(tmp_path / "saving")]
    assert all(eval_losses[:-1])
    changes["runtime"] = {**changes.get("runtime", {}), "num_shards": 3}
    for step in steps:
        again = resumed(tiny_job(tmp_path, family, eval_steps=1, **changes), tmp_path / "saving" / f"checkpoint-{step}")
        _, listener = run_on_threads(again, tmp_path / f"from-{step}")
        assert [metrics.step for metrics in listener.steps] == list(range(step + 1, job.num_steps + 1))
        folders.append(tmp_path / f"from-{step}")
        assert [line["eval_loss"] for line in lines(folders[-1])][:-1] == eval_losses[:-1]
    for folder in folders:
        for name, tensor in saved_weights(job, folder).items():
            assert torch.equal(tensor, whole[name]), (folder.name, name)
        losses = [(line["step"], line["loss"], line["grad_norm"]) for line in lines(folder)]
        assert losses == [(line["step"], line["loss"], line["grad_norm"]) for line in lines(tmp_path / "whole")]


def test_a_run_goes_on_bit_for_bit_amid_lessons_fits_and_takeovers(tmp_path: Path) -> None:
    # matrices are sampled in step 6 and learn in 7 and 8, fits run after 8 and take over in 9, counted from 0
    changes: dict[str, Any] = {"gradient_accumulation_steps": 2, "bf16": True, "weight_decay": 0.1, "max_steps": 12}
    lsp = {**REFITS, "calibration_batches": 4}
    assert_goes_on(tmp_path, "llama", (7, 8, 9, 10), lsp=lsp, **changes)


@pytest.mark.parametrize("payload_dtype", ["bfloat16", "int8"])
def test_a_clipped_run_goes_on_bit_for_bit(tmp_path: Path, payload_dtype: str) -> None:
    runtime = {"payload_dtype": payload_dtype}
    assert_goes_on(tmp_path, "llama", (2,), max_grad_norm=1.8, max_steps=4, runtime=runtime)


@pytest.mark.parametrize(
    ("method", "payload_dtype"),
    [("lsp", "float32"), ("lsp", "int8"), ("zero_offload", "bfloat16"), ("zero_offload", "int8")],
)
def test_what_a_stale_policy_keeps_back_is_saved(tmp_path: Path, method: str, payload_dtype: str) -> None:
    changes = {"lsp": REFITS} if method == "lsp" else {}
    runtime = {"policy": "delayed", "payload_dtype": payload_dtype}
    assert_goes_on(tmp_path, "llama", (1, 9), method=method, max_steps=11, runtime=runtime, **changes)


@pytest.mark.parametrize("policy", ["layerwise", "delayed"])
def test_checkpoints_by_the_clock_change_no_bit_and_can_be_gone_on_from(tmp_path: Path, policy: str) -> None:
    changes: dict[str, Any] = {"save_steps": 0, "runtime": {"policy": policy}}
    job = tiny_job(tmp_path, **changes)
    for name, save_minutes in (("never", 0.0), ("often", 1e-9)):
        run_on_threads(tiny_job(tmp_path, save_minutes=save_minutes, save_total_limit=None, **changes), tmp_path / name)
    assert not checkpoints(tmp_path / "never")
    often = checkpoints(tmp_path / "often")
    assert min(often) < job.num_steps
    again = resumed(tiny_job(tmp_path, **changes), often[min(often)])
    run_on_threads(again, tmp_path / "again")
    whole = saved_weights(job, tmp_path / "never")
    for name in ("often", "again"):
        for weight, tensor in saved_weights(job, tmp_path / name).items():
            assert torch.equal(tensor, whole[weight]), (name, weight)


@pytest.mark.parametrize("method", ["zero_offload", "native", "lora", "galore"])
def test_the_baselines_go_on_bit_for_bit(tmp_path: Path, method: str) -> None:
    galore = GaloreConfig(rank=8, update_proj_gap=2)
    assert_goes_on(tmp_path, "gpt2", (3,), method=method, bf16=True, galore=galore)


def test_a_classifier_goes_on_with_its_own_head_from_its_last_step_too(tmp_path: Path) -> None:
    assert_goes_on(tmp_path, "bert", (2, 4), max_steps=4)


def cut(content: bytes) -> bytes:
    """Half of the last line is not on the disk."""
    return content[: -len(content.splitlines()[-1]) // 2]


@pytest.mark.parametrize(
    ("damage", "num_kept"),
    [
        (cut, 1),
        (lambda content: content.replace(b"\n", b"\n\0\0\0\0", 1), 1),  # as some file systems leave it
        (lambda content: content.replace(b'"loss": ', b'"loss": "', 1), 0),
        (lambda content: content.replace(b'"step": 2', b'"step": "2"', 1), 1),
        (lambda _content: b"", 0),
        (lambda _content: b"[" * 100_000, 0),
        (None, 0),
    ],
)
def test_a_run_whose_metrics_are_damaged_goes_on_with_those_that_are_whole(
    two_steps: Path, tmp_path: Path, damage: Callable[[bytes], bytes] | None, num_kept: int
) -> None:
    run = shutil.copytree(two_steps, tmp_path / "run")
    content = (run / "metrics.jsonl").read_bytes()
    if damage is None:
        (run / "metrics.jsonl").unlink()
    else:
        (run / "metrics.jsonl").write_bytes(damage(content))
    job = tiny_job(two_steps.parent, max_steps=2)
    if num_kept == 0:
        with pytest.raises(ConfigError, match=r"^resume_from_checkpoint must have its run's metrics\.jsonl beside it"):
            resumed(job, run / "checkpoint-2")
    else:
        summary, _ = run_on_threads(resumed(job, run / "checkpoint-2"), tmp_path / "finished")
        assert summary.step_time_s_median > 0
    if damage in (cut, None):
        run_on_threads(resumed(job, run / "checkpoint-1"), run)
        assert [line["step"] for line in lines(run)] == [1, 2][-1 - num_kept :]


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    run_on_threads(tiny_job(folder, max_steps=2, **EVERY_STEP), folder / "run")
    return folder / "run"


class StopAfter(NeverStop):
    """Asks to stop once so many steps are done."""

    def __init__(self, listener: Recorder, num_steps: int) -> None:
        self._listener, self._num_steps = listener, num_steps

    def requested(self) -> bool:
        return len(self._listener.steps) >= self._num_steps


def stopped_run(tmp_path: Path, num_steps: int = 2, **changes: Any) -> Path:
    """Stop a run after some steps; returns its folder."""
    job = tiny_job(tmp_path, **changes)
    listener = Recorder()
    with pytest.raises(
        StoppedError, match=r"^after \d+ of \d+ steps; the last checkpoint is .*checkpoint-\d+; to go on"
    ):
        run_on_threads(job, tmp_path / "stopped", listener, StopAfter(listener, num_steps))
    return tmp_path / "stopped"


def test_a_run_that_is_stopped_has_saved_every_step_it_made_and_goes_on_in_its_folder(tmp_path: Path) -> None:
    whole = tiny_job(tmp_path, max_steps=8)
    run_on_threads(whole, tmp_path / "whole")
    folder = stopped_run(tmp_path, max_steps=8)
    [(done, saved)] = checkpoints(folder).items()
    assert 2 <= done == len(lines(folder)) < 8
    run_on_threads(resumed(whole, saved), folder)
    ours, theirs = (saved_weights(whole, tmp_path / name) for name in ("stopped", "whole"))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert [line["loss"] for line in lines(folder)] == [line["loss"] for line in lines(tmp_path / "whole")]


def test_a_checkpoint_is_one_of_hugging_faces_and_holds_no_pickle(tmp_path: Path) -> None:
    folder = next(iter(checkpoints(stopped_run(tmp_path)).values()))
    state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
    assert f"checkpoint-{state.global_step}" == folder.name
    assert [entry["step"] for entry in state.log_history] == list(range(1, state.global_step + 1))
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "lsp_state/moments-0.safetensors"} <= files
    assert {Path(name).suffix for name in files} <= {".safetensors", ".json", ".jinja"}
    assert len({(folder / name).stat().st_mode for name in files}) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 7}, r"seed must be 42 as it was at checkpoint-\d, got 7"),
        ({"learning_rate": 0.5}, r"learning_rate must be 0\.003 as it was at checkpoint-\d, got 0\.5"),
        ({"lsp": {"subspace_dim": 8}}, r"lsp\.subspace_dim must be 16 as it was at checkpoint-\d, got 8"),
        ({"method": "native"}, r"method must be 'lsp' as it was at checkpoint-\d, got 'native'"),
        ({"per_device_train_batch_size": 2}, r"per_device_train_batch_size must be 4 as it was .*, got 2"),
        (
            {"runtime": {"payload_dtype": "int8"}},
            r"runtime\.payload_dtype must be 'bfloat16' as it was at checkpoint-\d, got 'int8'",
        ),
        ({"torch_compile": True}, r"torch_compile must be False as it was at checkpoint-\d, got True"),
        ({"runtime": {"policy": "delayed"}}, r"runtime\.policy must be other than delayed as it was .*, got 'delayed'"),
    ],
)
def test_what_would_change_the_result_is_refused_by_name(
    stopped: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^{message}$"):
        resumed(tiny_job(stopped.parent, **changes), newest(stopped))


def test_graphs_which_pad_batches_on_a_gpu_are_free_on_a_cpu_alone(stopped: Path) -> None:
    job = tiny_job(stopped.parent, runtime={"cuda_graphs": False})
    saved = resumed(job, newest(stopped)).saved
    assert saved is not None
    with pytest.raises(ConfigError, match=r"^runtime\.cuda_graphs must be True as it was at checkpoint-\d, got False$"):
        check_same_run(
            replace(saved, device="cuda"), asdict(job.resolved_config), device="cuda", staleness=0, digest="any"
        )


def test_other_data_under_the_same_name_is_refused(tmp_path: Path) -> None:
    folder = stopped_run(tmp_path)
    data = tmp_path / "llama.jsonl"
    data.write_text("".join(reversed(data.read_text().splitlines(keepends=True))))
    with pytest.raises(ConfigError, match=r"^dataset must have the content that it had at checkpoint-\d, got '.*'$"):
        resumed(tiny_job(tmp_path), newest(folder))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stopped_run(tmp_path_factory.mktemp("stopped"))


def newest(folder: Path) -> Path:
    return list(checkpoints(folder).values())[-1]


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    run_on_threads(tiny_job(tmp_path, save_steps=1, save_total_limit=2), tmp_path / "out")
    assert list(checkpoints(tmp_path / "out")) == [5, 6]
    assert not list((tmp_path / "out").glob(".checkpoint*"))


def test_a_full_disk_ends_the_run_with_one_line_and_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, save_steps=2)

    class Filler(Recorder):
        """Lets no file grow past a few kilobytes once the third step is done: a real limit of the system's."""

        def step(self, metrics: StepMetrics) -> None:
            super().step(metrics)
            if metrics.step == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

    try:
        with pytest.raises(CheckpointError, match=r"^checkpoint-4 could not be written to .*out \(.*[Ff]ile too large"):
            run_on_threads(job, tmp_path / "out", Filler())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert [path.name for path in (tmp_path / "out").glob("*checkpoint*")] == ["checkpoint-2"]
    assert resumed(job, tmp_path / "out" / "checkpoint-2").first_step == 2


def test_what_a_crash_left_half_written_is_no_checkpoint_and_is_cleared_away(tmp_path: Path) -> None:
    folder = stopped_run(tmp_path)
    shutil.copytree(newest(folder), folder / ".checkpoint-9.saving")
    shutil.copytree(newest(folder), folder / "checkpoint-9")
    (folder / "checkpoint-9" / "lsp_state" / "state.json").unlink()
    assert 9 not in checkpoints(folder)
    Checkpoints(folder, keep=2).__exit__(None)
    assert not (folder / ".checkpoint-9.saving").exists()
