"""The vocabulary between a policy and whoever executes it (the live driver, the simulator)."""

from __future__ import annotations

from dataclasses import dataclass

from lsp_ray.trace import WorkStream


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One layer's work on one stream for one step.

    D2H copies the layer's payload down, CPU updates its optimizer state, H2D copies its delta up.
    """

    stream: WorkStream
    step: int
    layer: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientReady:
    """The backward pass of `step` has completed the gradients of `layer`."""

    step: int
    layer: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OpDone:
    """An operation that was launched has finished."""

    op: Op


Event = GradientReady | OpDone


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """Start this operation now."""

    op: Op


Action = Launch
