"""Lane: orders to a thread of an actor, and its answers in the same order, over a socket of this machine.

Ray starts the actors, holds the slots and says why an actor died; a message of its own takes ten times as long as one
here, and as much more of the driver's processor (docs/log). Who waits sleeps, and the death of the other side ends
every wait. Of actors on other machines see `network`.
"""

from __future__ import annotations

import os
import pickle
import select
import socket
import struct
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection
from typing import Any

import psutil
import ray
import torch

from lsp_ray.errors import DeadlineError, LspRayError, OutOfDeviceMemoryError, WorkerLostError
from lsp_ray.runtime.cluster.leftovers import own_folder
from lsp_ray.runtime.cluster.own_raylet import check_raylet
from lsp_ray.runtime.transport.answers import answer
from lsp_ray.runtime.transport.messages import Ear, tell
from lsp_ray.runtime.transport.network import Address, Door, dial

COMPUTE, D2H, H2D, NEWS = "compute", "d2h", "h2d", "news"  # of a GPU's actor; news are no answers
UPDATES = "updates"  # of a shard
GPU_GROUPS = {"progress": 1}  # its concurrency groups beside the default one of one thread, which computes
START_TIMEOUT_S = 120.0  # an actor starts in seconds; past that it cannot be placed
DEATH_TIMEOUT_S = 5.0  # Ray knows of a death in milliseconds, unless a child holds what it looks at
SEND_TIMEOUT_S = 60.0  # a message finds room at once, or when the actor comes to read the one before
POLL_S = 1.0  # between two looks at what no socket tells


def link_lane(direction: str, home: int) -> str:
    """D2H or H2D, to a machine that has shards; each has a thread of its own."""
    return f"{direction} {home}"


def gpu_lanes(num_homes: int) -> list[str]:
    """All of a GPU's."""
    return [COMPUTE, NEWS, *(link_lane(way, home) for way in (D2H, H2D) for home in range(num_homes))]


# in an actor


def connect(address: str | Address, name: str) -> Connection:
    """Open the actor's end of the lane of this name, on this machine or to another one."""
    if isinstance(address, Address):
        connection = dial(address)
    else:
        ours = socket.socket(socket.AF_UNIX)
        ours.connect(address)
        connection = Connection(ours.detach())
    tell(connection, (name, os.getpid()))
    return connection


def serve(connection: Connection, target: object) -> None:
    """Carry out orders to `target`'s methods until the driver is gone; what they raise is an answer as well."""
    with suppress(EOFError, OSError):
        ear = Ear(connection)
        while True:
            method, args = ear.heard()
            tell(connection, _carried_out(getattr(target, method), args))


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What an order raised, and where."""

    error: Exception
    trace: str


def _carried_out(method: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    try:
        return method(*args)
    except Exception as error:  # noqa: BLE001 - whatever it is, the driver is to know
        return Failure(error=_crossing(error), trace=traceback.format_exc())


def _crossing(error: Exception) -> Exception:
    """The error, or what it says where it cannot be sent."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - of another's making
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


# in the driver


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A call of an actor's method, and what to say of it when it is waited for in vain.

    `what` has places for the arguments, as `str.format` has them: of hundreds of orders a step nobody asks.
    """

    what: str
    method: str
    args: tuple[Any, ...]

    def __str__(self) -> str:
        return self.what.format(*self.args)


class Lane:
    """The driver's end.

    Args:
        connection: To the actor's thread.
        who: The actor, for messages.
        process: The actor's; None: it is on another machine.
        life: Answered by Ray when the actor ends.
        name: Which of the actor's lanes it is.
        pid: Of the actor's process, on its machine.

    Attributes:
        owed: Orders without an answer, oldest first.
        has_come: Whether it is known that there is something to read.
    """

    def __init__(
        self,
        connection: Connection,
        who: str,
        process: psutil.Process | None,
        life: ray.ObjectRef[Any],
        name: str,
        pid: int,
    ) -> None:
        self._connection, self._who, self._life = connection, who, life
        self._ear = Ear(connection)
        self._poll = select.poll()  # kept: the connection's own prepares one for every message
        self._poll.register(connection, select.POLLIN)
        self.process, self.name, self.pid = process, name, pid
        self.owed: deque[Order] = deque()
        self.has_come = False

    def fileno(self) -> int:
        """For `Watch`."""
        return self._connection.fileno()

    def order(self, order: Order) -> None:
        """Send an order; returns once there is room for it, which is at once unless it is large.

        Raises:
            DeadlineError: There was none in time: the actor's thread hangs.
        """
        self.owed.append(order)
        try:
            tell(self._connection, (order.method, order.args))
        except BlockingIOError as error:
            raise DeadlineError(f"an order was not taken in time ({self._who}: {order})") from error
        except OSError:  # it is gone: whoever waits for the answer will hear why
            return

    def answer(self, meanwhile: Callable[[], None] = lambda: None) -> Any:
        """Wait for the answer to the oldest order; every POLL_S `meanwhile` is called.

        Raises:
            WorkerLostError: The actor died, or another one that the order needed. It is owed all the same.
            LspRayError: What the order raised.
        """
        result = self.message(meanwhile)
        if isinstance(result, Failure):
            order = self.owed[0] if isinstance(result.error, WorkerLostError) else self.owed.popleft()
            fail(result, f"{self._who}: {order}")
        self.owed.popleft()
        return result

    def owes(self) -> list[str]:
        """What is waited for, for messages."""
        return [f"{self._who}: {order}" for order in self.owed]

    def call(self, what: str, method: str, *args: Any, meanwhile: Callable[[], None] = lambda: None) -> Any:
        """Send an order and wait for its answer, see `answer`; nobody gets those that are owed before."""
        self.order(Order(what=what, method=method, args=args))
        while len(self.owed) > 1:
            self.answer()
        return self.answer(meanwhile)

    def message(self, meanwhile: Callable[[], None] = lambda: None) -> Any:
        """Wait for what the actor says next.

        Raises:
            WorkerLostError: It died.
        """
        while not (self.has_come or self._ear.rest or self._poll.poll(1e3 * POLL_S)):
            if self.has_ended():  # and a process that it has forked holds its end
                raise self._lost()
            meanwhile()
        self.has_come = False
        try:
            return self._ear.heard()
        except (EOFError, OSError) as error:
            raise self._lost() from error

    @property
    def holds_more(self) -> bool:
        """Whether there is a message that came with the one before: no `Watch` tells of it."""
        return bool(self._ear.rest)

    def has_message(self) -> bool:
        """Whether `message` would return at once, or raise."""
        return self.holds_more or bool(self._poll.poll(0))

    def has_ended(self) -> bool:
        """Whether the actor's process has, as far as is known."""
        if self.process is None:
            return bool(ray.wait([self._life], timeout=0)[0])
        try:
            return self.process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    def close(self) -> None:
        """Let the actor's thread end, if it lives."""
        self._connection.close()

    def _lost(self) -> WorkerLostError:
        check_raylet()
        what = self.owes()[0] if self.owed else self._who
        try:
            answer(self._life, what, DEATH_TIMEOUT_S)
        except WorkerLostError as error:
            return error
        except DeadlineError:
            return WorkerLostError(f"{self._who} died ({what})")
        return WorkerLostError(f"{self._who} ended ({what})")


