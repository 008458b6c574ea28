"""The device's work in order: what it computes, which deltas it waits for and when it announces gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lsp_ray.schedule.ops import GradientReady, Op
from lsp_ray.sim.costs import StepCosts
from lsp_ray.trace import WorkStream


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceTask:
    """Computing for `seconds`, once the delta `awaits` is up; `announces` a gradient at its end."""

    step: int
    layer: int
    seconds: float
    awaits: Op | None = None
    announces: GradientReady | None = None


def device_tasks(
    costs: StepCosts, num_steps: int, *, offloads: bool, staleness: int, drains: bool = False
) -> Iterator[DeviceTask]:
    """Yield every task: forward from shallow to deep, backward from deep to shallow, then the device's own updates.

    A delta is applied before the first forward that reads it, gradients are announced in the last micro-batch.

    Args:
        costs: Of one step.
        num_steps: Optimizer updates.
        offloads: Whether shards make the updates.
        staleness: Steps by which deltas are late on purpose.
        drains: Whether what is still to be applied is so, after the last step, as step `num_steps`.
    """
    for step in range(num_steps):
        delta_step = step - 1 - staleness
        for position in range(costs.num_micro_batches):
            applies = offloads and position == 0 and delta_step >= 0
            announces = offloads and position == costs.num_micro_batches - 1
            yield from _forward(costs, step, delta_step if applies else None)
            yield from _backward(costs, step, announces=announces)
        if not offloads:
            for layer, cost in enumerate(costs.layers):
                yield DeviceTask(step=step, layer=layer, seconds=cost.update_s)
    for step in range(max(0, num_steps - 1 - staleness), num_steps if drains else 0):
        for layer, cost in enumerate(costs.layers):
            yield DeviceTask(step=num_steps, layer=layer, seconds=cost.apply_s, awaits=_delta(step, layer))


def _forward(costs: StepCosts, step: int, delta_step: int | None) -> Iterator[DeviceTask]:
    if delta_step is not None and costs.waits_for_all:
        for layer, cost in enumerate(costs.layers):
            yield DeviceTask(step=step, layer=layer, seconds=cost.apply_s, awaits=_delta(delta_step, layer))
        delta_step = None
    for layer, cost in enumerate(costs.layers):
        if delta_step is None:
            yield DeviceTask(step=step, layer=layer, seconds=cost.forward_s)
        else:
            seconds = cost.apply_s + cost.forward_s
            yield DeviceTask(step=step, layer=layer, seconds=seconds, awaits=_delta(delta_step, layer))
    yield DeviceTask(step=step, layer=len(costs.layers) - 1, seconds=costs.loss_s)


def _delta(step: int, layer: int) -> Op:
    return Op(stream=WorkStream.H2D, step=step, layer=layer)


def _backward(costs: StepCosts, step: int, *, announces: bool) -> Iterator[DeviceTask]:
    for layer, cost in reversed(list(enumerate(costs.layers))):
        ready = GradientReady(step=step, layer=layer) if announces else None
        yield DeviceTask(step=step, layer=layer, seconds=cost.backward_s, announces=ready)
