"""`python -m tests.gpu_places --config FILE`: a run of `lsp_ray.run` on CPU actors that take the places of GPUs.

A CPU actor finds a place on any machine; here each takes one of those GPUs that a cluster says it has. Ends with the
code 1 where the run fails.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from lsp_ray.launch import _laid_out
from lsp_ray.run import parse
from lsp_ray.runtime.actors.decided import Decided, SetupReport
from lsp_ray.runtime.actors.gpu_actor import GpuActor
from lsp_ray.runtime.actors.ray_workers import RayWorkers
from lsp_ray.runtime.cluster.joined_cluster import joined_cluster
from lsp_ray.runtime.cluster.nodes import machines
from lsp_ray.runtime.persistence import fine_tune_persistently
from lsp_ray.runtime.prepare.job import Job, laid_out, prepare_job
from lsp_ray.runtime.training import NeverStop
from lsp_ray.runtime.transport.line import Way
from lsp_ray.runtime.transport.unit_slots import UnitSlots
from tests.tiny_jobs import Recorder


class InPlaceOfGpu(GpuActor):
    """What a GPU would do, on a CPU; of a machine with several NUMA nodes, as it says."""

    def __init__(self, job: Job, slots: Sequence[UnitSlots], gpu: int = 0, way: Way | None = None) -> None:
        super().__init__(replace(job, device="cpu"), slots, gpu, way)

    def setup(self, decided: Decided | None = None) -> SetupReport:
        return replace(super().setup(decided), places=(f"{self._name} runs on the 8 cores of NUMA node {self._gpu}",))


class InPlaceOfGpus(RayWorkers):
    """Whose GPU actors are such."""

    gpu_actor = InPlaceOfGpu


class Said(Recorder):
    """Says what it is told."""

    def note(self, text: str) -> None:
        print(text, flush=True)


def main() -> None:
    config = parse(sys.argv[1:])
    assert config.output_dir is not None
    out = Path(config.output_dir)
    out.mkdir()
    with joined_cluster(config.runtime.address or "auto") as there:
        found, listener = machines(there), Said()
        job = laid_out(replace(prepare_job(config, listener.note, None, found), device="cuda"), found)
        workers = partial(InPlaceOfGpus, note=listener.note, shared=out)
        fine_tune_persistently(job, workers, out, listener, str, NeverStop(), _laid_out)


if __name__ == "__main__":
    main()