class Watch:
    """Waits for what comes on any of several lanes; the system is told once which they are."""

    def __init__(self) -> None:
        self.lanes: Sequence[Lane] = ()
        self._by_fileno: dict[int, Lane] = {}
        self._epoll = select.epoll()

    def turn_to(self, lanes: Sequence[Lane]) -> None:
        """Wait for these from now on."""
        self.close()
        self.lanes, self._epoll = lanes, select.epoll()
        self._by_fileno = {lane.fileno(): lane for lane in lanes}
        for number in self._by_fileno:
            self._epoll.register(number, select.EPOLLIN)

    def wait(self, timeout_s: float) -> list[Lane]:
        """Wait until `message` of some of them would return or raise; returns those, none where time is over.

        What has come on them before must have been heard, see `Lane.holds_more`.
        """
        ready = [self._by_fileno[number] for number, _ in self._epoll.poll(timeout_s)]
        for lane in ready:
            lane.has_come = True
        return ready

    def close(self) -> None:
        """Give the system back what it was told."""
        self._epoll.close()


@cache
def actor_class(kind: type, **concurrency_groups: int) -> Any:
    """Ray's class of an actor, made once: it stays for as long as the process lives, and every lost one is replaced."""
    return ray.remote(concurrency_groups=concurrency_groups)(kind)  # type: ignore[call-overload]


def open_lanes(actor: Any, who: str, names: Sequence[str]) -> dict[str, Lane]:
    """Let an actor's method `serve` open these lanes, to the address that it is given; returns when all are open.

    Raises:
        WorkerLostError: The actor died.
        DeadlineError: It did not start in time.
    """
    with own_folder() as folder, socket.socket(socket.AF_UNIX) as listener:  # this user's alone, as the folder is
        address = str(folder / "lanes")
        listener.bind(address)
        listener.listen(len(names))
        listener.settimeout(POLL_S)
        life = actor.serve.remote(address)
        return _opened(lambda: bounded(listener.accept()[0], SEND_TIMEOUT_S), life, who, names, psutil.Process)


def open_lanes_to(actor: Any, host: str, who: str, names: Sequence[str]) -> dict[str, Lane]:
    """The same for an actor on another machine, which reaches this one at `host`."""
    with Door(host, POLL_S) as door:
        return _opened(door.accept, actor.serve.remote(door.address), who, names, lambda _pid: None)


def _opened(
    accept: Callable[[], Connection],
    life: ray.ObjectRef[Any],
    who: str,
    names: Sequence[str],
    process: Callable[[int], psutil.Process | None],
) -> dict[str, Lane]:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    lanes: dict[str, Lane] = {}
    while len(lanes) < len(names):
        try:
            connection = accept()
            name, pid = Ear(connection).heard()  # nothing else comes before the first order
            lanes[name] = Lane(connection, who, process(pid), life, name, pid)
        except (OSError, EOFError, psutil.NoSuchProcess):  # not in time, or its machine is gone
            if ray.wait([life], timeout=0)[0]:
                answer(life, f"{who}: start")
            if time.monotonic() >= deadline_s:
                raise DeadlineError(f"no answer within {START_TIMEOUT_S:.0f} s ({who}: start)") from None
    return lanes


def bounded(ours: socket.socket, timeout_s: float) -> Connection:
    """A connection whose sending gives up with BlockingIOError after so many whole seconds."""
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(timeout_s), 0))  # a C timeval
    return Connection(ours.detach())


def fail(failure: Failure, what: str) -> None:
    """Raise what an order raised elsewhere, see `Lane.answer`."""
    error = failure.error
    if isinstance(error, torch.OutOfMemoryError):
        raise OutOfDeviceMemoryError(
            f"the device's memory is full ({what}); a smaller per_device_train_batch_size or max_seq_length, or "
            "gradient_checkpointing, needs less"
        ) from error
    if not isinstance(error, LspRayError):
        error.add_note(f"{what}, in another process:\n{failure.trace}")
    raise error
