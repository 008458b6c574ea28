"""The vocabulary between a policy and whoever executes it (the live driver, the simulator)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lsp_ray.trace import WorkStream


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One layer's work on one stream for one step.

    D2H copies the payload down, CPU updates its optimizer state, H2D copies its delta up. `part` is, of D2H, the
    part of the step whose payload it is, of H2D the GPU to which the delta comes up; an update is of all parts.
    """

    stream: WorkStream
    step: int
    layer: int
    part: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientReady:
    """The backward pass of a part of `step` has completed the part's gradients of `layer`."""

    step: int
    layer: int
    part: int = 0

    def __reduce__(self) -> tuple[Callable[..., GradientReady], tuple[int, ...]]:
        """For pickling: as dataclasses do it, the driver takes twice as long to read one, and a step has hundreds."""
        return _gradient_ready, (self.step, self.layer, self.part)


def _gradient_ready(step: int, layer: int, part: int) -> GradientReady:
    return GradientReady(step=step, layer=layer, part=part)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaDue:
    """A GPU has come to where it adds the delta of `step` to `layer`; only told to who bounds what waits there."""

    step: int
    layer: int
    gpu: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class OpDone:
    """An operation that was launched has finished."""

    op: Op


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSeconds:
    """What one layer costs each stream in a step; `backward_s` with the compression of its gradient."""

    forward_s: float
    backward_s: float
    d2h_s: float
    cpu_s: float
    h2d_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CostsMeasured:
    """After `step` the layers, shallowest first, are known to cost this much: medians of the last steps."""

    step: int
    layers: tuple[LayerSeconds, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepJudged:
    """The backward of `step` is over, and the norm of all its gradients known; only asked for by who speculates.

    Unless it `stands`, updates of the step that were launched before must be made again, with what is now known.
    """

    step: int
    stands: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRun:
    """The backward of `step` is over on all GPUs; only told where there are several."""

    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepAgain:
    """A GPU was replaced while `step` was the last that all have begun: all of it is told anew, and what follows."""

    step: int


Event = GradientReady | DeltaDue | OpDone | CostsMeasured | StepJudged | StepRun | StepAgain


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """Start this operation now."""

    op: Op


Action = Launch
