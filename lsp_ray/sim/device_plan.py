"""A GPU's work in order: what it computes, which deltas it waits for and when it announces gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from lsp_ray.schedule.ops import GradientReady, Op
from lsp_ray.sim.costs import StepCosts
from lsp_ray.trace import Phase, WorkStream


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceTask:
    """Computing for `seconds`, once the delta `awaits` is up; `announces` a gradient at its end.

    `phase` is what of; of a delta with the forward that reads it, the forward. `opens_pass` is a micro-batch's first.
    `piece` is that of the output embedding which the task reads, where they come up.
    """

    phase: Phase
    step: int
    layer: int
    seconds: float
    opens_pass: bool = False
    part: int = 0
    awaits: Op | None = None
    announces: GradientReady | None = None
    piece: int | None = None


def device_tasks(
    costs: StepCosts,
    num_steps: int,
    *,
    offloads: bool,
    staleness: int,
    drains: bool = False,
    gpu: int = 0,
    parts: Sequence[int] = (0,),
) -> Iterator[DeviceTask]:
    """Yield every task: forward from shallow to deep, backward from deep to shallow, then the device's own updates.

    A delta is applied before the first forward that reads it, gradients are announced in each part's last micro-batch.

    Args:
        costs: Of one step.
        num_steps: Optimizer updates.
        offloads: Whether shards make the updates.
        staleness: Steps by which deltas are late on purpose.
        drains: Whether what is still to be applied is so, after the last step, as step `num_steps`.
        gpu: Whose work it is.
        parts: Of a step, those that it computes, one after the other.
    """
    for step in range(num_steps):
        delta_step = step - 1 - staleness
        for part, position in product(parts, range(costs.num_micro_batches)):
            applies = offloads and (part, position) == (parts[0], 0) and delta_step >= 0
            awaited = _deltas(costs, delta_step, gpu) if applies else None
            announces = offloads and position == costs.num_micro_batches - 1
            yield from _forward(costs, step, part, awaited)
            yield from _backward(costs, step, part, announces=announces)
        if not offloads:
            for layer, cost in enumerate(costs.layers):
                yield DeviceTask(phase=Phase.APPLY, step=step, layer=layer, seconds=cost.update_s)
    for step in range(max(0, num_steps - 1 - staleness), num_steps if drains else 0):
        yield from _applied(costs, num_steps, parts[0], _deltas(costs, step, gpu))


def _forward(costs: StepCosts, step: int, part: int, awaited: Sequence[Op] | None) -> Iterator[DeviceTask]:
    if awaited is not None and costs.waits_for_all:
        yield from _applied(costs, step, part, awaited)
        awaited = None
    for layer, cost in enumerate(costs.layers):
        yield DeviceTask(
            phase=Phase.FORWARD,
            step=step,
            layer=layer,
            seconds=cost.forward_s if awaited is None else cost.apply_s + cost.forward_s,
            part=part,
            awaits=None if awaited is None else awaited[layer],
            opens_pass=layer == 0,
        )
    loss = DeviceTask(phase=Phase.FORWARD, step=step, layer=len(costs.layers) - 1, seconds=costs.loss_s, part=part)
    if not costs.pieces_s:
        yield loss
    for piece in range(len(costs.pieces_s)):
        yield replace(loss, seconds=costs.loss_s / len(costs.pieces_s), piece=piece)


def _applied(costs: StepCosts, step: int, part: int, awaited: Sequence[Op]) -> Iterator[DeviceTask]:
    """Deltas added by themselves, before any forward."""
    for layer, cost in enumerate(costs.layers):
        yield DeviceTask(
            phase=Phase.APPLY, step=step, layer=layer, seconds=cost.apply_s, part=part, awaits=awaited[layer]
        )


def _deltas(costs: StepCosts, step: int, gpu: int) -> list[Op]:
    return [Op(stream=WorkStream.H2D, step=step, layer=layer, part=gpu) for layer in range(len(costs.layers))]


def _backward(costs: StepCosts, step: int, part: int, *, announces: bool) -> Iterator[DeviceTask]:
    for layer, cost in reversed(list(enumerate(costs.layers))):
        ready = GradientReady(step=step, layer=layer, part=part) if announces else None
        yield DeviceTask(
            phase=Phase.BACKWARD, step=step, layer=layer, seconds=cost.backward_s, part=part, announces=ready
        )
