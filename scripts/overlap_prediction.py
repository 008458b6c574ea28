"""What simulator and planner say of a setting, given what a block without any throttle or the machine measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from lsp_ray.models.resolve import resolve_config
from lsp_ray.plan.measure import measure
from lsp_ray.plan.skeleton import shape_of
from lsp_ray.runtime.actors.throttle import Throttle
from lsp_ray.schedule.policy import POLICIES
from lsp_ray.sim.costs import LayerCosts, StepCosts
from lsp_ray.sim.forecast import forecast
from lsp_ray.sim.simulator import Simulator
from lsp_ray.sim.store import payload_bytes
from lsp_ray.sim.workload import Workload
from scripts.live_session import Block
from scripts.overlap_settings import Setting

HOP_S = 0.0002  # from an operation's end until the next began (docs/log.md)


def predicted_step_s(setting: Setting, free: Block, sizes: Sequence[int], throttle: Throttle) -> float:
    """Simulate a setting on the costs that `free` measured for the same work.

    A throttled copy takes its bytes over the rate, a throttled update its elements over the rate, unless the real ones
    are slower by themselves.
    """
    link_bytes_per_s = float("inf") if throttle.link_gbps is None else throttle.link_gbps * 1e9
    updates_per_s = throttle.updates_per_s or float("inf")
    dtype = setting.config().runtime.payload_dtype
    layers = tuple(
        LayerCosts(
            forward_s=layer.forward_s,
            backward_s=layer.backward_s,
            d2h_s=max(layer.d2h_s, payload_bytes(size, dtype) / link_bytes_per_s),
            cpu_s=max(layer.cpu_s, size / updates_per_s),
            h2d_s=max(layer.h2d_s, payload_bytes(size, dtype) / link_bytes_per_s),
        )
        for layer, size in zip(free.layers, sizes, strict=True)
    )
    shard_of_layer = [0] * len(layers)
    policy = POLICIES[setting.policy](shard_of_layer)
    return Simulator(StepCosts(layers=layers, hop_s=HOP_S), policy, shard_of_layer, num_steps=10).run().typical.step_s


def planned_step_s(settings: Sequence[Setting], *, targets_a_row: int) -> dict[Setting, float]:
    """Measure this machine as `lsp_ray.plan --measure` does and forecast each setting's step."""
    config = settings[0].config()
    folder = resolve_config(config.model_name_or_path, log=lambda _line: None)
    model = shape_of(folder)
    work = Workload(
        method="lsp",
        batch_size=config.per_device_train_batch_size,
        seq_length=config.seq_length,
        typical_targets=config.per_device_train_batch_size * targets_a_row,
        bf16=True,
    )
    machine = measure(folder, model, work, device=torch.device("cpu"), device_threads=1)
    return {
        setting: forecast(
            model,
            replace(work, method=setting.method, subspace_dim=setting.dim),
            machine,
            None if setting.method == "native" else setting.policy,
        ).step_s
        for setting in settings
    }
