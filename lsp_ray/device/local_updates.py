"""Updates of methods whose optimizer is on the device: after the backward, one unit at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lsp_ray.device.backend import Backend
from lsp_ray.device.compute_trace import ComputeTrace
from lsp_ray.device.judge import Judge, Verdict
from lsp_ray.device.unit import Unit, Update
from lsp_ray.optim.shard import OptimizerShard
from lsp_ray.trace import Phase, WorkStream


def judged(judge: Judge, units: Sequence[Unit], update: Update) -> Verdict:
    """Judge the gradients that are at the leaves; raises what `Judge.verdict` does."""
    for unit in units:
        judge.see(unit, [target.leaf.grad for target in unit.targets if target.leaf.grad is not None])
    return judge.verdict(update.step, update.learning_rate)


def update_in_place(
    shard: OptimizerShard,
    units: Sequence[Unit],
    update: Update,
    grad_scale: float,
    backend: Backend,
    trace: ComputeTrace,
) -> None:
    """Take the gradients from the leaves and let the weights make AdamW's step from them times `grad_scale`.

    The scale 0 lets go of the gradients and changes nothing.
    """
    if grad_scale == 0.0:
        for target in (target for unit in units for target in unit.targets):
            target.leaf.grad = None
        return
    with torch.no_grad():
        for unit in units:
            trace.begin(Phase.APPLY, unit.index)
            if shard.is_plain:
                unit.adamw_(shard.states[unit.index], update, grad_scale=grad_scale, hyper=shard.hyper)
                continue
            gradient, delta = (backend.empty(WorkStream.GPU, unit.numel, torch.float32) for _ in range(2))
            unit.take_gradient(gradient)
            rate = update.learning_rate
            shard.update(unit.index, [gradient], delta, learning_rate=rate, grad_scale=grad_scale)
            unit.apply(delta, update)
