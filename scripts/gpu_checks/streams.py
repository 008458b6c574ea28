"""Checks of a backend: streams, fences, buffers, slots, events. What each promises stands in device/backend.py."""

from __future__ import annotations

import gc
import time
from functools import partial

import torch

from lsp_ray.runtime.transport.slots import Slot, new_slot
from lsp_ray.trace import WorkStream
from scripts.gpu_checks.check import Bench, Check, require

BUSY_PRODUCTS = 20  # tens of milliseconds on a large GPU, some tenths of a second on a small one
NUM_REUSED = 32
COPY_SHARE = 0.5  # of the compute beside it: a copy that is not done by then waited for the compute


def stream_checks(bench: Bench) -> list[tuple[str, Check]]:
    """All of them, by name."""
    return [
        ("page-locked slots", partial(page_locking, bench)),
        ("copies wait for the compute they need", partial(ordered_copies, bench)),
        ("copies run beside other compute", partial(copies_beside_compute, bench)),
        ("buffers are used again only when read", partial(reused_buffers, bench)),
        ("callbacks come in order, once passed", partial(callbacks, bench)),
        ("events time the compute stream", partial(event_times, bench)),
    ]


def page_locking(bench: Bench) -> str:
    """A slot's pages are locked where it lies; a second lock fails and harms nothing; memory is let go in the end."""
    slot = _slot(bench)
    is_locked = bench.backend.page_lock(slot.payload)
    require(is_locked == slot.payload.is_pinned(), f"page_lock says {is_locked}, torch the contrary")
    require(not bench.backend.page_lock(slot.payload), "locked pages could be locked again")
    # the kernel that the refusal must not reach
    require(float((torch.ones(8, device=bench.device) + 1).sum()) == 16.0, "a kernel after a refused lock is wrong")
    rates = [_rate(bench, slot, stream) for stream in (WorkStream.D2H, WorkStream.H2D)]
    del slot
    gc.collect()
    again = _slot(bench)
    require(bench.backend.page_lock(again.payload) == is_locked, "a second slot is not locked as the first was")
    state = "locked" if is_locked else "pageable (ulimit -l, or WSL2)" if bench.on_gpu else "no link, no lock"
    return f"{state}; {rates[0]:.1f} GB/s down, {rates[1]:.1f} up"


def ordered_copies(bench: Bench) -> str:
    """Down only after the compute that fills the buffer, up before the compute that reads it; no byte changes."""
    backend, numel = bench.backend, bench.sizes.copy_numel
    known = torch.arange(numel, dtype=torch.float32)
    on_device, slot = known.to(bench.device), _slot(bench)
    backend.page_lock(slot.payload)
    payload = backend.empty(WorkStream.GPU, numel, torch.float32)
    with backend.launch(WorkStream.GPU, writes=(payload,)):
        payload.zero_()
        _compute(bench)
        payload.copy_(on_device)
    backend.wait(WorkStream.D2H, backend.record(WorkStream.GPU))
    backend.copy_async(WorkStream.D2H, slot.payload, payload)
    backend.record(WorkStream.D2H).synchronize()
    require(torch.equal(slot.payload, known), "the slot does not hold what the compute wrote")
    delta = backend.empty(WorkStream.H2D, numel, torch.float32)
    backend.copy_async(WorkStream.H2D, delta, slot.payload)
    fence = backend.record(WorkStream.H2D)
    backend.wait(WorkStream.GPU, fence)
    with backend.launch(WorkStream.GPU, reads=(delta,)):
        doubled = delta * 2
    require(torch.equal(doubled.cpu(), known * 2), "the compute did not read what came up")
    return f"{4 * numel / 1e6:.0f} MB, both ways, every byte"


