"""In a simulation: copies behind the compute that no policy asks for, and what brings them about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from lsp_ray.schedule.ops import Op
from lsp_ray.sim.device_plan import DeviceTask
from lsp_ray.trace import Cause, Span, Wait, WorkStream


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """A layer's weights, or its input, on their way; `due` as in `schedule.uses.Uses`, `seconds` at the full rate."""

    cause: Cause
    stream: WorkStream
    layer: int
    due: int
    seconds: float


class Mover(Protocol):
    """A GPU's weights, or its blocks' inputs; at most one copy is on its way.

    Attributes:
        spans: Of copies.
        waits: Of the GPU for them.
    """

    spans: list[Span]
    waits: list[Wait]

    def enter(self, task: DeviceTask, now_s: float) -> bool:
        """The GPU comes to a task; returns whether it may go on, else `arrive` returns the task."""
        ...

    def next_copy(self) -> Copy | None:
        """What is to be copied now, from now on on its way; None while something is, or nothing is wanted."""
        ...

    def arrive(self, start_s: float, now_s: float) -> DeviceTask | None:
        """What was on its way is there; returns the task that waited for it."""
        ...

    def delta_due(self, op: Op) -> int:
        """The deadline of a delta, and of the payload that it is made from, to be compared with those of copies."""
        ...


def waited_s(mover: Mover | None, start_s: float, end_s: float) -> float:
    """In waits that began between these."""
    waits = [] if mover is None else mover.waits
    return sum(wait.end_s - wait.start_s for wait in waits if start_s <= wait.start_s < end_s)
