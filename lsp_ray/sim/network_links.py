"""NetworkLinks: in a simulation, who is on which machine's link, and how fast that is.

A way down to a layer's home takes the outgoing link of the GPU's machine and the incoming one of the home; a way up the
home's outgoing and the machine's incoming one. Those that share a link have equal parts of it, and nobody is faster
than his busier link lets him.

One GPU may stand for all. Then what it sends to a home comes from each of the machines that it stands for, at the same
time, and these fill the home's link. Where all machines are homes, that link also carries what the home's own GPUs have
on the way in the other direction: as many ways as this GPU has, but for those of layers that are at home there. That is
an average over homes: in truth some moments are busier for one of them than for another.
"""

from __future__ import annotations

from collections import Counter

from lsp_ray.sim.costs import NetworkCosts
from lsp_ray.trace import WorkStream


class NetworkLinks:
    """See above.

    Args:
        costs: Of the network.
        num_homes: Machines that have shards.
    """

    def __init__(self, costs: NetworkCosts, num_homes: int) -> None:
        self._costs = costs
        self._others = (num_homes - 1) / num_homes
        self._num_ways: Counter[WorkStream] = Counter()
        self._num_out: Counter[int] = Counter()  # by machine, as the next
        self._num_in: Counter[int] = Counter()

    def change(self, direction: WorkStream, gpu: int, home: int, by: int) -> None:
        """One more is on this way, or one less."""
        self._num_ways[direction] += by
        if self._costs.at is not None:
            start, end = self._ends(self._costs.at[gpu], direction, home)
            self._num_out[start] += by
            self._num_in[end] += by

    def rate(self, direction: WorkStream, gpu: int, home: int) -> float:
        """Of one that is on this way, relative to a whole link."""
        if self._costs.at is None:
            opposite = WorkStream.H2D if direction is WorkStream.D2H else WorkStream.D2H
            load = self._costs.away + self._others * self._num_ways[opposite]
        else:
            start, end = self._ends(self._costs.at[gpu], direction, home)
            load = max(self._num_out[start], self._num_in[end])
        return min(self._costs.most, 1.0 / load)

    @staticmethod
    def _ends(machine: int, direction: WorkStream, home: int) -> tuple[int, int]:
        return (machine, home) if direction is WorkStream.D2H else (home, machine)
