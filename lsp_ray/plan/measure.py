"""Measure this machine: the rates of a profile, each from what a step does.

The fastest of several runs counts: others may use the machine, too.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from lsp_ray.optim.codec import Codec
from lsp_ray.optim.shard import OptimizerShard
from lsp_ray.plan.block_pace import activation_bytes_per_s
from lsp_ray.projection.sparse_projector import ProjectorSizes, SparseProjector
from lsp_ray.sim.device_work import projection_work
from lsp_ray.sim.hardware_profile import HardwareProfile
from lsp_ray.sim.model_shape import LinearShape, ModelShape
from lsp_ray.sim.workload import Workload

HOP_S = 0.0002  # from an operation's end until the next began, on 2 cores; starting actors for it would take too long
_MIN_RUNS = 3
_ELEMENTS = 1 << 22  # of a copy: beyond the caches
_LEAST_SHARE = 0.1  # of a measured time that what remains of it is at least: clocks and shared machines are not exact
_STATE_ELEMENTS = 1 << 24  # of updates: a shard goes through all layers' state before it comes back to one


@dataclass(frozen=True, slots=True, kw_only=True)
class _Timer:
    """Times what runs on `device`, each action for about `budget_s`."""

    device: torch.device
    budget_s: float

    def seconds(self, action: Callable[[], object]) -> float:
        """Fastest seconds of an action, after one run that does not count."""
        self._once(action)
        taken_s: list[float] = []
        while len(taken_s) < _MIN_RUNS or sum(taken_s) < self.budget_s:
            taken_s.append(self._once(action))
        return min(taken_s)

    def _once(self, action: Callable[[], object]) -> float:
        start_s = time.perf_counter()
        action()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start_s


def measure(
    folder: Path,
    model: ModelShape,
    workload: Workload,
    *,
    device: torch.device,
    device_threads: int,
    budget_s: float = 0.4,
) -> HardwareProfile:
    """Return this machine's profile. The device is a GPU, or `device_threads` of the cores.

    Args:
        folder: Holds the model's config.json: two of its blocks tell what activations take.
        model: Products are measured in the shape of its most common linear.
        workload: Gives tokens, the projection that is measured, and the type.
        device: What computes.
        device_threads: For the device; where that is a GPU its launches get them.
        budget_s: Of each of a dozen rates; by default everything stays under 20 s.
    """
    rates = _rates(model, workload, _Timer(device=device, budget_s=budget_s), device_threads)
    with _threads(device_threads):
        return replace(rates, activation_bytes_per_s=activation_bytes_per_s(folder, workload, rates, device))


def _rates(model: ModelShape, workload: Workload, timer: _Timer, device_threads: int) -> HardwareProfile:
    """Each rate by itself."""
    device, host = timer.device, replace(timer, device=torch.device("cpu"))
    cores = len(os.sched_getaffinity(0))
    with torch.inference_mode():
        with _threads(device_threads):
            bf16_flops, float32_flops = (_product_flops(model, workload.tokens, timer, dtype) for dtype in _DTYPES)
            device_bytes = _device_bytes_per_s(timer)
            block_flops = _block_flops(model, workload, timer, device_bytes)
        with _threads(1):
            d2h, h2d = (_copy_bytes_per_s(timer, down=down, pinned=True) for down in (True, False))
            pageable = _copy_bytes_per_s(timer, down=False, pinned=False)
            core_bytes = _update_bytes_per_s(model, workload, host)
        with _threads(cores):
            host_bytes = _update_bytes_per_s(model, workload, host)
    host_memory = float(psutil.virtual_memory().total)
    on_gpu = device.type == "cuda"
    return HardwareProfile(
        name="measured",
        on_gpu=on_gpu,
        device_memory_bytes=float(torch.cuda.get_device_properties(device).total_memory) if on_gpu else host_memory,
        device_bf16_flops=bf16_flops,
        device_float32_flops=float32_flops,
        block_flops=block_flops,
        device_bytes_per_s=device_bytes,
        activation_bytes_per_s=device_bytes,
        d2h_bytes_per_s=d2h,
        h2d_bytes_per_s=h2d,
        pageable_fraction=min(1.0, pageable / h2d) if on_gpu else 1.0,
        shared_link_rate=_shared_link_rate(timer, d2h, h2d) if on_gpu else 1.0,
        host_memory_bytes=host_memory,
        host_bytes_per_s=max(host_bytes, core_bytes),
        core_bytes_per_s=core_bytes,
        num_cores=cores,
        hop_s=HOP_S,
    )


_DTYPES = (torch.bfloat16, torch.float32)


def _product_flops(model: ModelShape, tokens: int, timer: _Timer, dtype: torch.dtype) -> float:
    """Operations a second of X Wᵀ in the shape of the linear that takes most of the model's products."""
    linear = _common_linear(model)
    input_TN = torch.randn(tokens, linear.columns, device=timer.device).to(dtype)
    weight_MN = torch.randn(linear.rows, linear.columns, device=timer.device).to(dtype)
    return 2.0 * tokens * linear.numel / timer.seconds(lambda: input_TN @ weight_MN.t())


