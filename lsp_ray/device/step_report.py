"""StepReport: what the device says of a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lsp_ray.device.streamed_weights import StreamedStep
from lsp_ray.trace import ComputeSpan, Wait


@dataclass(frozen=True, slots=True, kw_only=True)
class BiasReport:
    """Mean relative bias of the matrices measured in one step, and how many of them are refitted.

    `relative_by_unit` has the same of each unit with a matrix in the sample.
    """

    relative: float
    relative_by_unit: dict[int, float]
    num_measured: int
    num_refitted: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What the compute stream did in one step.

    `losses` are the shares of the parts that it computed, by their number, in the mean over the step's targets.
    `forward_s` is the first micro-batch's forward without its waits, `backward_s` the last one's backward: between
    them lie the deadlines and the arrivals of a step. `grad_norm`, `grad_scale`: see `Verdict`; where the step has
    several parts, the norm is not known here, and the scale 0 says that a part is not finite. `notes` are for people.
    Of several GPUs together, `waits` are those of the one that waited longest, which computes `waiting_parts`, and
    `computed_s` is what each of them computed. `weights` is empty where weights are on the device, `activations` where
    blocks' inputs are.
    """

    step: int
    losses: Mapping[int, float]
    num_tokens: int
    start_s: float
    end_s: float
    forward_s: float
    backward_s: float
    waits: tuple[Wait, ...]
    grad_norm: float
    grad_scale: float
    peak_device_bytes: int | None
    bias: BiasReport | None
    compute: tuple[ComputeSpan, ...] = ()
    computed_s: tuple[float, ...] = ()
    waiting_parts: tuple[int, ...] | None = None
    notes: tuple[str, ...] = ()
    weights: StreamedStep = field(default_factory=StreamedStep)
    activations: StreamedStep = field(default_factory=StreamedStep)

    @property
    def loss(self) -> float:
        """The mean over the step's targets, as far as it was computed here."""
        return sum(self.losses[part] for part in sorted(self.losses))
