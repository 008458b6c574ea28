"""Orders to an actor of Ray's over sockets: answers in order, errors as what they are, and no wait for the dead."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray
import torch

from lsp_ray.errors import ConfigError, DeadlineError, GpuLostError, OutOfDeviceMemoryError, WorkerLostError
from lsp_ray.runtime.actors.ray_workers import RayWorkers
from lsp_ray.runtime.drive.ledger import OpReport
from lsp_ray.runtime.transport.lanes import D2H, Failure, Lane, Order, Watch, bounded, connect, open_lanes, serve
from lsp_ray.runtime.transport.messages import tell
from lsp_ray.schedule.ops import GradientReady
from lsp_ray.trace import Span, WorkStream

pytestmark = pytest.mark.usefixtures("cluster")


class Unsendable(Exception):
    def __init__(self) -> None:
        super().__init__("has a lambda")
        self.held = lambda: None


class Servant:
    """Does as it is told."""

    def serve(self, address: str) -> None:
        serve(connect(address, "lane"), self)

    def doubled(self, tensor: torch.Tensor) -> torch.Tensor:
        return 2 * tensor

    def fail(self, how: str) -> None:
        if how == "ours":
            raise ConfigError("seed", "be at least 0", -1, hint="no")
        if how == "another's loss":
            raise WorkerLostError("what passes payloads on is lost")
        if how == "torch's":
            raise torch.OutOfMemoryError("CUDA out of memory")
        if how == "unsendable":
            raise Unsendable
        raise KeyError("gone")

    def end(self) -> None:
        os._exit(1)

    def fork(self) -> int:
        """A child that holds everything open, as a compiler's helper process does."""
        child = os.fork()
        if child == 0:
            signal.pause()
        return child


class Unwilling:
    """Dies as it is asked to serve, or while it introduces itself."""

    def __init__(self, connects: bool) -> None:
        self._connects = connects

    def serve(self, address: str) -> None:
        if self._connects:
            socket.socket(socket.AF_UNIX).connect(address)
        os._exit(1)


@pytest.fixture(scope="module", autouse=True)
def _sent_whole() -> Iterator[None]:
    """An actor's process does not find this module by its name."""
    module = sys.modules[__name__]
    ray.cloudpickle.register_pickle_by_value(module)  # type: ignore[no-untyped-call]
    yield
    ray.cloudpickle.unregister_pickle_by_value(module)  # type: ignore[no-untyped-call]


@pytest.fixture
def lane() -> Iterator[Lane]:
    actor: Any = ray.remote(Servant).options(num_cpus=1).remote()
    yield open_lanes(actor, "servant", ["lane"])["lane"]
    ray.kill(actor)


def test_answers_come_in_order_and_errors_as_what_they_are(lane: Lane) -> None:
    for number in range(3):
        lane.order(Order(what=f"order {number}", method="doubled", args=(torch.full((2,), number),)))
    assert lane.owes() == ["servant: order 0", "servant: order 1", "servant: order 2"]
    assert torch.equal(lane.answer(), torch.zeros(2))
    assert torch.equal(lane.call("order 3", "doubled", torch.tensor([3])), torch.tensor([6]))  # 1 and 2 are let go
    assert not lane.owed
    with pytest.raises(ConfigError, match=r"^seed must be at least 0, got -1; no$"):
        lane.call("failing", "fail", "ours")
    with pytest.raises(OutOfDeviceMemoryError, match=r"^the device's memory is full \(servant: step 3\); a smaller "):
        lane.call("step 3", "fail", "torch's")
    with pytest.raises(RuntimeError, match=r"^Unsendable: has a lambda"):
        lane.call("failing", "fail", "unsendable")
    with pytest.raises(KeyError, match="gone") as caught:
        lane.call("failing", "fail", "another's")
    assert "servant: failing, in another process" in caught.value.__notes__[0]
    assert "in fail" in caught.value.__notes__[0]
    assert lane.call("order 4", "doubled", torch.tensor([4])) == 8


def test_an_order_that_failed_as_another_actor_was_lost_is_still_owed(lane: Lane) -> None:
    lane.order(Order(what="update", method="fail", args=("another's loss",)))
    with pytest.raises(WorkerLostError, match=r"^what passes payloads on is lost$"):
        lane.answer()
    assert lane.owes() == ["servant: update"], "who comes in its place is asked again"


