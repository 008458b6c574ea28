"""NodeKeeper: of one machine among several, makes its slots and passes on what crosses to other machines and from them.

A GPU actor knows the slots of its own machine alone. Its payload lies there when it asks its keeper to send it on, and
a delta lies there once the keeper has brought it. The keeper at a unit's home, the machine of its shard, puts payloads
into the slots that the shard reads and gives deltas out of the one that it writes. Parts that several GPUs of a machine
compute are added up before they leave it where the sum is fewer bytes, and a delta comes to a machine once.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import ray
import torch

from lsp_ray.device.token_bucket import TokenBucket
from lsp_ray.errors import StaleSlotError
from lsp_ray.optim.codec import Codec
from lsp_ray.optim.parts import tree_sum
from lsp_ray.optim.sums import SummedPart
from lsp_ray.process import keep_loaded
from lsp_ray.runtime.cluster.malloc_arenas import give_back_free
from lsp_ray.runtime.transport.lanes import POLL_S, START_TIMEOUT_S, serve
from lsp_ray.runtime.transport.line import Lines
from lsp_ray.runtime.transport.network import Address, Clock, Door
from lsp_ray.runtime.transport.slots import Bytes, OpenSlots, as_bytes
from lsp_ray.runtime.transport.unit_slots import UnitSlots, new_undo, new_unit_slots
from lsp_ray.trace import WorkStream

_SLICE = 1 << 19  # values of a sum at a time, which stay in a cache
_NUM_LOOKS = 8  # at the driver's machine's clock, before it is first told how far it is off


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A unit's slots to be made, see `new_unit_slots`."""

    unit: int
    numel: int
    codec: Codec
    sums: Sequence[SummedPart] | None
    parts: Sequence[range]
    has_state: bool

    def made(self) -> UnitSlots:
        """Make them on this machine."""
        return new_unit_slots(self.unit, self.numel, self.codec, self.sums, self.parts, has_state=self.has_state)


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbours:
    """Those of a run, as one keeper knows them.

    Attributes:
        addresses: Of each machine's keeper, by node; without its own.
        homes: Of each unit, the node of its home.
        driver: The node whose clock all times are told by; None: this one.
    """

    addresses: Mapping[str, Address]
    homes: Sequence[str]
    driver: str | None


class NodeKeeper:
    """See above. Each connection has a thread, which asks other keepers by connections of its own.

    Args:
        host: This machine's address, as others reach it.
    """

    def __init__(self, host: str) -> None:
        keep_loaded()
        torch.set_num_threads(1)
        self._door = Door(host, POLL_S)
        self._at_home: dict[int, UnitSlots] = {}
        self._open: dict[int, OpenSlots] = {}
        self._gpus: list[_GpuSlots] = []
        self._neighbours = Neighbours(addresses={}, homes=(), driver=None)
        self._lines = Lines()
        self._buckets: dict[tuple[str, WorkStream], _Turns] = {}
        self._clock, self._looking = Clock(), threading.Lock()
        self._last_put: dict[tuple[int, int], int] = {}  # by unit and first part, the last step of what came
        self._putting = threading.Lock()
        threading.Thread(target=self._let_in, name="door", daemon=True).start()

    def __repr__(self) -> str:
        return "keeper"

    def _let_in(self) -> None:
        """Whoever comes, for as long as it lives; who has still to prove that it knows the key keeps nobody waiting."""
        while True:
            try:
                came = self._door.come()
            except TimeoutError:
                continue
            except OSError:  # no more files may be open: not for long
                time.sleep(POLL_S)
                continue
            threading.Thread(target=self._serve, args=(came,), daemon=True).start()

    def _serve(self, came: socket.socket) -> None:
        connection = self._door.admit(came)
        if connection is not None:
            serve(connection, self)

    # the driver's, by Ray

    def address(self) -> Address:
        """Where it is asked."""
        return self._door.address

    def make(self, wanted: Sequence[Wanted]) -> list[UnitSlots]:
        """Make slots in this machine's store; they last as long as this actor."""
        made = [own.made() for own in wanted]
        give_back_free()  # what was put into the store
        return made

    def make_undo(self, slots: Sequence[UnitSlots], is_shared: bool) -> Mapping[int, ray.ObjectRef[Any]]:
        """See `new_undo`; they last as long."""
        return new_undo(slots, is_shared=is_shared)

    def hold(self, homes: Sequence[UnitSlots]) -> None:
        """Put payloads into these and give deltas out of them."""
        self._at_home = {own.unit: own for own in homes}
        self._open = {own.unit: own.open() for own in homes}

    def serve_gpus(self, slots: Sequence[UnitSlots], blocks: Sequence[range]) -> int:
        """Pass on what is in these, the parts of a block as their sum; returns their number, for `forward`."""
        self._gpus.append(_GpuSlots(slots, blocks))
        return len(self._gpus) - 1

    def know(self, neighbours: Neighbours) -> None:
        """Who else there is, from now on."""
        self._neighbours = neighbours

    def keep_to(self, bytes_per_s: Mapping[str, float]) -> None:
        """Slow down what crosses to each home, and from it; those that are not named are as fast as they are."""
        ways = [(node, direction) for node in bytes_per_s for direction in (WorkStream.D2H, WorkStream.H2D)]
        self._buckets = {way: _Turns(bytes_per_s[way[0]]) for way in ways}

    def wait_for_end(self, pid: int) -> bool:
        """See `has_ended`."""
        return has_ended(pid)

    # an actor's on this machine

    def forward(self, index: int, step: int, unit: int, part: int) -> None:
        """A part's payload is in its slot: bring it home, or wait for those that are added up with it.

        Whose part is the last one of its block waits until all of them are at home, the others do not.
        """
        own = self._gpus[index]
        home = self._neighbours.homes[unit]
        block = own.block_of[part]
        with own.turn_down[unit]:
            if len(block) > 1 and not own.is_to_send(step, unit, block):
                return
            payload = own.payload(step, unit, block)
            self._slow_down(home, WorkStream.D2H, payload.nbytes)
            self._ask(home, "put", step, unit, block.start, as_bytes(payload))
            own.sent[unit, block.start] = step

    def bring(self, index: int, step: int, unit: int) -> None:
        """Have the unit's delta of `step` in its slot on return."""
        own = self._gpus[index]
        slot = own.open[unit].up
        home = self._neighbours.homes[unit]
        with own.turn_up[unit]:
            if slot.generation == step:  # another GPU's question has brought it
                return
            self._slow_down(home, WorkStream.H2D, slot.payload.nbytes)
            delta: Bytes = self._ask(home, "get", step, unit)
            as_bytes(slot.to_write())[:] = delta
            slot.publish(step)

    def begin_with(self, unit: int, total: Bytes) -> None:
        """Let the shard's sum of a unit's updates begin with this."""
        self._ask(self._neighbours.homes[unit], "put_total", unit, total)

    def offset_s(self) -> float:
        """What to add to times of this machine's monotonic clock for those of the driver's machine's."""
        driver = self._neighbours.driver
        if driver is None:
            return 0.0
        with self._looking:
            for _ in range(1 if self._clock.has_looked else _NUM_LOOKS):
                asked_s = time.monotonic()
                theirs_s: float = self._ask(driver, "clock")
                # what is added to their time gives this one's
                self._clock.look(asked_s, theirs_s, time.monotonic())
            return -self._clock.offset_s

    # another keeper's

    def put(self, step: int, unit: int, first: int, payload: Bytes) -> None:
        """A part's payload, or a sum from its first part on, has come.

        Raises:
            StaleSlotError: From a machine that was given up meanwhile: there is a later one.
        """
        with self._putting:
            last = self._last_put.get((unit, first), step)
            if step < last:
                raise StaleSlotError(f"a payload of step {step} comes after that of step {last}")
            self._last_put[unit, first] = step
        slot = self._open[unit].down[first]
        as_bytes(slot.to_write())[:] = payload
        slot.publish(step)

    def get(self, step: int, unit: int) -> Bytes:
        """A unit's delta."""
        return as_bytes(self._open[unit].up.to_read(step))

    def put_total(self, unit: int, total: Bytes) -> None:
        """See `begin_with`."""
        as_bytes(self._at_home[unit].open_total())[:] = total

    def clock(self) -> float:
        """This machine's monotonic clock, seconds."""
        return time.monotonic()

    def _ask(self, node: str, method: str, *args: Any) -> Any:
        return self._lines.ask(self._neighbours.addresses[node], method, *args)

    def _slow_down(self, home: str, direction: WorkStream, num_bytes: int) -> None:
        turns = self._buckets.get((home, direction))
        if turns is not None:
            turns.take(num_bytes)


