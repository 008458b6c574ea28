from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import psutil
import pytest
import ray
import torch

from lsp_ray.config import PayloadDtype
from lsp_ray.errors import DeadlineError, NonFiniteLossError, StaleSlotError
from lsp_ray.optim.codec import Codec
from lsp_ray.optim.reproject import Reprojection
from lsp_ray.optim.shard import OptimizerShard
from lsp_ray.runtime.actors.ray_workers import RayWorkers
from lsp_ray.runtime.actors.shard_actor import ShardActor
from lsp_ray.runtime.drive.event_log import read_event_log
from lsp_ray.runtime.fine_tune import fine_tune
from lsp_ray.runtime.transport.slots import Slot, new_slot, new_slot_buffer
from lsp_ray.runtime.transport.unit_slots import new_undo, new_unit_slots
from lsp_ray.schedule.delta_room import DeltaRoom
from tests.killers import Killer
from tests.tiny_jobs import Recorder, run_job, run_on_threads, saved_weights, tiny_job

pytestmark = pytest.mark.usefixtures("cluster")

NUMEL = 1000


class Lane:
    """A unit's slots, an actor that owns them and a shard that shows what it ought to do.

    In `change` two matrices of the payload get new projectors.
    """

    change = tuple(
        Reprojection(
            first=first,
            left_GRR=torch.rand(2, 3, 3, generator=torch.Generator().manual_seed(first)).double(),
            right_HRR=torch.rand(4, 2, 2, generator=torch.Generator().manual_seed(first)).double(),
        )
        for first in (0, 100)
    )

    def __init__(self, payload_dtype: PayloadDtype) -> None:
        self.codec = Codec(payload_dtype)
        self.pair = new_unit_slots(4, NUMEL, self.codec)
        self.slots = self.pair.open()
        self.undo = new_undo([self.pair], is_shared=False)
        self.reference = OptimizerShard({4: NUMEL}, codec=self.codec)

    def actor(self) -> ShardActor:
        return ShardActor([self.pair], self.undo, 1, 0)

    def send(self, step: int) -> torch.Tensor:
        gradient = torch.randn(NUMEL, generator=torch.Generator().manual_seed(step))
        self.codec.encode_(self.slots.down[0].to_write(), gradient)
        self.slots.down[0].publish(step)
        return self.slots.down[0].payload.clone()

    def expected(self, step: int, grad_scale: float = 1.0, change: tuple[Reprojection, ...] = ()) -> torch.Tensor:
        delta = torch.empty_like(self.slots.up.payload)
        self.reference.carry_over(4, change)
        self.reference.update(4, self.slots.gradients(step), delta, learning_rate=1e-3, grad_scale=grad_scale)
        return delta

    def assert_same_state(self) -> None:
        ours = dict(zip(("exp_avg", "exp_avg_sq", "error"), self.pair.open_state().payload.split(NUMEL), strict=False))
        theirs = self.reference.states[4].tensors()
        assert self.pair.open_state().payload[-1] == theirs.pop("step")
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())

    def tear(self, step: int) -> None:
        """Leave what a death in the middle of an update leaves."""
        undo = self.pair.open_undo(self.undo[4])
        undo.to_write().copy_(self.pair.open_state().payload)
        undo.publish(step)
        self.pair.open_state().to_write().fill_(7.0)


def mapped(ref: ray.ObjectRef[Any]) -> Slot:
    return Slot(ray.get(ref), NUMEL, "test")


def test_a_shard_updates_from_slot_to_slot_step_after_step_without_new_objects() -> None:
    lane = Lane("bfloat16")
    shard: Any = ray.remote(ShardActor).options(num_cpus=1).remote([lane.pair], lane.undo, 1, 0)
    assert ray.get(shard.__ray_call__.remote(lambda actor: repr(actor))) == "shard-0"  # Ray's dashboard shows it
    for step in range(3):
        lane.send(step)
        ray.get(shard.update.remote(step, 4, 1e-3))
        assert torch.equal(lane.slots.up.to_read(step), lane.expected(step))
    ray.kill(shard)


