from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from lsp_ray.device.backend import CpuBackend, Fence
from lsp_ray.device.worker import DeviceWorker
from lsp_ray.schedule.ops import GradientReady
from tests.test_worker import LEARNING_RATES, batch, identity_units, square_llama


class AnnouncingBackend(CpuBackend):
    """Tells of payloads on a thread of its own, as on CUDA."""

    def __init__(self) -> None:
        self._announcer = ThreadPoolExecutor(1, thread_name_prefix="announce")

    def when_passed(self, fence: Fence, then: Callable[[], None]) -> Future[None]:
        return self._announcer.submit(then)


def worker_telling(on_gradients: Callable[[GradientReady], None]) -> DeviceWorker:
    model = square_llama()
    return DeviceWorker(
        model,
        identity_units(model),
        AnnouncingBackend(),
        learning_rates=LEARNING_RATES,
        weight_decay=0.0,
        seed=0,
        on_gradients=on_gradients,
    )


def test_what_fails_on_the_announcing_thread_fails_the_step() -> None:
    def fail(ready: GradientReady) -> None:
        raise ConnectionError(f"nobody was told of layer {ready.layer}")

    with pytest.raises(ConnectionError, match="nobody was told of layer 2"):
        worker_telling(fail).run_step(0, [batch(0)])


def test_a_step_ends_when_all_its_payloads_were_told_of() -> None:
    told: list[GradientReady] = []
    worker_telling(told.append).run_step(0, [batch(0)])
    assert [ready.layer for ready in told] == [2, 1, 0]
