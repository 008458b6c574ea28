"""The machines of a cluster, as far as a run is decided by them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar


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