@pytest.mark.parametrize("payload_dtype", get_args(PayloadDtype))
def test_an_actor_in_a_dead_ones_place_puts_torn_state_back_and_makes_no_update_twice(
    payload_dtype: PayloadDtype,
) -> None:
    lane = Lane(payload_dtype)
    lane.send(0)
    lane.actor().update(0, 4, 1e-3)
    lane.actor().update(0, 4, 1e-3)  # the first one died before it could answer
    assert torch.equal(lane.slots.up.to_read(0), lane.expected(0))
    lane.tear(1)
    lane.send(1)
    lane.actor().update(1, 4, 1e-3, lane.change)
    lane.actor().update(1, 4, 1e-3, lane.change)
    assert torch.equal(lane.slots.up.to_read(1), lane.expected(1, change=lane.change))
    lane.assert_same_state()


@pytest.mark.parametrize("dies", [False, True])
@pytest.mark.parametrize(("grad_scale", "payload_dtype"), [(0.25, "float32"), (0.25, "int8"), (0.0, "int8")])
def test_an_update_that_is_asked_for_again_with_scaled_gradients_takes_the_place_of_the_first(
    grad_scale: float, payload_dtype: PayloadDtype, dies: bool
) -> None:
    lane = Lane(payload_dtype)
    actor = lane.actor()
    for step in range(3):
        lane.send(step)
        change = lane.change if step == 1 else ()
        actor.update(step, 4, 1e-3, change)
        if dies:
            actor = lane.actor()
        scale = grad_scale if step == 1 else 0.5
        actor.update(step, 4, 1e-3, change, scale)
        assert torch.equal(lane.slots.up.to_read(step), lane.expected(step, scale, change))
    lane.assert_same_state()
    assert lane.reference.states[4].step == (3 if grad_scale else 2)


def test_a_new_slot_holds_no_payload_not_even_that_of_step_0() -> None:
    for slot in (mapped(ray.put(new_slot_buffer(4 * NUMEL))), new_slot(NUMEL, "test")):
        assert slot.generation is None
        with pytest.raises(StaleSlotError, match="slot test holds no payload, expected step 0"):
            slot.to_read(0)


def test_a_reader_of_another_step_is_refused_by_name() -> None:
    slot = mapped(ray.put(new_slot_buffer(4 * NUMEL)))
    slot.to_write()
    with pytest.raises(StaleSlotError, match="slot test holds no payload, expected step 3"):
        slot.to_read(3)
    slot.publish(2)
    with pytest.raises(StaleSlotError, match="slot test holds the payload of step 2, expected step 3"):
        slot.to_read(3)


def test_a_slots_payload_starts_on_a_page_of_its_own() -> None:
    slot = mapped(ray.put(new_slot_buffer(4 * NUMEL)))
    assert slot.payload.data_ptr() % 4096 == 0


def test_a_view_that_is_held_survives_pressure_on_the_store() -> None:
    slot = mapped(ray.put(new_slot_buffer(4 * NUMEL)))
    slot.to_write().fill_(7.0)
    slot.publish(0)
    objects = [ray.put(np.ones(32 << 20, dtype=np.uint8)) for _ in range(8)]  # more than the store holds
    assert len(objects) == 8
    assert torch.equal(slot.to_read(0), torch.full((NUMEL,), 7.0))


@pytest.mark.parametrize(
    ("method", "shards", "policy", "payload_dtype"),
    [
        ("lsp", 2, "layerwise", "float32"),
        ("zero_offload", 2, "sequential", "int8"),
        ("zero_offload", 1, "layerwise", "bfloat16"),
        ("native", 1, None, "bfloat16"),
    ],
)
def test_a_run_on_ray_gives_the_bits_of_the_same_run_on_threads(
    tmp_path: Path, method: str, shards: int, policy: str | None, payload_dtype: PayloadDtype
) -> None:
    runtime = {"num_shards": shards, "policy": policy, "payload_dtype": payload_dtype}
    job = tiny_job(tmp_path, method=method, runtime=runtime)
    on_threads, _ = run_on_threads(job, tmp_path / "threads")
    if (method, policy) == ("zero_offload", "layerwise"):  # beside its bits, room for deltas is what differs
        sizes = tuple(2 * size for size in job.payload_sizes)
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
    fresh, decisions = read_event_log(tmp_path / "ray" / "internals" / "events.jsonl")
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
