from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import ray

from lsp_ray.config import GaloreConfig, Method, PayloadDtype
from lsp_ray.device.shared_weights import CAN_SHARE
from lsp_ray.errors import ConfigError
from lsp_ray.plan.options import PlanConfig, PlanLspConfig, PlanRuntimeConfig
from lsp_ray.plan.plan import workload_of
from lsp_ray.plan.skeleton import shape_of
from lsp_ray.runtime.actors.thread_workers import ThreadWorkers
from lsp_ray.runtime.prepare.host_memory import HostMemory, check_memory, read_host_memory, store_bytes_at
from lsp_ray.runtime.prepare.job import Job, laid_out
from lsp_ray.runtime.prepare.machines import Machine
from lsp_ray.runtime.transport.unit_slots import new_undo, new_unit_slots
from lsp_ray.sim.memory import host_memory
from lsp_ray.sim.store import SPARE_BYTES, singly
from lsp_ray.sim.workload import ON_QUANTIZED
from tests.tiny_jobs import tiny_job

PLENTY = 1 << 40


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return tiny_job(tmp_path_factory.mktemp("job"))


def test_a_job_fits_into_exactly_what_it_needs_and_not_into_a_byte_less(job: Job) -> None:
    main_bytes = job.store_bytes + 4 * job.num_weights
    check_memory(job, HostMemory(main_bytes=main_bytes, shared_bytes=job.store_bytes))
    with pytest.raises(ConfigError, match=r"^model_name_or_path must fit, .* main memory .* needed at least\), got '"):
        check_memory(job, HostMemory(main_bytes=main_bytes - 1, shared_bytes=PLENTY))
    with pytest.raises(ConfigError, match=r"^method must fit its slots into .* shared memory .* needed\), got 'lsp'"):
        check_memory(job, HostMemory(main_bytes=PLENTY, shared_bytes=job.store_bytes - 1))


def test_weights_that_stay_in_main_memory_count_and_are_counted(tmp_path: Path) -> None:
    for bits in (dict[str, Any](), {"load_in_4bit": True, "bf16": True}):
        held = tiny_job(tmp_path, runtime={"weights": "host"}, **bits)
        workers = ThreadWorkers(held)
        workers.setup(lambda _text: None)
        weights = workers.side.worker.weights
        assert weights is not None
        blocks = [tensor.nbytes for tensor in weights.host_bytes]
        workers.close()
        padding = sum(blocks) - held.streamed_bytes
        assert 0 <= padding < 14 * 6 * 256, "each of a linear's tensors begins at a multiple of 256 bytes"
        needed = held.store_bytes + (held.streamed_bytes if bits else 4 * held.num_weights)
        check_memory(held, HostMemory(main_bytes=needed, shared_bytes=PLENTY))
        with pytest.raises(ConfigError, match=r"^model_name_or_path must fit"):
            check_memory(held, HostMemory(main_bytes=needed - 1, shared_bytes=PLENTY))


def test_frozen_weights_that_stay_are_counted_once_for_all_gpus(tmp_path: Path) -> None:
    alone, together = (
        tiny_job(tmp_path, load_in_4bit=True, bf16=True, num_replicas=3, runtime={"weights": "host", "num_gpus": num})
        for num in (1, 3)
    )
    assert together.streamed_bytes == alone.streamed_bytes > 0
    needed = together.store_bytes + (1 if CAN_SHARE else 3) * together.streamed_bytes
    check_memory(together, HostMemory(main_bytes=needed, shared_bytes=PLENTY))
    with pytest.raises(ConfigError, match=r"^model_name_or_path must fit"):
        check_memory(together, HostMemory(main_bytes=needed - 1, shared_bytes=PLENTY))


def test_both_figures_are_in_the_line(job: Job) -> None:
    with pytest.raises(ConfigError) as caught:
        check_memory(job, HostMemory(main_bytes=PLENTY, shared_bytes=64 << 20))
    assert re.findall(r"[\d.]+ GB", str(caught.value)) == ["0.07 GB", f"{job.store_bytes / 1e9:.2f} GB"]


def test_a_containers_limit_counts_without_its_page_cache(tmp_path: Path) -> None:
    for name, content in (("max", "1000"), ("current", "700"), ("stat", "anon 500\ninactive_file 150\n")):
        (tmp_path / f"memory.{name}").write_text(content)
    assert read_host_memory(cgroup=tmp_path).main_bytes == 450
    (tmp_path / "memory.max").write_text("max\n")
    assert read_host_memory(cgroup=tmp_path).main_bytes > 450