def _device_bytes_per_s(timer: _Timer) -> float:
    """A sum of two tensors into a third: three bytes moved for each byte of one."""
    left, right = (torch.zeros(_ELEMENTS, device=timer.device) for _ in range(2))
    total = torch.empty_like(left)
    return 3.0 * left.nbytes / timer.seconds(lambda: torch.add(left, right, out=total))


def _common_linear(model: ModelShape) -> LinearShape:
    linears = [replace(linear, input=0) for layer in model.layers for linear in layer.linears]
    return max(set(linears), key=lambda linear: (linears.count(linear) * linear.numel, linear.rows))


def _block_flops(model: ModelShape, workload: Workload, timer: _Timer, device_bytes_per_s: float) -> float:
    """Of X Q in a run's type; what it moves, at the device's rate, is taken off."""
    linear, device = _common_linear(model), timer.device
    dtype = torch.bfloat16 if workload.bf16 else torch.float32
    nnz_per_row = min(workload.nnz_per_row, linear.small_side)
    sizes = ProjectorSizes.of((linear.rows, linear.columns), workload.subspace_dim, nnz_per_row)
    factor = SparseProjector.random(sizes, torch.Generator().manual_seed(0)).to(device, dtype).right
    input_TN = torch.randn(workload.tokens, linear.columns, device=device).to(dtype)
    taken_s = timer.seconds(lambda: factor.project(input_TN))
    work = projection_work(replace(workload, nnz_per_row=nnz_per_row), linear.columns, factor.dim)
    return work.block_flops / max(taken_s - work.moved_bytes / device_bytes_per_s, _LEAST_SHARE * taken_s)


def _copy_bytes_per_s(timer: _Timer, *, down: bool, pinned: bool) -> float:
    host, other = _copy_pair(timer.device, pinned=pinned)
    target, source = (host, other) if down else (other, host)
    return host.nbytes / timer.seconds(lambda: target.copy_(source))


def _shared_link_rate(timer: _Timer, d2h_bytes_per_s: float, h2d_bytes_per_s: float) -> float:
    """How fast copies are that run in both directions at once, over what they are alone."""
    device = timer.device
    (host_down, from_device), (host_up, to_device) = (_copy_pair(device, pinned=True) for _ in range(2))
    down, up = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def both() -> None:
        with torch.cuda.stream(down):
            host_down.copy_(from_device, non_blocking=True)
        with torch.cuda.stream(up):
            to_device.copy_(host_up, non_blocking=True)

    alone_s = max(host_down.nbytes / d2h_bytes_per_s, host_up.nbytes / h2d_bytes_per_s)
    return min(1.0, max(0.5, alone_s / timer.seconds(both)))


def _copy_pair(device: torch.device, *, pinned: bool) -> tuple[torch.Tensor, torch.Tensor]:
    host = torch.zeros(_ELEMENTS, pin_memory=pinned and device.type == "cuda")
    return host, torch.zeros(_ELEMENTS, device=device)


def _update_bytes_per_s(model: ModelShape, workload: Workload, timer: _Timer) -> float:
    """The update as a shard makes it, from slot to slot, by the bytes that the cost model counts for an element.

    As many layers as the largest one in turn as are beyond the caches.
    """
    numel = min(_STATE_ELEMENTS, max(map(workload.payload_numel, model.layers)))
    layers = range(_STATE_ELEMENTS // numel)
    codec = Codec(workload.payload_dtype)
    shard, undo = (OptimizerShard(dict.fromkeys(layers, numel), codec=codec) for _ in range(2))
    down, up = (torch.zeros(len(layers), codec.wire_numel(numel), dtype=codec.dtype) for _ in range(2))

    def update() -> None:
        for layer in layers:
            undo.states[layer].copy_(shard.states[layer])
            shard.update(layer, [down[layer]], up[layer], learning_rate=1e-4)

    merged = replace(workload, bits=None, apart=False)  # as this shard keeps no sum
    return merged.update_bytes * numel * len(layers) / timer.seconds(update)


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