def test_a_loss_that_is_told_beside_what_came_is_not_forgotten() -> None:
    nobody: Any = None
    pairs = [socket.socketpair() for _ in range(2)]
    lanes = [
        Lane(bounded(ours, 1.0), f"gpu {gpu}", psutil.Process(), nobody, D2H, os.getpid())
        for gpu, (ours, _) in enumerate(pairs)
    ]
    span = Span(stream=WorkStream.D2H, step=0, layer=0, start_s=0.0, end_s=1.0, part=1)
    lost = Failure(error=WorkerLostError("what passes payloads on is lost"), trace="")
    for lane, (_, theirs), told in zip(lanes, pairs, (OpReport(span=span), lost), strict=True):
        lane.order(Order(what="send", method="send", args=()))
        tell(bounded(theirs, 1.0), told)
    workers = RayWorkers.__new__(RayWorkers)
    gpus: Any = SimpleNamespace(gpu_of=lanes.index)
    job: Any = SimpleNamespace(layout=SimpleNamespace(num_gpus=2))
    workers._untold, workers._completion_timeout_s, workers._watch = None, 1.0, Watch()
    workers._gpus, workers._job = gpus, job
    workers._watch.turn_to(lanes)
    assert [completion.span.part for completion in workers.next_completions()] == [1]  # type: ignore[union-attr]
    with pytest.raises(GpuLostError, match=r"^what passes payloads on is lost$") as caught:
        workers.next_completions()
    assert caught.value.gpu == 1
    workers._watch.close()


def test_answers_that_came_before_a_death_are_heard_and_then_the_death(lane: Lane) -> None:
    for number in (1, 2):
        lane.order(Order(what="doubling {0}", method="doubled", args=(number,)))
    lane.order(Order(what="the end", method="end", args=()))
    assert lane.process is not None
    lane.process.wait(30.0)
    watch = Watch()
    watch.turn_to([lane])
    assert watch.wait(1.0) == [lane]
    assert lane.answer() == 2
    assert lane.holds_more  # both have come with one read
    assert lane.has_message()
    assert lane.answer() == 4
    assert not lane.holds_more
    assert watch.wait(1.0) == [lane]
    with pytest.raises(WorkerLostError, match=r"^the Servant of process \d+ died \(servant: the end\)"):
        lane.answer()
    assert not lane.holds_more
    watch.close()


def test_a_wait_for_a_dead_actor_ends_even_where_its_child_holds_the_socket(lane: Lane) -> None:
    child = lane.call("forking", "fork")
    assert lane.process is not None
    lane.process.kill()
    try:
        with pytest.raises(WorkerLostError, match=r"^servant died \(servant: update of 1\)$"):
            lane.call("update of {0}", "doubled", 1)
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("connects", [False, True])
def test_an_actor_that_dies_before_it_serves_is_told_of(connects: bool) -> None:
    actor = ray.remote(Unwilling).options(num_cpus=1).remote(connects)
    with pytest.raises(WorkerLostError, match=r"^the Unwilling of process \d+ died \(unwilling: start\)"):
        open_lanes(actor, "unwilling", ["lane"])


def test_an_order_that_nobody_takes_ends_in_time() -> None:
    ours, theirs = socket.socketpair()
    nobody: Any = None
    lane = Lane(bounded(ours, 1.0), "hanging", psutil.Process(), nobody, "lane", os.getpid())
    with theirs, pytest.raises(DeadlineError, match=r"^an order was not taken in time \(hanging: large\)$"):
        lane.order(Order(what="large", method="doubled", args=(torch.zeros(1 << 20),)))


def test_a_watch_tells_which_lanes_have_something_to_say_whoever_they_are_by_now() -> None:
    nobody: Any = None
    pairs = [socket.socketpair() for _ in range(3)]
    lanes = [Lane(bounded(ours, 1.0), "told of", psutil.Process(), nobody, "lane", os.getpid()) for ours, _ in pairs]
    theirs = [bounded(its, 1.0) for _, its in pairs]
    watch = Watch()
    watch.turn_to(lanes[:2])
    assert watch.wait(0.0) == []
    tell(theirs[1], "news")
    tell(theirs[2], "of a lane that is not waited for")
    assert watch.wait(1.0) == [lanes[1]]
    assert lanes[1].message() == "news"
    assert watch.wait(0.0) == []
    lanes[1].close()
    watch.turn_to([lanes[0], lanes[2]])
    assert watch.wait(1.0) == [lanes[2]]
    theirs[0].close()  # an end is something to be told as well
    assert set(watch.wait(1.0)) == {lanes[0], lanes[2]}
    watch.close()


def test_what_a_step_has_hundreds_of_arrives_as_it_was_sent() -> None:
    span = Span(stream=WorkStream.H2D, step=1, layer=2, start_s=3.0, end_s=4.0, part=5)
    report = OpReport(span=span, size_bytes=6, reprojections=(), square_sum=7.0)
    for message in (report, GradientReady(step=1, layer=2, part=3)):
        assert pickle.loads(text := pickle.dumps(message)) == message
        assert b"dataclass" not in text  # their own way takes twice as long