def test_without_shared_memory_there_is_none(tmp_path: Path) -> None:
    assert read_host_memory(shared_memory=tmp_path / "nothing").shared_bytes == 0


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    ("payload_dtype", "changes"),
    [
        ("bfloat16", {}),
        ("int8", {}),
        ("bfloat16", {"load_in_4bit": True}),
        ("int8", {"load_in_4bit": True}),
        ("int8", {"max_grad_norm": 1.0}),
        ("float32", {"on_nonfinite": "skip"}),
    ],
)
@pytest.mark.parametrize("method", get_args(Method))
def test_the_shared_memory_forecast_is_what_a_run_allocates(
    tmp_path_factory: pytest.TempPathFactory, method: Method, changes: dict[str, Any], payload_dtype: PayloadDtype
) -> None:
    folder = tmp_path_factory.getbasetemp() / "forecast"
    folder.mkdir(exist_ok=True)
    runtime: dict[str, Any] = {"num_shards": 2, "payload_dtype": payload_dtype}
    if changes.get("load_in_4bit") and method not in ON_QUANTIZED:
        return
    other = tiny_job(folder, method=method, galore=GaloreConfig(rank=8), runtime=runtime, **changes)
    sums = other.sums or [None] * len(other.payload_sizes)
    pairs = [
        new_unit_slots(unit, numel, other.codec, parts)
        for unit, (numel, parts) in enumerate(zip(other.payload_sizes, sums, strict=True))
    ]
    slots = {ref for pair in pairs for ref in (*pair.down, pair.up, pair.state) if ref is not None}
    for index in range(other.layout.num_shards):
        owned = [pairs[unit] for unit in other.layout.units_of(index)]
        slots |= set(new_undo(owned, is_shared=not other.speculates).values())
    assert other.store_bytes == sum(ray.get(slot).nbytes for slot in slots) + SPARE_BYTES
    if method in ("lora", "galore"):  # the planner does not know them
        return
    asked = PlanConfig(
        hardware="rtx3060",
        lsp=PlanLspConfig(subspace_dim=16, nnz_per_row=2),
        runtime=PlanRuntimeConfig(shard_threads=1, **runtime),
        **changes,
    )
    model = shape_of(other.model_folder)
    work = replace(workload_of(asked, num_units=len(model.layers), cores=2, on_gpu=False), method=method)
    assert host_memory(model, work, on_gpu=False).object_store == other.store_bytes


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("shard_nodes", ["driver", "all"])
@pytest.mark.parametrize(("payload_dtype", "blocks"), [("float32", [(0, 2), (2, 4)]), ("bfloat16", None)])
def test_each_machines_store_is_counted_as_its_slots_are_made(
    tmp_path: Path, shard_nodes: str, payload_dtype: PayloadDtype, blocks: list[tuple[int, int]] | None
) -> None:
    runtime = {"payload_dtype": payload_dtype, "num_gpus": 4, "address": "auto", "shard_nodes": shard_nodes}
    there = [Machine(name=name, num_gpus=2, cores=4, has_bf16=True) for name in "ab"]
    job = laid_out(tiny_job(tmp_path, num_replicas=4, runtime=runtime), there)
    assert job.layout.homes == (("a", "b") if shard_nodes == "all" else ("",))
    sent = [range(*block) for block in blocks] if blocks else singly(range(4))
    for number, name in enumerate("ab"):
        own = range(2 * number, 2 * number + 2)
        alone = singly(own)
        read = [*alone, *(block for block in sent if block.start not in own)]
        here = [unit for unit, home in enumerate(job.layout.home_of_unit) if home == number]
        made = [
            new_unit_slots(unit, numel, job.codec, None, read if unit in here else alone, has_state=unit in here)
            for unit, numel in enumerate(job.payload_sizes)
        ]
        slots = {ref for unit in made for ref in (*unit.down, unit.up, unit.state) if ref is not None}
        for shard in range(job.layout.num_shards):
            owned = [made[unit] for unit in here if job.layout.shard_of_unit[unit] == shard]
            slots |= set(new_undo(owned, is_shared=not job.speculates).values()) if owned else set()
        counted = store_bytes_at(job, name, is_own=number == 0)
        assert counted == sum(ray.get(slot).nbytes for slot in slots) + SPARE_BYTES
        moved = [
            new_unit_slots(unit, numel, job.codec, None, singly(range(1)), has_state=False)
            for unit, numel in enumerate(job.payload_sizes)
            if unit not in here
        ]
        slots = {ref for unit in moved for ref in (*unit.down, unit.up)}
        with_another = store_bytes_at(job, name, is_own=number == 0, num_spare_gpus=1)
        assert with_another == counted + sum(ray.get(slot).nbytes for slot in slots)
