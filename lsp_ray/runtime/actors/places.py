"""Places: on which machine each GPU and each shard of a run is."""

from __future__ import annotations

from collections.abc import Sequence

from lsp_ray.errors import WorkerLostError
from lsp_ray.runtime.cluster.nodes import Node, answering, nodes
from lsp_ray.runtime.prepare.job import Job


class Places:
    """As the job is laid out, on what is there now.

    Args:
        job: The run.

    Attributes:
        own: The driver's machine.
        gpus: Of each GPU.
        shards: Of each shard.

    Raises:
        WorkerLostError: A machine is lost.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        there = nodes()
        self.own = there[0]
        named = {node.name: node for node in there}
        layout = job.layout
        for name in (*layout.nodes, *layout.shard_nodes):
            if name not in named:
                raise WorkerLostError(f"{name} is lost, which the run has actors on")
        self.gpus = [named[name] for name in layout.nodes] or [self.own] * layout.num_gpus
        self.shards = [named[name] for name in layout.shard_nodes] or [self.own] * layout.num_shards

    def find(self, gpu: int) -> tuple[Node, Sequence[Node]]:
        """Where another actor may come in a lost one's place, and the machines that answer.

        Raises:
            WorkerLostError: There is no place.
        """
        there = answering(nodes()) if self._job.layout.nodes else [self.own]
        return place_for(self._job, gpu, self.gpus, there), there


def place_for(job: Job, gpu: int, places: Sequence[Node], there: Sequence[Node]) -> Node:
    """Where another actor is to come in a lost one's place: there if that machine is, else where there is room.

    Raises:
        WorkerLostError: There is none.
    """
    if any(node.id == places[gpu].id for node in there):
        return places[gpu]
    used = [place.id for own, place in enumerate(places) if own != gpu]
    free = [node for node in there if job.device == "cpu" or node.num_gpus > used.count(node.id)]
    if not free:
        raise WorkerLostError(f"no machine is left that has a GPU for {job.layout.name_of(gpu)}")
    return min(free, key=lambda node: used.count(node.id))


def spare_gpus(job: Job, node: Node) -> int:
    """How many lost ones of other machines `place_for` may bring to this one."""
    own = job.layout.nodes.count(node.name)
    others = job.layout.num_gpus - own
    return others if job.device == "cpu" else min(others, node.num_gpus - own)
