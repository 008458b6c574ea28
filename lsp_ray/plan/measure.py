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
from torch.nn.functional import embedding_bag

from lsp_ray.optim.adamw import AdamWHyper, AdamWState, adamw_delta_
from lsp_ray.plan.block_pace import block_pace
from lsp_ray.sim.device_work import ADAMW_BYTES
from lsp_ray.sim.hardware_profile import HardwareProfile
from lsp_ray.sim.model_shape import ModelShape
from lsp_ray.sim.workload import Workload

HOP_S = 0.0008  # a call to an actor and back, Ray 2.60 on 2 cores; starting Ray to measure it would take too long
_MIN_RUNS = 3
_ELEMENTS = 1 << 22  # of a copy or an update: beyond the caches
_SQUARE = 512  # side of a shard's whitening product


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
        folder: Holds the model's config.json: the device's rates are brought to the pace of two of its blocks.
        model: Products are measured in the shape of its most common linear.
        workload: Gives tokens, rows that a gather adds up, and the type for the pace.
        device: What computes.
        device_threads: For the device; where that is a GPU its launches get them.
        budget_s: Of each of a dozen rates; by default everything stays under 20 s.
    """
    rates = _rates(model, workload, _Timer(device=device, budget_s=budget_s), device_threads)
    with _threads(device_threads):
        pace = block_pace(folder, workload, rates, device)
    return replace(
        rates,
        device_bf16_flops=rates.device_bf16_flops / pace,
        device_float32_flops=rates.device_float32_flops / pace,
        device_bytes_per_s=rates.device_bytes_per_s / pace,
    )


def _rates(model: ModelShape, workload: Workload, timer: _Timer, device_threads: int) -> HardwareProfile:
    """Each rate by itself."""
    device, host = timer.device, replace(timer, device=torch.device("cpu"))
    cores = len(os.sched_getaffinity(0))
    with torch.inference_mode():
        with _threads(device_threads):
            bf16_flops, float32_flops = (_product_flops(model, workload.tokens, timer, dtype) for dtype in _DTYPES)
            device_bytes = _device_bytes_per_s(timer)
            gather_bytes = _gather_bytes_per_s(model, workload, timer)
        with _threads(1):
            d2h, h2d = (_copy_bytes_per_s(timer, down=down, pinned=True) for down in (True, False))
            pageable = _copy_bytes_per_s(timer, down=False, pinned=False)
            core_bytes, core_flops = _adamw_bytes_per_s(host), _square_flops(host)
        with _threads(cores):
            host_bytes = _adamw_bytes_per_s(host)
    host_memory = float(psutil.virtual_memory().total)
    on_gpu = device.type == "cuda"
    return HardwareProfile(
        name="measured",
        on_gpu=on_gpu,
        device_memory_bytes=float(torch.cuda.get_device_properties(device).total_memory) if on_gpu else host_memory,
        device_bf16_flops=bf16_flops,
        device_float32_flops=float32_flops,
        device_bytes_per_s=device_bytes,
        gather_bytes_per_s=gather_bytes,
        d2h_bytes_per_s=d2h,
        h2d_bytes_per_s=h2d,
        pageable_fraction=min(1.0, pageable / h2d) if on_gpu else 1.0,
        shared_link_rate=_shared_link_rate(timer, d2h, h2d) if on_gpu else 1.0,
        host_memory_bytes=host_memory,
        host_bytes_per_s=max(host_bytes, core_bytes),
        core_bytes_per_s=core_bytes,
        core_float32_flops=core_flops,
        num_cores=cores,
        hop_s=HOP_S,
    )


_DTYPES = (torch.bfloat16, torch.float32)


def _product_flops(model: ModelShape, tokens: int, timer: _Timer, dtype: torch.dtype) -> float:
    """Operations a second of X Wᵀ in the shape of the linear that takes most of the model's products."""
    linears = [linear for layer in model.layers for linear in layer.linears]
    linear = max(set(linears), key=lambda linear: (linears.count(linear) * linear.numel, linear.rows))
    input_TN = torch.randn(tokens, linear.columns, device=timer.device).to(dtype)
    weight_MN = torch.randn(linear.rows, linear.columns, device=timer.device).to(dtype)
    return 2.0 * tokens * linear.numel / timer.seconds(lambda: input_TN @ weight_MN.t())


def _device_bytes_per_s(timer: _Timer) -> float:
    """A sum of two tensors into a third: three bytes moved for each byte of one."""
    left, right = (torch.zeros(_ELEMENTS, device=timer.device) for _ in range(2))
    total = torch.empty_like(left)
    return 3.0 * left.nbytes / timer.seconds(lambda: torch.add(left, right, out=total))


def _gather_bytes_per_s(model: ModelShape, workload: Workload, timer: _Timer) -> float:
    """What a projection does: rows of a table of (hidden, T) gathered and added up."""
    device, nnz_per_row = timer.device, workload.nnz_per_row
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    table_NT = torch.randn(model.hidden_size, workload.tokens, device=device).to(dtype)
    num_rows = model.hidden_size * nnz_per_row
    rows = torch.randint(model.hidden_size, (num_rows,), device=device)
    starts = torch.arange(0, num_rows, 2 * nnz_per_row, device=device)
    weights = torch.ones(num_rows, device=device, dtype=dtype)
    gathered = num_rows * table_NT[0].nbytes
    return gathered / timer.seconds(
        lambda: embedding_bag(rows, table_NT, starts, mode="sum", per_sample_weights=weights)
    )


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


def _adamw_bytes_per_s(timer: _Timer) -> float:
    """The update as a shard makes it, by the bytes that the cost model counts for an element."""
    grad, delta = torch.ones(_ELEMENTS), torch.empty(_ELEMENTS)
    state, hyper = AdamWState.zeros(_ELEMENTS), AdamWHyper()

    def update() -> None:
        torch.dot(grad, grad)
        adamw_delta_(delta, grad, state, learning_rate=1e-4, hyper=hyper)

    return ADAMW_BYTES * _ELEMENTS / timer.seconds(update)


def _square_flops(timer: _Timer) -> float:
    square_DD = torch.randn(_SQUARE, _SQUARE)
    return 2.0 * _SQUARE**3 / timer.seconds(lambda: square_DD @ square_DD)


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
