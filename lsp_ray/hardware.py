"""Machines of the paper, as proportions: what a step's full-gradient traffic and full Adam take, over its GPU compute.

They are figures of one step that the paper ran. The profiles in sim/ describe the same machines as speeds, for any
model; a proportion cannot be read off them without that step's compute, which only the paper tells.
tests/test_sim_paper.py holds the two to each other.

Chen et al., arXiv 2406.10181, Table 1 and Figure 2. Proportions rather than speeds: a run emulates a machine by scaling
its own link and shards to its own compute, and a simulator can scale any of the three.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

EmulatedMachine = Literal["rtx4090-threadripper", "a1000-laptop"]

BACKWARD_SHARE = 28.1 / (12.2 + 28.1)  # of the GPU compute (Table 1: milliseconds a layer, backward and forward)


@dataclass(frozen=True, slots=True, kw_only=True)
class Proportions:
    """Of one optimizer step with every gradient sent as it is; GPU compute is forward and backward.

    `traffic_over_compute` counts both directions of the link, one after the other, each half; `update_over_compute` is
    Adam on the CPU, all cores together.
    """

    traffic_over_compute: float
    update_over_compute: float
    source: str


MACHINES: dict[EmulatedMachine, Proportions] = {
    "rtx4090-threadripper": Proportions(
        traffic_over_compute=(1.4 + 2.8) / 2 / 1.29,
        update_over_compute=1.92 / 1.29,
        source="Table 1, llama-7B: traffic 1.4 to 2.8 s (the middle is taken), Adam 1.92 s, GPU compute 1.29 s",
    ),
    "a1000-laptop": Proportions(
        # in Zero-Offload's order the way down hides behind the backward and no more: traffic = exposed + backward
        traffic_over_compute=2.09 + BACKWARD_SHARE,
        update_over_compute=0.63,
        source="Figure 2, GPT2-1.3B on 4 GB: exposed communication 2.09 and update 0.63 of the GPU compute",
    ),
}
