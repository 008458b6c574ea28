"""Parts of a step on several GPU actors: the bits of one that computes them in turn."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from lsp_ray.config import RunConfig, RuntimeConfig
from lsp_ray.errors import ConfigError, DivergedError
from lsp_ray.runtime.actors.ray_workers import RayWorkers
from lsp_ray.runtime.persistence import fine_tune_persistently
from lsp_ray.runtime.prepare.job import Job, resumed
from lsp_ray.runtime.training import NeverStop
from lsp_ray.schedule.delta_room import DeltaRoom
from lsp_ray.trace import StepMetrics
from tests.astray import Astray, SlowFirst, WithoutBase
from tests.killers import Killer
from tests.tiny_jobs import Recorder, assert_same_bits, deepen, run_job, run_on_threads, saved_weights, tiny_job

pytestmark = pytest.mark.usefixtures("cluster")

ADAPTER = Path("adapter") / "adapter_model.safetensors"
REFITS: dict[str, Any] = {"check_every": 6, "max_bias": 0.0, "calibration_batches": 2}


def job_on(num_gpus: int, folder: Path, **changes: Any) -> Job:
    runtime = {"num_gpus": num_gpus, **changes.pop("runtime", {})}
    return tiny_job(folder, **{"num_replicas": 3, "bf16": True, **changes}, runtime=runtime)


def run_on_ray(job: Job, out: Path, kind: type[RayWorkers] = RayWorkers) -> Recorder:
    workers = kind(job)
    try:
        return run_job(job, workers, out)[1]
    finally:
        workers.close()


class UnlikeWorkers(RayWorkers):
    gpu_actor = SlowFirst


UNLIKE = "parts of a step that each GPU computes, by its pace: gpu-0 1, gpu-1 2"


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        (
            {"lsp": {**REFITS, "delta": "apart"}, "max_steps": 10, "max_grad_norm": 1.8, "runtime": {"num_shards": 2}},
            RayWorkers,
        ),
        ({"lsp": REFITS, "max_steps": 10, "runtime": {"policy": "delayed", "payload_dtype": "int8"}}, UnlikeWorkers),
    ],
    ids=["apart, refits, clipped", "delayed, refits, int8, one slower"],
)
def test_two_gpus_train_to_the_bits_of_one(tmp_path: Path, changes: dict[str, Any], kind: type[RayWorkers]) -> None:
    alone, together = job_on(1, tmp_path, **changes), job_on(2, tmp_path, **changes)
    assert together.layout.gpu_of_part == (0, 0, 1)
    _, expected = run_on_threads(alone, tmp_path / "alone")
    found = run_on_ray(together, tmp_path / "together", kind)
    assert kind is RayWorkers or UNLIKE in found.notes
    assert [step.loss for step in found.steps] == [step.loss for step in expected.steps]
    assert [step.grad_norm for step in found.steps] == [step.grad_norm for step in expected.steps]
    assert any(step.num_refitted for step in found.steps)
    assert [step.bytes_h2d for step in found.steps] == [2 * step.bytes_h2d for step in expected.steps]
    assert_same_bits(saved_weights(together, tmp_path / "together"), saved_weights(alone, tmp_path / "alone"))


class WithoutCheckpoint(Killer):
    """A killer that first takes away the checkpoint that the run went on from, as a run does with old ones."""

    def __init__(self, checkpoint: Path, actor_after: dict[int, str]) -> None:
        super().__init__(actor_after)
        self._checkpoint = checkpoint

    def step(self, metrics: StepMetrics) -> None:
        shutil.rmtree(self._checkpoint, ignore_errors=True)
        super().step(metrics)


def test_a_checkpoint_of_one_gpu_goes_on_on_two_and_one_that_is_lost_does_not_need_it(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"max_steps": 30, "save_steps": 4, "save_total_limit": None, "max_grad_norm": 1.8}
    alone, together = job_on(1, tmp_path, **changes), job_on(2, tmp_path, **changes)
    run_on_threads(alone, tmp_path / "alone")
    out, checkpoint = tmp_path / "together", tmp_path / "alone" / "checkpoint-4"
    out.mkdir()
    killer = WithoutCheckpoint(checkpoint, {13: "GpuActor"})
    job = resumed(together, checkpoint)
    fine_tune_persistently(job, partial(RayWorkers, note=killer.note), out, killer, str, NeverStop())
    assert killer.killed == ["GpuActor"]
    assert any("no step is lost" in note for note in killer.notes)
    assert_same_bits(saved_weights(together, out), saved_weights(alone, tmp_path / "alone"))


class WithoutBaseWorkers(RayWorkers):
    gpu_actor = WithoutBase


def test_lost_gpus_are_replaced_and_no_step_is_lost(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"max_steps": 30, "save_steps": 0, "load_in_4bit": True}
    deepen(tmp_path, "llama", 5)
    alone, together = (
        job_on(num_gpus, tmp_path, runtime={"policy": "sequential", "weights": home, "activations": home}, **changes)
        for num_gpus, home in ((1, "device"), (2, "host"))
    )
    _, expected = run_on_threads(alone, tmp_path / "alone")
    killer = Killer(dict.fromkeys((2, 9, 15), "WithoutBase"))
    (tmp_path / "killed").mkdir()
    workers = partial(WithoutBaseWorkers, note=killer.note)
    fine_tune_persistently(together, workers, tmp_path / "killed", killer, str, NeverStop())
    assert killer.killed == ["WithoutBase"] * 3
    assert len([note for note in killer.notes if "no step is lost" in note]) == 3
    assert [step.loss for step in killer.steps] == [step.loss for step in expected.steps]
    assert_same_bits(*(load_file(tmp_path / name / ADAPTER) for name in ("killed", "alone")))


class AstrayWorkers(RayWorkers):
    gpu_actor = Astray


def test_gpus_that_no_longer_agree_end_the_run_at_the_next_checkpoint(tmp_path: Path) -> None:
    job = job_on(2, tmp_path, num_replicas=2, save_steps=3, max_steps=6)
    wires = tuple(job.codec.wire_numel(numel) for numel in job.payload_sizes)
    # bounded, all drain before the pause, and owe an answer to that besides
    job = replace(job, delta_room=DeltaRoom(sizes=wires, num_bytes=2 * max(wires)))
    workers = AstrayWorkers(job)
    try:
        with pytest.raises(DivergedError, match="the weights of gpu-1 are not those of gpu-0"):
            run_job(job, workers, tmp_path / "out")
    finally:
        workers.close()
    assert not list((tmp_path / "out").glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "lora"}, "runtime.num_gpus must be 1 with method lora"),
        ({"num_replicas": 1}, r"runtime.num_gpus must be at most num_replicas \(1\)"),
    ],
)
def test_what_several_gpus_are_refused_for(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(RunConfig(runtime=RuntimeConfig(num_gpus=2)), **changes)
