from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch

from lsp_ray.errors import DeadlineError, NonFiniteLossError, StaleSlotError
from lsp_ray.optim.shard import OptimizerShard
from lsp_ray.runtime.event_log import read_event_log
from lsp_ray.runtime.fine_tune import fine_tune
from lsp_ray.runtime.ray_workers import RayWorkers
from lsp_ray.runtime.shard_actor import ShardActor, SlotPair
from lsp_ray.runtime.slots import Slot, new_slot_buffer
from lsp_ray.schedule.delta_room import DeltaRoom
from lsp_ray.sim.store import state_numel
from tests.killers import Killer
from tests.tiny_jobs import Recorder, run_job, run_on_threads, saved_weights, tiny_job

pytestmark = pytest.mark.usefixtures("cluster")

NUMEL = 1000


def mapped(ref: ray.ObjectRef[Any]) -> Slot:
    return Slot(ray.get(ref), NUMEL, "test")


def new_pair() -> SlotPair:
    down, up, state = (ray.put(new_slot_buffer(numel)) for numel in (NUMEL, NUMEL, state_numel(NUMEL)))
    return SlotPair(unit=4, numel=NUMEL, down=down, up=up, state=state)


def keep(pair: SlotPair, undo: ray.ObjectRef[Any], step: int) -> None:
    """What an actor does before an update."""
    slot = Slot(ray.get(undo), state_numel(NUMEL), "undo")
    slot.to_write().copy_(pair.open_state().payload)
    slot.publish(step)


def test_a_shard_updates_from_slot_to_slot_step_after_step_without_new_objects() -> None:
    pair = new_pair()
    down, up = mapped(pair.down), mapped(pair.up)
    undo = ray.put(new_slot_buffer(state_numel(NUMEL)))
    shard: Any = ray.remote(ShardActor).options(num_cpus=1).remote([pair], {4: undo}, 1, 0)
    assert ray.get(shard.__ray_call__.remote(lambda actor: repr(actor))) == "shard-0"  # Ray's dashboard shows it
    reference = OptimizerShard({4: NUMEL})
    for step in range(3):
        gradient = torch.randn(NUMEL, generator=torch.Generator().manual_seed(step))
        down.to_write().copy_(gradient)
        down.publish(step)
        ray.get(shard.update.remote(step, 4, 1e-3))
        expected = torch.empty(NUMEL)
        reference.update(4, gradient, expected, learning_rate=1e-3)
        assert torch.equal(up.to_read(step), expected)
    ray.kill(shard)


def test_an_actor_in_a_dead_ones_place_puts_torn_state_back_and_makes_no_update_twice() -> None:
    pair, undo = new_pair(), ray.put(new_slot_buffer(state_numel(NUMEL)))
    down, up = mapped(pair.down), mapped(pair.up)
    reference, expected = OptimizerShard({4: NUMEL}), torch.empty(NUMEL)

    def send(step: int, gradient: torch.Tensor) -> None:
        down.to_write().copy_(gradient)
        down.publish(step)

    send(0, torch.ones(NUMEL))
    first = ShardActor([pair], {4: undo}, 1, 0)
    first.update(0, 4, 1e-3)
    second = ShardActor([pair], {4: undo}, 1, 0)  # the first one died before it could answer
    second.update(0, 4, 1e-3)
    reference.update(4, torch.ones(NUMEL), expected, learning_rate=1e-3)
    assert torch.equal(up.to_read(0), expected)
    keep(pair, undo, 1)
    pair.open_state().to_write().fill_(7.0)  # what a death in the middle of an update leaves
    send(1, torch.full((NUMEL,), 2.0))
    ShardActor([pair], {4: undo}, 1, 0).update(1, 4, 1e-3)
    reference.update(4, torch.full((NUMEL,), 2.0), expected, learning_rate=1e-3)
    assert torch.equal(up.to_read(1), expected)


@pytest.mark.parametrize("dies", [False, True])
@pytest.mark.parametrize("grad_scale", [0.25, 0.0])
def test_an_update_that_is_asked_for_again_with_scaled_gradients_takes_the_place_of_the_first(
    grad_scale: float, dies: bool
) -> None:
    pair, undo = new_pair(), ray.put(new_slot_buffer(state_numel(NUMEL)))
    down, up = mapped(pair.down), mapped(pair.up)
    actor, reference, expected = ShardActor([pair], {4: undo}, 1, 0), OptimizerShard({4: NUMEL}), torch.empty(NUMEL)
    for step in range(3):
        gradient = torch.randn(NUMEL, generator=torch.Generator().manual_seed(step))
        down.to_write().copy_(gradient)
        down.publish(step)
        actor.update(step, 4, 1e-3)
        if dies:
            actor = ShardActor([pair], {4: undo}, 1, 0)
        scale = grad_scale if step == 1 else 0.5
        actor.update(step, 4, 1e-3, (), scale)
        reference.update(4, gradient, expected, learning_rate=1e-3, grad_scale=scale)
        assert torch.equal(up.to_read(step), expected)
    assert torch.equal(pair.open_state().payload[:NUMEL], reference.states[4].exp_avg)
    assert pair.open_state().payload[-1] == reference.states[4].step == (3 if grad_scale else 2)


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
    ("method", "shards", "policy"),
    [("lsp", 2, "layerwise"), ("zero_offload", 1, "sequential"), ("zero_offload", 1, "layerwise"), ("native", 1, None)],
)
def test_a_run_on_ray_gives_the_bits_of_the_same_run_on_threads(
    tmp_path: Path, method: str, shards: int, policy: str | None
) -> None:
    job = tiny_job(tmp_path, method=method, runtime={"num_shards": shards, "policy": policy})
    on_threads, _ = run_on_threads(job, tmp_path / "threads")
    if (method, policy) == ("zero_offload", "layerwise"):  # beside its bits, room for deltas is what differs
        sizes = tuple(4 * size for size in job.payload_sizes)
        job = replace(job, delta_room=DeltaRoom(sizes=sizes, num_bytes=2 * max(sizes)))
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
            fine_tune(job, workers, tmp_path / "out", Freezer({2: "ShardActor"}), str)
    finally:
        workers.close()
