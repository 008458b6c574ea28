from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray
from hypothesis import HealthCheck, settings

from lsp_ray.process import keep_loaded
from lsp_ray.runtime.cluster.private_cluster import ray_cluster
from lsp_ray.runtime.cluster.ray_process import RayProcess

gc.disable()  # while all tests are imported

# how long an example takes says how busy the machine is, and nothing about the code
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")

_LONGEST = "test_machines.py"  # begun last, it would keep the other process waiting for minutes


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name != _LONGEST)


def pytest_collection_finish() -> None:
    keep_loaded()


def _shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """The suite's only Ray; at its end no process and no shared memory of it may be left."""
    segments_before = _shared_memory()
    with ray_cluster(num_actors=4, store_bytes=160 << 20):
        assert ray.is_initialized()
        yield
        # other children are Python's, and those that compile for torch
        own = [child for child in psutil.Process().children() if child.pid in RayProcess.started]
        started = [*own, *(process for child in own for process in child.children(recursive=True))]
    assert started
    _, alive = psutil.wait_procs(started, timeout=10)
    assert not alive
    assert _shared_memory() <= segments_before
