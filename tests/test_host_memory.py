from __future__ import annotations

import re
from pathlib import Path

import pytest

from lsp_ray.errors import ConfigError
from lsp_ray.runtime.host_memory import HostMemory, check_memory, read_host_memory
from lsp_ray.runtime.job import Job
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
