"""The actors of a real run, but for the model: of random weights, made where it trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lsp_ray.runtime.actors.decided import Decided, SetupReport
from lsp_ray.runtime.actors.gpu_actor import GpuActor
from lsp_ray.runtime.actors.ray_workers import RayWorkers
from lsp_ray.runtime.cluster.private_cluster import ray_cluster
from lsp_ray.runtime.prepare.job import Job
from scripts.gpu_bench_parts.random_model import made_on


class RandomModelActor(GpuActor):
    """See `GpuActor`."""

    def setup(self, decided: Decided | None = None) -> SetupReport:
        """See `DeviceSide.setup`."""
        with made_on(torch.device(self._side.backend.device)):
            return super().setup(decided)


class RandomModelWorkers(RayWorkers):
    """See `RayWorkers`."""

    gpu_actor = RandomModelActor


@contextmanager
def ray_workers(job: Job) -> Iterator[RayWorkers]:
    """Start Ray and the job's actors, all gone at the end."""
    on_gpu = int(job.device == "cuda")
    with ray_cluster(num_actors=1 + job.layout.num_shards, num_gpus=on_gpu, store_bytes=job.store_bytes):
        workers = RandomModelWorkers(job)
        try:
            yield workers
        finally:
            workers.close()
