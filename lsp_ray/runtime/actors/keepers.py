"""Keepers: the slots of every machine of a run, and who passes on what crosses between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from lsp_ray.errors import LspRayError, WorkerLostError
from lsp_ray.runtime.actors.node_keeper import Neighbours, NodeKeeper, Wanted, has_ended
from lsp_ray.runtime.actors.places import Places
from lsp_ray.runtime.actors.throttle import Throttle
from lsp_ray.runtime.cluster.nodes import Node, on_node
from lsp_ray.runtime.prepare.job import Job
from lsp_ray.runtime.prepare.machines import parts_sent
from lsp_ray.runtime.transport.answers import answer
from lsp_ray.runtime.transport.lanes import START_TIMEOUT_S, Lane, actor_class, open_lanes, open_lanes_to
from lsp_ray.runtime.transport.line import Way
from lsp_ray.runtime.transport.network import Address
from lsp_ray.runtime.transport.unit_slots import UnitSlots, new_undo
from lsp_ray.sim.store import singly


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """The slots of every unit that an actor finds on its machine; `way`: whom it asks to fill and empty them."""

    slots: Sequence[UnitSlots]
    way: Way | None


class Keepers:
    """Makes the slots: of the driver's machine itself, of others by a keeper there. One machine needs no keepers.

    Args:
        job: The run.
        places: Where its actors are, which changes as GPUs are lost.

    Attributes:
        homes: By unit, the slots on its shard's machine.

    Raises:
        WorkerLostError: A keeper does not start.
    """

    def __init__(self, job: Job, places: Places) -> None:
        self._job, self._places, self._own = job, places, places.own
        self._first_gpus = tuple(places.gpus)
        self._home_of_unit = [places.shards[shard] for shard in job.layout.shard_of_unit]
        self._keepers: dict[str, Any] = {}  # by node, as what follows
        self._addresses: dict[str, Address] = {}
        self._ways: dict[str, Given] = {}  # of GPUs that are there from the start
        self._moved: dict[int, Given] = {}  # by GPU, of those that have come in a lost one's place
        self._throttle = Throttle()
        try:
            here = list(dict.fromkeys((places.own, *places.gpus, *places.shards)))
            if len(here) > 1 and job.payload_sizes:
                self._start(here)
            self.homes = self._new_homes()
            self._introduce()
            for node in here:
                self._ways[node.id] = self._given(node, self._parts_at(node), self._blocks(node))
        except BaseException:
            self.close()
            raise

    def given(self, gpu: int) -> Given:
        """What a GPU finds where it is now."""
        return self._moved.get(gpu) or self._ways[self._places.gpus[gpu].id]

    def find_place(self, gpu: int) -> None:
        """Decide where another actor comes in a lost one's place, see `Places.find`; lost keepers are replaced as well.

        Raises:
            WorkerLostError: There is none, or what the machine kept for others is lost with it.
        """
        before = self._places.gpus[gpu]
        node, there = self._places.find(gpu)
        has_moved = node != before
        if has_moved and any(len(block) > 1 for block in self._blocks(before)):
            raise WorkerLostError(f"the machine of {self._job.layout.name_of(gpu)} is lost, which adds up parts there")
        if not self._keepers:
            return
        lost = self._lost_of(there)
        self._start([*lost, *([] if node.id in self._keepers else [node])])
        self._introduce()
        for own in set(lost) & set(self._first_gpus):
            self._ways[own.id] = self._given(own, self._parts_at(own), self._blocks(own))
        places = {other: self._places.gpus[other] for other in self._moved if self._places.gpus[other] in lost}
        if has_moved:
            places[gpu] = node
        for other, place in places.items():
            parts = self._parts_of(other)
            self._moved[other] = self._given(place, parts, singly(parts))
        self._places.gpus[gpu] = node  # once all is there: who tries again finds what was before
        self.keep_to(self._throttle)

    def _lost_of(self, there: Sequence[Node]) -> list[Node]:
        """The machines whose keepers are lost; those that are lost themselves are forgotten.

        Raises:
            WorkerLostError: One kept slots that a shard needs, or parts that waited for others to be added to them.
        """
        for node_id in set(self._keepers) - {node.id for node in there}:
            del self._keepers[node_id], self._addresses[node_id]
        lost = [node for node in there if node.id in self._keepers and not self._answers(node.id)]
        for node in self._places.shards:
            if node != self._own and (node in lost or node.id not in self._keepers):
                raise WorkerLostError(f"the slots of {node.name} are lost, which has shards")
        for node in lost:
            if any(len(block) > 1 for block in self._blocks(node)):
                raise WorkerLostError(f"the slots of {node.name} are lost, where parts are added up")
        return lost

    def open_lanes(self, actor: Any, who: str, names: Sequence[str], node: Node) -> dict[str, Lane]:
        """Lanes to an actor on this machine or another one; see `lanes.open_lanes` for errors."""
        if node.id == self._own.id:
            return open_lanes(actor, who, names)
        return open_lanes_to(actor, self._own.ip, who, names)

    def new_undo(self, shard: int, units: Sequence[int], *, is_shared: bool) -> Mapping[int, ray.ObjectRef[Any]]:
        """Slots for the states of a shard's units to go back to, on its machine; see `unit_slots.new_undo`."""
        own = [self.homes[unit] for unit in units]
        node = self._places.shards[shard]
        if node.id == self._own.id:
            return new_undo(own, is_shared=is_shared)
        made: Mapping[int, ray.ObjectRef[Any]] = self._call(node.id, "make_undo", own, is_shared, timeout_s=None)
        return made

    def way_of_shard(self, shard: int) -> Way | None:
        """Whom a shard asks for the time; None: it has the driver's."""
        node = self._places.shards[shard]
        return None if node.id == self._own.id else Way(keeper=self._addresses[node.id])

    def has_ended(self, shard: int, pid: int) -> bool:
        """Wait until the process of a shard has ended; returns whether it has in time."""
        node = self._places.shards[shard]
        return (
            has_ended(pid)
            if node.id == self._own.id
            else bool(
                self._call(node.id, "wait_for_end", pid, timeout_s=2 * START_TIMEOUT_S)  # it waits as long itself
            )
        )

    def keep_to(self, throttle: Throttle) -> None:
        """Between two steps: slow the network down to this from now on."""
        self._throttle = throttle
        for node_id in self._keepers:
            self._call(node_id, "keep_to", self._rates(node_id))

    def close(self) -> None:
        """End the keepers; slots that they made are lost."""
        for keeper in self._keepers.values():
            ray.kill(keeper)
        self._keepers, self.homes, self._ways, self._moved = {}, [], {}, {}

    def _start(self, there: Sequence[Node]) -> None:
        for node in there:
            self._keepers[node.id] = (
                actor_class(NodeKeeper).options(num_cpus=0, max_restarts=0, **on_node(node.id)).remote(node.ip)
            )
        for node in there:
            self._addresses[node.id] = self._call(node.id, "address")

    def _introduce(self) -> None:
        """Let all keepers know each other and the homes' slots on their own machines."""
        for node_id in self._keepers:
            others = {other: address for other, address in self._addresses.items() if other != node_id}
            homes = [node.id for node in self._home_of_unit]
            driver = None if node_id == self._own.id else self._own.id
            self._call(node_id, "know", Neighbours(addresses=others, homes=homes, driver=driver))
            self._call(node_id, "hold", [own for own, home in zip(self.homes, homes, strict=True) if home == node_id])

    def _new_homes(self) -> list[UnitSlots]:
        homes: dict[int, UnitSlots] = {}
        for node in dict.fromkeys(self._home_of_unit):
            parts = [
                block
                for other in dict.fromkeys(self._first_gpus)
                for block in (singly(self._parts_at(node)) if other.id == node.id else self._blocks(other))
            ]
            if self._job.has_parts_to_divide:
                parts = singly(range(self._job.config.replicas))
            units = [unit for unit, home in enumerate(self._home_of_unit) if home.id == node.id]
            homes |= {own.unit: own for own in self._made(node, units, parts, has_state=True)}
        return [homes[unit] for unit in range(len(self._home_of_unit))]

    def _given(self, node: Node, parts: range, blocks: Sequence[range]) -> Given:
        away = [unit for unit, home in enumerate(self._home_of_unit) if home.id != node.id]
        made = {own.unit: own for own in self._made(node, away, singly(parts), has_state=False)}
        slots = [made.get(unit) or own for unit, own in enumerate(self.homes)]
        if node.id == self._own.id and not away:
            return Given(slots=slots, way=None)
        index: int = self._call(node.id, "serve_gpus", list(made.values()), blocks)
        return Given(slots=slots, way=Way(keeper=self._addresses[node.id], index=index))

    def _made(self, node: Node, units: Sequence[int], parts: Sequence[range], *, has_state: bool) -> list[UnitSlots]:
        job = self._job
        wanted = [
            Wanted(
                unit=unit,
                numel=job.payload_sizes[unit],
                codec=job.codec,
                sums=None if job.sums is None else job.sums[unit],
                parts=parts,
                has_state=has_state,
            )
            for unit in units
        ]
        if node.id == self._own.id:  # these outlive a keeper
            return [own.made() for own in wanted]
        made: list[UnitSlots] = self._call(node.id, "make", wanted, timeout_s=None) if wanted else []
        return made

    def _parts_at(self, node: Node) -> range:
        """Of a step, those that a machine computes at first."""
        blocks = self._blocks(node)
        return range(blocks[0].start, blocks[-1].stop) if blocks else range(0)

    def _parts_of(self, gpu: int) -> range:
        if self._job.has_parts_to_divide:
            return range(self._job.config.replicas)
        return self._job.layout.parts_of(gpu)

    def _blocks(self, node: Node) -> list[range]:
        return parts_sent(self._job, node.name)

    def _rates(self, node_id: str) -> dict[str, float]:
        """Bytes a second to each home, and from it: this machine's part of a slower network, see `Throttle`.

        A home's link is shared by all GPUs that are elsewhere; where every machine is one, payloads that come in share
        it with deltas that do.
        """
        network_gbps = self._throttle.network_gbps
        num_own = sum(node.id == node_id for node in self._places.gpus)
        if network_gbps is None or not num_own:
            return {}
        homes = {node.id for node in self._home_of_unit}
        shared = 1 if len(homes) == 1 else 2
        return {
            home: network_gbps * 1e9 / shared * num_own / sum(node.id != home for node in self._places.gpus)
            for home in homes - {node_id}
        }

    def _answers(self, node_id: str) -> bool:
        try:
            self._call(node_id, "address")
        except LspRayError:
            return False
        return True

    def _call(self, node_id: str, method: str, *args: Any, timeout_s: float | None = START_TIMEOUT_S) -> Any:
        """Of slots there may be a hundred gigabytes to make: that takes as long as it takes."""
        return answer(getattr(self._keepers[node_id], method).remote(*args), f"keeper: {method}", timeout_s)
