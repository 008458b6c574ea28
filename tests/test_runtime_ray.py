from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch

from lsp_ray.errors import DeadlineError, NonFiniteLossError, StaleSlotError, WorkerLostError
from lsp_ray.optim.shard import OptimizerShard
from lsp_ray.runtime.event_log import read_event_log
from lsp_ray.runtime.fine_tune import fine_tune
from lsp_ray.runtime.ray_workers import RayWorkers
from lsp_ray.runtime.shard_actor import ShardActor, SlotPair
from lsp_ray.runtime.slots import Slot, new_slot_buffer
from tests.tiny_jobs import Recorder, run_job, run_on_threads, saved_weights, tiny_job

pytestmark = pytest.mark.usefixtures("cluster")

NUMEL = 1000


def mapped(ref: ray.ObjectRef[Any]) -> Slot:
    return Slot(ray.get(ref), NUMEL, "test")


def test_a_shard_updates_from_slot_to_slot_step_after_step_without_new_objects() -> None:
    down_ref, up_ref = (ray.put(new_slot_buffer(NUMEL)) for _ in range(2))
    down, up = mapped(down_ref), mapped(up_ref)
    pair = SlotPair(unit=4, numel=NUMEL, down=down_ref, up=up_ref)
    shard: Any = ray.remote(ShardActor).options(num_cpus=1).remote([pair], 1)
    reference = OptimizerShard({4: NUMEL})
    for step in range(3):
        gradient = torch.randn(NUMEL, generator=torch.Generator().manual_seed(step))
        down.to_write().copy_(gradient)
        down.publish(step)
        report = ray.get(shard.update.remote(step, 4, 1e-3))
        expected = torch.empty(NUMEL)
        square_sum = reference.update(4, gradient, expected, learning_rate=1e-3)
        assert torch.equal(up.to_read(step), expected)
        assert report.grad_square_sum == float(square_sum)
    ray.kill(shard)


def test_a_reader_of_another_step_is_refused_by_name() -> None:
    slot = mapped(ray.put(new_slot_buffer(NUMEL)))
    slot.to_write()
    with pytest.raises(StaleSlotError, match="slot test holds no payload, expected step 3"):
        slot.to_read(3)
    slot.publish(2)
    with pytest.raises(StaleSlotError, match="slot test holds the payload of step 2, expected step 3"):
        slot.to_read(3)


def test_a_slots_payload_starts_on_a_page_of_its_own() -> None:
    slot = mapped(ray.put(new_slot_buffer(NUMEL)))
    assert slot.payload.data_ptr() % 4096 == 0


def test_a_view_that_is_held_survives_pressure_on_the_store() -> None:
    slot = mapped(ray.put(new_slot_buffer(NUMEL)))
    slot.to_write().fill_(7.0)
    slot.publish(0)
    objects = [ray.put(np.ones(32 << 20, dtype=np.uint8)) for _ in range(8)]  # more than the store holds
    assert len(objects) == 8
    assert torch.equal(slot.to_read(0), torch.full((NUMEL,), 7.0))


@pytest.mark.parametrize(
    ("method", "shards", "policy"), [("lsp", 2, "layerwise"), ("zero_offload", 1, "sequential"), ("native", 1, None)]
)
def test_a_run_on_ray_gives_the_bits_of_the_same_run_on_threads(
    tmp_path: Path, method: str, shards: int, policy: str | None
) -> None:
    job = tiny_job(tmp_path, method=method, runtime={"num_shards": shards, "policy": policy})
    on_threads, _ = run_on_threads(job, tmp_path / "threads")
    workers = RayWorkers(job)
    try:
        on_ray, listener = run_job(job, workers, tmp_path / "ray")
    finally:
        workers.close()
    theirs = saved_weights(job, tmp_path / "threads")
    for name, tensor in saved_weights(job, tmp_path / "ray").items():
        assert torch.equal(tensor, theirs[name]), name
    assert on_ray.eval_loss_after == on_threads.eval_loss_after
    assert len(listener.steps) == job.num_steps
    fresh, decisions = read_event_log(tmp_path / "ray" / "events.jsonl")
    assert all(fresh.handle(decision.event) == decision.actions for decision in decisions)


def _actor_process(name: str) -> psutil.Process:
    """The process of this suite's only live actor of a class; Ray writes the class into its command line."""
    found = [
        process
        for process in psutil.Process().children(recursive=True)
        if process.is_running() and f"ray::{name}" in " ".join(process.cmdline())
    ]
    assert len(found) == 1, found
    return found[0]


class Killer(Recorder):
    """Kills an actor's process after the second step."""

    signal = signal.SIGKILL

    def __init__(self, actor: str) -> None:
        super().__init__()
        self._actor = actor

    def step(self, metrics: object) -> None:
        self.steps.append(metrics)  # type: ignore[arg-type]
        if len(self.steps) == 2:
            os.kill(_actor_process(self._actor).pid, self.signal)


@pytest.mark.parametrize("actor", ["GpuActor", "ShardActor"])
def test_a_killed_actor_ends_the_run_with_one_line_that_says_what_was_waited_for(tmp_path: Path, actor: str) -> None:
    job = tiny_job(tmp_path, max_steps=500)
    workers = RayWorkers(job)
    (tmp_path / "out").mkdir()
    try:
        with pytest.raises(WorkerLostError, match=r"^an actor died \((gpu|shard 0): .+\): .+$") as caught:
            fine_tune(job, workers, tmp_path / "out", Killer(actor), str)
    finally:
        workers.close()
    assert "\n" not in str(caught.value)


def test_a_loss_that_is_not_finite_reaches_the_driver_as_what_it_is(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, learning_rate=1e30, lr_scheduler_type="constant")
    workers = RayWorkers(job)
    (tmp_path / "out").mkdir()
    try:
        with pytest.raises(NonFiniteLossError, match=r"^loss of step 1 is (nan|inf); learning_rate was 1e\+30 there$"):
            fine_tune(job, workers, tmp_path / "out", Recorder(), str)
    finally:
        workers.close()


def test_every_port_of_ray_is_on_the_loopback_interface_and_its_token_is_private() -> None:
    ours = {psutil.Process().pid, *(child.pid for child in psutil.Process().children(recursive=True))}
    listening = [
        connection.laddr[0]
        for connection in psutil.net_connections(kind="tcp")
        if connection.pid in ours and connection.status == psutil.CONN_LISTEN and connection.laddr
    ]
    assert listening
    assert set(listening) <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    assert Path(os.environ["RAY_AUTH_TOKEN_PATH"]).stat().st_mode & 0o777 == 0o600


class Freezer(Killer):
    """Stops an actor's process after the second step, without ending it."""

    signal = signal.SIGSTOP


def test_an_actor_that_hangs_ends_the_run_after_the_deadline_and_is_named(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, max_steps=500)
    workers = RayWorkers(job, completion_timeout_s=5.0)
    (tmp_path / "out").mkdir()
    try:
        with pytest.raises(DeadlineError, match=r"nothing happened for 5 s; waiting for .*shard 0: update of unit"):
            fine_tune(job, workers, tmp_path / "out", Freezer("ShardActor"), str)
    finally:
        workers.close()