def copies_beside_compute(bench: Bench) -> str:
    """A copy that depends on nothing is done long before the compute submitted ahead of it."""
    backend, slot = bench.backend, _slot(bench)
    backend.page_lock(slot.payload)
    payload = backend.empty(WorkStream.D2H, slot.payload.numel(), torch.float32)
    _compute(bench)  # loads its kernels
    backend.record(WorkStream.GPU).synchronize()
    start_s = time.monotonic()
    with backend.launch(WorkStream.GPU):
        _compute(bench)
    computed = backend.record(WorkStream.GPU)
    backend.copy_async(WorkStream.D2H, slot.payload, payload)
    backend.record(WorkStream.D2H).synchronize()
    copied_s = time.monotonic() - start_s
    computed.synchronize()
    computed_s = time.monotonic() - start_s
    figure = f"copied after {1e3 * copied_s:.1f} ms, computed after {1e3 * computed_s:.1f} ms"
    require(not bench.on_gpu or copied_s < COPY_SHARE * computed_s, figure)
    return figure


def reused_buffers(bench: Bench) -> str:
    """A delta's memory goes to the next one only once the compute stream, which lags behind, has read it."""
    backend = bench.backend
    numel = max(1, bench.sizes.copy_numel // NUM_REUSED)
    slots = [new_slot(numel, f"check {index}") for index in range(NUM_REUSED)]
    with backend.launch(WorkStream.GPU):
        total = torch.zeros(numel, device=bench.device)
        _compute(bench)
    for index, slot in enumerate(slots):
        slot.payload.fill_(float(index))
        backend.page_lock(slot.payload)
        delta = backend.empty(WorkStream.H2D, numel, torch.float32)
        backend.copy_async(WorkStream.H2D, delta, slot.payload)
        backend.wait(WorkStream.GPU, backend.record(WorkStream.H2D))
        backend.hand_over(delta, WorkStream.GPU)
        with backend.launch(WorkStream.GPU, reads=(delta,)):
            total += delta
        del delta  # the compute stream has not come so far
    backend.record(WorkStream.GPU).synchronize()
    expected = torch.full((numel,), float(sum(range(NUM_REUSED))))
    require(torch.equal(total.cpu(), expected), "a buffer was written again before it was read")
    return f"{NUM_REUSED} deltas"


def callbacks(bench: Bench) -> str:
    """`when_passed` blocks nobody, calls in order, and hands on what fails."""
    backend, order = bench.backend, list[int]()
    with backend.launch(WorkStream.GPU):
        _compute(bench)
    told = [backend.when_passed(backend.record(WorkStream.GPU), partial(order.append, index)) for index in range(8)]
    was_early = len(order) < len(told)
    for future in told:
        future.result(timeout=60.0)
    require(order == list(range(8)), f"called in the order {order}")
    require(was_early or not bench.on_gpu, "the host waited for the device")
    return f"{len(order)} in order"


def event_times(bench: Bench) -> str:
    """Stamps around some compute say what the host's clock says around it and a wait."""
    backend = bench.backend
    _compute(bench)
    backend.record(WorkStream.GPU).synchronize()
    start_s, first = time.monotonic(), backend.stamp()
    _compute(bench)
    last = backend.stamp()
    backend.record(WorkStream.GPU).synchronize()
    host_s, stream_s = time.monotonic() - start_s, first.seconds_until(last)
    figure = f"{1e3 * stream_s:.2f} ms by events, {1e3 * host_s:.2f} ms by the host's clock"
    require(0.5 * host_s - 1e-3 <= stream_s <= host_s + 1e-3, figure)
    return figure


def _slot(bench: Bench) -> Slot:
    return new_slot(bench.sizes.copy_numel, "check")


def _compute(bench: Bench) -> torch.Tensor:
    """Keep the compute stream busy for a while."""
    square = torch.ones(bench.sizes.busy_side, bench.sizes.busy_side, device=bench.device)
    for _ in range(BUSY_PRODUCTS):
        square = (square @ square).clamp_(max=1.0)
    return square


def _rate(bench: Bench, slot: Slot, stream: WorkStream) -> float:
    """10⁹ bytes a second of a slot's copy, the second one."""
    backend = bench.backend
    buffer = backend.empty(stream, slot.payload.numel(), torch.float32)
    pair = (slot.payload, buffer) if stream is WorkStream.D2H else (buffer, slot.payload)
    taken_s = 0.0
    for _ in range(2):
        start_s = time.monotonic()
        backend.copy_async(stream, *pair)
        backend.record(stream).synchronize()
        taken_s = time.monotonic() - start_s
    return slot.payload.nbytes / max(taken_s, 1e-9) / 1e9
