"""The longest examples that fit, with blocks' inputs on the device or in main memory."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import get_args

from lsp_ray.config import Weights
from lsp_ray.schedule.block_ring import FEWEST_BUFFERS
from lsp_ray.sim.forecast import Forecast, forecast, needs_of
from lsp_ray.sim.hardware_profile import HardwareProfile
from lsp_ray.sim.memory import device_memory, host_memory, host_memory_elsewhere
from lsp_ray.sim.model_shape import ModelShape
from lsp_ray.sim.workload import Workload

_STEP, _MOST = 64, 1 << 20  # tokens; the latter where a model has no bound


@dataclass(frozen=True, slots=True, kw_only=True)
class Longest:
    """Tokens of an example at most, multiples of 64; 0: not so many.

    Attributes:
        device: With gradient checkpointing.
        host: With blocks' inputs in main memory as well.
        waits: Of a step of `host` tokens an example, the share that waits for inputs.
    """

    device: int
    host: int
    waits: float


def longest(model: ModelShape, row: Forecast, hardware: HardwareProfile, positions: int | None = None) -> Longest:
    """Return what fits with the row's method, batch and policy, for a model with so many positions at most."""
    most = min(_MOST, positions or _MOST)
    on_device, on_host = (_longest(model, row, hardware, home, most) for home in get_args(Weights))
    waits = 0.0
    if on_host:
        there = forecast(model, _work(row, "host", on_host), hardware, row.policy)
        waits = there.exposed.activations_s / there.step_s
    return Longest(device=on_device, host=on_host, waits=waits)


def _longest(model: ModelShape, row: Forecast, hardware: HardwareProfile, home: Weights, most: int) -> int:
    def is_too_long(multiple: int) -> bool:
        work = _work(row, home, multiple * _STEP)
        device = device_memory(model, work, row.device.payload_buffers)
        host = host_memory(model, work, on_gpu=hardware.on_gpu)
        elsewhere = host_memory_elsewhere(model, work, on_gpu=hardware.on_gpu)
        return not all(need.fits for need in needs_of(hardware, device.peak_bytes, host, elsewhere))

    return _STEP * bisect_left(range(1, most // _STEP + 1), True, key=is_too_long)


def _work(row: Forecast, home: Weights, length: int) -> Workload:
    work = replace(row.workload.full, seq_length=length, gradient_checkpointing=True, activations=home)
    return replace(work, weight_buffers=FEWEST_BUFFERS)  # what more of them take is what longer examples leave
