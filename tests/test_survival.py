from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from lsp_ray.errors import WorkerLostError
from lsp_ray.runtime.actors.ray_workers import RayWorkers
from lsp_ray.runtime.persistence import ClosableWorkers, fine_tune_persistently
from lsp_ray.runtime.prepare.job import Job
from lsp_ray.runtime.training import NeverStop
from tests.killers import Killer, actor_processes
from tests.tiny_jobs import run_on_threads, saved_weights, tiny_job

pytestmark = pytest.mark.usefixtures("cluster")

REFITS: dict[str, Any] = {"check_every": 6, "max_bias": 0.0, "calibration_batches": 2}


def assert_like_undisturbed(job: Job, tmp_path: Path, killer: Killer) -> None:
    """A run whose actors are killed ends with the losses and weights of the same run on threads."""
    run_on_threads(job, tmp_path / "undisturbed")
    out = tmp_path / "killed"
    out.mkdir()
    fine_tune_persistently(job, partial(RayWorkers, note=killer.note), out, killer, str, NeverStop())
    assert killer.killed
    theirs = saved_weights(job, tmp_path / "undisturbed")
    for name, tensor in saved_weights(job, out).items():
        assert torch.equal(tensor, theirs[name]), name
    ours, undisturbed = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (out, tmp_path / "undisturbed")
    )
    assert [(line["step"], line["loss"]) for line in ours] == [(line["step"], line["loss"]) for line in undisturbed]


# updates are made once; some of them twice
@pytest.mark.parametrize(
    ("max_grad_norm", "payload_dtype", "delta"), [(0.0, "bfloat16", "apart"), (1.8, "int8", "merged")]
)
def test_killed_shards_are_replaced_and_the_run_goes_on_to_the_same_bits(
    tmp_path: Path, max_grad_norm: float, payload_dtype: str, delta: str
) -> None:
    runtime = {"num_shards": 2, "payload_dtype": payload_dtype}
    lsp = {**REFITS, "delta": delta}
    if delta == "apart":  # what it begins with is the shards' as well
        run_on_threads(tiny_job(tmp_path, max_steps=6, bf16=True, lsp=lsp, runtime=runtime), tmp_path / "before")
        lsp["init_from"] = str(tmp_path / "before")
    job = tiny_job(tmp_path, max_steps=60, bf16=True, lsp=lsp, max_grad_norm=max_grad_norm, runtime=runtime)
    killer = Killer(dict.fromkeys((2, 9, 16, 21), "ShardActor"))
    assert_like_undisturbed(job, tmp_path, killer)
    assert killer.killed == ["ShardActor"] * 4
    assert len([note for note in killer.notes if "another one takes its place" in note]) == 4
    assert len(killer.steps) == 60  # no step was made twice
    assert any(step.grad_scale < 1.0 for step in killer.steps) == (max_grad_norm > 0)


def test_a_killed_gpu_actor_starts_again_from_the_last_checkpoint(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, max_steps=50, save_steps=4, lsp={**REFITS, "delta": "apart"})
    killer = Killer({10: "GpuActor"})
    assert_like_undisturbed(job, tmp_path, killer)
    [note] = [note for note in killer.notes if note.startswith("going on from")]
    assert "/checkpoint-" in note


def test_a_killed_gpu_actor_without_a_checkpoint_starts_from_the_beginning(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, max_steps=100, method="native", save_steps=0)
    killer = Killer({3: "GpuActor"})
    assert_like_undisturbed(job, tmp_path, killer)
    assert any("starting again from the beginning, as there is no checkpoint" in note for note in killer.notes)
    assert killer.steps[0].step == 1
    assert len(killer.steps) > 100


class Stillborn(RayWorkers):
    """Workers whose GPU actor is killed in set-up, whatever is tried."""

    def setup(self, *_args: Any) -> Any:
        ray.get(self._gpus._actors[0].progress.remote())  # it is there by now
        for process in actor_processes("GpuActor"):
            process.kill()
        return super().setup(lambda _line: None)


def test_three_losses_without_progress_end_the_run_with_cause_and_way_on(tmp_path: Path) -> None:
    started: list[ClosableWorkers] = []

    def new_workers(job: Job) -> ClosableWorkers:
        started.append(Stillborn(job) if started else RayWorkers(job))
        return started[-1]

    job = tiny_job(tmp_path, max_steps=500, save_steps=2)
    (tmp_path / "out").mkdir()
    with pytest.raises(
        WorkerLostError,
        match=r"^the GpuActor of process \d+ died \(gpu: .*\): its process was killed, as Linux does where memory "
        r"is full \(dmesg tells\), or crashed, 3 times in a row; the last checkpoint is .*checkpoint-\d+; to go on: "
        r"python -m lsp_ray\.run --config .*config\.yaml --output_dir .*out --resume_from_checkpoint last$",
    ):
        fine_tune_persistently(job, new_workers, tmp_path / "out", Killer({5: "GpuActor"}), str, NeverStop())
    assert len(started) == 3