def has_ended(pid: int) -> bool:
    """Wait until a process of this machine has ended; returns whether it has in time."""
    try:
        own = psutil.Process(pid)
        if own.status() != psutil.STATUS_ZOMBIE:
            own.wait(START_TIMEOUT_S)
    except psutil.NoSuchProcess:
        return True
    except psutil.TimeoutExpired:
        return False
    return True


class _GpuSlots:
    """Slots of some of this machine's GPUs, for units that are at home elsewhere.

    Attributes:
        open: By unit.
        block_of: By part, those that it is sent with.
        turn_down: By unit: who has it sends.
        turn_up: By unit: who has it brings.
        sent: By unit and first part of a block, the last step that is at home.
    """

    def __init__(self, slots: Sequence[UnitSlots], blocks: Sequence[range]) -> None:
        self.open = {own.unit: own.open() for own in slots}
        self._numel = {own.unit: own.numel for own in slots}
        self._codec = slots[0].codec if slots else Codec()
        self.block_of = {part: block for block in blocks for part in block}
        self.turn_down = {unit: threading.Lock() for unit in self.open}
        self.turn_up = {unit: threading.Lock() for unit in self.open}
        self.sent: dict[tuple[int, int], int] = {}

    def is_to_send(self, step: int, unit: int, block: range) -> bool:
        """Whether all parts of a block are there, and their sum is not at home yet."""
        down = self.open[unit].down
        return self.sent.get((unit, block.start)) != step and all(down[part].generation == step for part in block)

    def payload(self, step: int, unit: int, block: range) -> torch.Tensor:
        """What is sent: a part's, as it is, or the sum of several, float32."""
        wires = [self.open[unit].down[part].to_read(step) for part in block]
        if len(wires) == 1:
            return wires[0]
        total = torch.empty(self._numel[unit])
        for first in range(0, total.numel(), _SLICE):
            own = total[first : first + _SLICE]
            own.copy_(tree_sum([self._codec.decode(wire, own.numel(), first).float() for wire in wires]))
        return total


class _Turns:
    """A TokenBucket that several threads take from, one after the other."""

    def __init__(self, rate_per_s: float) -> None:
        self._bucket, self._turn = TokenBucket(rate_per_s), threading.Lock()

    def take(self, amount: int) -> None:
        """See `TokenBucket.take`; what is taken sets out now."""
        start_s = time.monotonic()
        with self._turn:
            self._bucket.take(amount, start_s=start_s)
