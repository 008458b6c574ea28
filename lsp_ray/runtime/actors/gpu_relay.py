"""GpuRelay: what stands on the driver's machine for a GPU actor on another one.

To the driver it is that actor: it has its lanes and answers its orders. Payloads it puts into the slots of this machine
and takes deltas out of them, so that driver and shards know nothing of a network. Whoever of the two is lost, the other
one's lanes end, and the driver sees one GPU that is lost.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, TypeVar

import ray

from lsp_ray.device.step_report import StepReport
from lsp_ray.device.token_bucket import TokenBucket
from lsp_ray.errors import LspRayError, WorkerLostError
from lsp_ray.runtime.actors.throttle import Throttle
from lsp_ray.runtime.drive.ledger import OpReport
from lsp_ray.runtime.transport.answers import answer
from lsp_ray.runtime.transport.lanes import (
    COMPUTE,
    D2H,
    GPU_LANES,
    H2D,
    NEWS,
    START_TIMEOUT_S,
    Lane,
    connect,
    open_lanes_to,
    serve,
)
from lsp_ray.runtime.transport.messages import tell
from lsp_ray.runtime.transport.network import Clock
from lsp_ray.runtime.transport.slots import Bytes, as_bytes
from lsp_ray.runtime.transport.unit_slots import UnitSlots
from lsp_ray.trace import ComputeSpan, Span, Wait, WorkStream

if TYPE_CHECKING:  # a relay has no need of models and what they import
    from lsp_ray.runtime.actors.decided import Decided, SetupReport

Timed = TypeVar("Timed", Span, Wait, ComputeSpan, StepReport)

NUM_LOOKS = 8  # at the other machine's clock, before the first step


class GpuRelay:
    """See above.

    Args:
        actor: The GPU actor, see `GpuActor`.
        name: Of the GPU.
        slots: Of every unit, by index, on this machine.
        host: This machine's address, as others reach it.
        num_away: GPUs on other machines, which share this one's way out.
    """

    def __init__(self, actor: Any, name: str, slots: Sequence[UnitSlots], host: str, num_away: int) -> None:
        self._actor, self._name, self._host, self._units = actor, name, host, slots
        self._slots = [own.open() for own in slots]
        self._num_away = num_away
        self._buckets: dict[WorkStream, TokenBucket] = {}
        self._clock = Clock()
        self._lost: LspRayError | None = None
        self._losing = threading.Lock()

    def __repr__(self) -> str:
        return f"{self._name}-relay"

    def serve(self, address: str) -> None:
        """Hand the driver's orders on for as long as the actor lives.

        Raises:
            WorkerLostError: It does no longer.
        """
        far = open_lanes_to(self._actor, self._host, self._name, GPU_LANES)
        for _ in range(NUM_LOOKS):
            self._look(far[COMPUTE])
        self._near = {name: connect(address, name) for name in GPU_LANES}
        orders: Mapping[str, _Orders] = {
            COMPUTE: _Orders(self, far[COMPUTE], setup=self._setup, keep_to=self._keep_to, run_step=self._run_step),
            D2H: _Orders(self, far[D2H], send=self._send),
            H2D: _Orders(self, far[H2D], prefetch=self._prefetch),
        }
        for name in (D2H, H2D):
            threading.Thread(target=serve, args=(self._near[name], orders[name]), name=name, daemon=True).start()
        threading.Thread(target=self._tell_news, args=(far[NEWS],), name=NEWS, daemon=True).start()
        serve(self._near[COMPUTE], orders[COMPUTE])
        if self._lost is not None:
            raise self._lost

    @ray.method(concurrency_group="progress")
    def progress(self) -> str:
        """See `GpuActor.progress`."""
        return str(answer(self._actor.progress.remote(), f"{self._name}: progress", START_TIMEOUT_S))

    def call(self, lane: Lane, method: str, *args: Any) -> Any:
        """Hand an order on and wait; a loss ends this actor as well."""
        try:
            return lane.call(method, method, *args)
        except WorkerLostError as error:
            self._lose(error)
            raise

    def _lose(self, error: LspRayError) -> None:
        """Let the driver see the end of its lanes; the first one to say why is believed."""
        with self._losing:
            self._lost = self._lost or error
        for connection in self._near.values():
            _shut_down(connection)

    def _tell_news(self, lane: Lane) -> None:
        try:
            while True:
                tell(self._near[NEWS], lane.message())
        except WorkerLostError as error:
            self._lose(error)
        except OSError:  # the driver is gone
            return

    def _look(self, lane: Lane) -> None:
        asked_s = time.monotonic()
        theirs_s: float = lane.call("clock", "clock")
        self._clock.look(asked_s, theirs_s, time.monotonic())

    # orders that are more than handed on

    def _setup(self, lane: Lane, decided: Decided | None = None) -> SetupReport:
        report: SetupReport = self.call(lane, "setup", decided)
        self._buckets = report.throttle.network(self._num_away)
        if decided is None:  # else the shards have them, and more exactly
            for unit, total in self.call(lane, "totals").items():
                as_bytes(self._units[unit].open_total())[:] = total
        return report

    def _keep_to(self, lane: Lane, throttle: Throttle) -> None:
        self._buckets = throttle.network(self._num_away)
        self.call(lane, "keep_to", throttle)

    def _run_step(self, lane: Lane, step: int) -> StepReport:
        self._look(lane)
        report: StepReport = self.call(lane, "run_step", step)
        moved = partial(_moved, by_s=self._clock.offset_s)
        return replace(moved(report), waits=tuple(map(moved, report.waits)), compute=tuple(map(moved, report.compute)))

    def _send(self, lane: Lane, step: int, unit: int, part: int) -> OpReport:
        sent: tuple[OpReport, Bytes] = self.call(lane, "send_bytes", step, unit, part)
        report, payload = sent
        span = _moved(report.span, self._clock.offset_s)
        self._slow_down(WorkStream.D2H, report.size_bytes, span.end_s)
        slot = self._slots[unit].down[part]
        as_bytes(slot.to_write())[:] = payload
        slot.publish(step)
        return replace(report, span=replace(span, end_s=time.monotonic()))

    def _prefetch(self, lane: Lane, step: int, unit: int, is_void: bool) -> OpReport:
        start_s = time.monotonic()
        payload = self._slots[unit].up.to_read(step)
        self._slow_down(WorkStream.H2D, payload.nbytes, start_s)
        report: OpReport = self.call(lane, "prefetch_bytes", step, unit, is_void, as_bytes(payload))
        span = _moved(report.span, self._clock.offset_s)
        return replace(report, span=replace(span, start_s=start_s))

    def _slow_down(self, direction: WorkStream, num_bytes: int, start_s: float) -> None:
        if direction in self._buckets:
            self._buckets[direction].take(num_bytes, start_s=start_s)


class _Orders:
    """What `serve` calls on a lane: all that is not known here goes on as it is."""

    def __init__(self, relay: GpuRelay, lane: Lane, **own: Callable[..., Any]) -> None:
        self._relay, self._lane, self._own = relay, lane, own

    def __getattr__(self, method: str) -> Callable[..., Any]:
        own = self._own.get(method)
        return partial(own, self._lane) if own is not None else partial(self._relay.call, self._lane, method)


def _moved(what: Timed, by_s: float) -> Timed:
    """The same, on this machine's clock."""
    return replace(what, start_s=what.start_s + by_s, end_s=what.end_s + by_s)


def _shut_down(connection: Connection) -> None:
    """End a connection for both sides, whoever waits on it."""
    with suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as ours:
        ours.shutdown(socket.SHUT_RDWR)
