"""The machines of a cluster, as far as a run is decided by them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from lsp_ray.sim.store import fewest_to_sum, singly, sum_blocks

if TYPE_CHECKING:
    from lsp_ray.runtime.prepare.job import Job


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One of them. `name` is unique, `cores` are those that a run may use."""

    name: str
    num_gpus: int
    cores: int
    has_bf16: bool


class HasGpus(Protocol):
    """Whatever can say how many."""

    @property
    def num_gpus(self) -> int:
        """So many."""
        ...


Place = TypeVar("Place", bound=HasGpus)


def place(num_gpus: int, there: Sequence[Place], *, on_gpu: bool) -> list[Place]:
    """Where each GPU of a run is: on the driver's machine first. CPU actors in their place are shared out evenly.

    Args:
        num_gpus: Of the run.
        there: The machines, the driver's first.
        on_gpu: Whether GPUs compute; fewer than so many machines are returned where there are not enough.
    """
    if not on_gpu:
        return [there[gpu * len(there) // num_gpus] for gpu in range(num_gpus)]
    return [own for own in there for _ in range(own.num_gpus)][:num_gpus]


def parts_sent(job: Job, node: str) -> list[range]:
    """The parts of a step that a machine sends to others, those of each range as their sum; on one alone all, singly.

    So they are as well where GPUs are still to divide them by their pace: each machine may compute any.
    """
    layout, num_parts = job.layout, job.config.replicas
    if job.has_parts_to_divide or not layout.nodes:
        return singly(range(num_parts))
    own = [part for part, gpu in enumerate(layout.gpu_of_part) if layout.nodes[gpu] == node]
    return sum_blocks(range(own[0], own[-1] + 1), num_parts, fewest_to_sum(job.codec.payload_dtype)) if own else []
