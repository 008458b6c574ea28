"""ShardPool: the shard actors, and others in the place of those that die."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ray

from lsp_ray.errors import WorkerLostError
from lsp_ray.optim.reproject import Reprojection
from lsp_ray.runtime.actors.keepers import Keepers
from lsp_ray.runtime.actors.numa_nodes import NumaNode, nodes_of_shards, numa_nodes, threads_near
from lsp_ray.runtime.actors.places import Places
from lsp_ray.runtime.actors.shard_actor import ShardActor
from lsp_ray.runtime.actors.throttle import Throttle
from lsp_ray.runtime.cluster.malloc_arenas import give_back_free
from lsp_ray.runtime.cluster.nodes import on_node
from lsp_ray.runtime.prepare.job import Job
from lsp_ray.runtime.transport.lanes import UPDATES, Lane, Order, actor_class
from lsp_ray.schedule.ops import Op

MAX_DEATHS_IN_A_ROW = 3


class ShardPool:
    """Starts a shard for every index of the layout. A dead one's state is in its slots, see `shard_actor`.

    Args:
        job: The run.
        places: Where they are.
        keepers: Of the slots there.
        note: Told, in a line, of a shard that died.

    Attributes:
        lanes: To each shard.
    """

    def __init__(self, job: Job, places: Places, keepers: Keepers, note: Callable[[str], None]) -> None:
        self._job = job
        self._places, self._keepers = places, keepers
        self._note = note
        units = [job.layout.units_of(index) for index in range(job.layout.num_shards)]
        self._slots = [[keepers.homes[unit] for unit in own] for own in units]
        self._undo = [keepers.new_undo(index, own, is_shared=not job.speculates) for index, own in enumerate(units)]
        self._nodes = self._spread()
        self._throttle = Throttle()
        self._deaths = [0 for _ in self._slots]
        self._shards = [self._new(index) for index in range(len(self._slots))]
        self.lanes = [self._opened(index) for index in range(len(self._slots))]

    def set_up(self, throttle: Throttle) -> None:
        """Let every shard take the checkpoint's moments, if there is one, and keep to the throttle."""
        if self._job.saved is not None:
            for lane in self.lanes:
                lane.order(Order(what="loading its state", method="load", args=(self._job.saved,)))
            self.wait()
        self.keep_to(throttle)

    def keep_to(self, throttle: Throttle) -> None:
        """Between two steps: let the shards keep to this from now on, also those that come in a dead one's place."""
        self._throttle = throttle
        for index in range(len(self.lanes)):
            self._slow_down(index)
        self.wait()

    def update(self, op: Op, reprojections: Sequence[Reprojection], grad_scale: float) -> None:
        """Let the unit's shard make its update, with gradients times `grad_scale`."""
        args = (op.step, op.layer, self._job.learning_rates[op.step], reprojections, grad_scale)
        lane = self.lanes[self._job.layout.shard_of_unit[op.layer]]
        lane.order(Order(what="update of unit {1}, step {0}", method="update", args=args))

    def updated(self, lane: Lane) -> Any:
        """The answer to an update that is there.

        Raises:
            WorkerLostError: The shard died.
        """
        report = lane.answer()
        self._deaths[self.lanes.index(lane)] = 0
        return report

    def revive(self, lane: Lane, error: WorkerLostError) -> None:
        """Put another actor in the place of a dead one, and ask it for all that was owed, in the same order.

        Raises:
            WorkerLostError: `error`, where that has not helped several times in a row.
        """
        index = self.lanes.index(lane)
        self._deaths[index] += 1
        if self._deaths[index] >= MAX_DEATHS_IN_A_ROW:
            raise error
        ray.kill(self._shards[index])
        lane.close()
        if not self._keepers.has_ended(index, lane.pid):  # two writers of one slot would be one too many
            raise WorkerLostError(f"process {lane.pid} of a lost actor does not end") from error
        self._shards[index] = self._new(index)
        self.lanes[index] = self._opened(index)
        self._note(f"{error}; another one takes its place, nothing is lost")
        self._slow_down(index)
        self.lanes[index].answer()
        for order in lane.owed:
            self.lanes[index].order(order)
        give_back_free()

    def save(self, folder: str) -> None:
        """Let every shard write its part of a checkpoint; to be waited for."""
        for index, lane in enumerate(self.lanes):
            lane.order(Order(what="save", method="save", args=(folder, index)))

    def wait(self) -> None:
        """Wait for all that is owed."""
        for lane in self.lanes:
            while lane.owed:
                lane.answer()

    def close(self) -> None:
        """End the actors and give their slots back."""
        for shard, lane in zip(self._shards, self.lanes, strict=True):
            ray.kill(shard)
            lane.close()
        self._slots, self._undo = [], []

    def _new(self, index: int) -> Any:
        place = on_node(self._places.shards[index].id)
        actor = actor_class(ShardActor).options(num_cpus=1, max_restarts=0, **place)
        threads, decay, node = self._job.layout.shard_threads, self._job.config.weight_decay, self._nodes[index]
        cores = () if node is None else node.cores
        way = self._keepers.way_of_shard(index)
        return actor.remote(self._slots[index], self._undo[index], threads, index, decay, cores, way)

    def _spread(self) -> list[NumaNode | None]:
        """Of each shard here; none where CPU actors stand in GPUs' places, who have most of the cores of all nodes."""
        layout = self._job.layout
        chosen: list[NumaNode | None] = [None] * layout.num_shards
        if self._job.device == "cpu":
            return chosen
        there = numa_nodes()
        taken = threads_near(there, layout.num_beside(0), layout.device_threads)
        here = [index for index, place in enumerate(self._places.shards) if place.id == self._places.own.id]
        found = nodes_of_shards(there, len(here), layout.shard_threads, taken)
        for index, node in zip(here, found, strict=True):
            chosen[index] = node
            if node is not None:
                self._note(f"shard {index} runs on {node}")
        return chosen

    def _opened(self, index: int) -> Lane:
        place = self._places.shards[index]
        return self._keepers.open_lanes(self._shards[index], f"shard {index}", [UPDATES], place)[UPDATES]

    def _slow_down(self, index: int) -> None:
        args = (self._throttle, len(self.lanes))
        self.lanes[index].order(Order(what="throttle", method="keep_to", args=args))
