"""Simulation: what a simulator's run came to."""

from __future__ import annotations

from dataclasses import dataclass

from lsp_ray.trace import Exposed, Span, Wait, WorkStream


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedStep:
    """Figures of one step, as the live run's: from the end of the backward before to the end of its own.

    With several GPUs a step ends with the last one's backward, and waits and busy times are of that GPU; updates are
    those of all shards.

    Attributes:
        step: Counted from 0.
        step_s: From the step's begin to its end.
        exposed: In which the GPU waited for deltas, by the stream that was late, or for weights; the network's part of
            a payload's way is d2h's, of a delta's way h2d's.
        busy_s: Of each stream.
    """

    step: int
    step_s: float
    exposed: Exposed
    busy_s: dict[WorkStream, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """What happened, in order of its end."""

    spans: tuple[Span, ...]
    waits: tuple[Wait, ...]
    steps: tuple[SimulatedStep, ...]

    @property
    def typical(self) -> SimulatedStep:
        """The last step: by then every step is like the one before."""
        return self.steps[-1]
