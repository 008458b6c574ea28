"""`lsp.subspace_dim auto` becomes a number that the run's link and shards hide."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lsp_ray.config import LspConfig
from lsp_ray.errors import ConfigError
from lsp_ray.plan.auto_dim import cluster_of, throttled, why_no_larger, with_subspace_dim
from lsp_ray.runtime.actors.throttle import Throttle
from lsp_ray.runtime.prepare.machines import Machine
from lsp_ray.sim.advice import largest_hidden_dim
from lsp_ray.sim.hardware_profile import load_hardware
from lsp_ray.sim.model_shape import LayerShape, LinearShape, ModelShape
from lsp_ray.sim.workload import Workload
from tests.tiny_jobs import tiny_config

AUTO = {"subspace_dim": "auto"}


def test_auto_becomes_half_the_small_side_where_that_is_hidden_and_the_type_is_kept(tmp_path: Path) -> None:
    notes: list[str] = []
    asked = tiny_config(tmp_path, lsp=AUTO, bf16=True)
    resolved = with_subspace_dim(asked, notes.append)
    assert resolved == replace(asked, lsp=replace(asked.lsp, subspace_dim=32))
    assert (
        notes[-1] == "lsp.subspace_dim auto: 32, half the small side of the largest matrix, which is the most there is"
    )


def test_what_would_be_late_with_a_larger_subspace_is_named() -> None:
    linear = LinearShape(rows=1024, columns=1024, input=0)
    layer = LayerShape(linears=(linear,) * 6, raw_numel=2048, is_block=True)
    model = ModelShape(
        layers=(layer,) * 4,
        num_parameters=4 * layer.numel,
        hidden_size=1024,
        attention_width=1024,
        repeated_width=0,
        num_logits=1000,
    )
    machine = replace(load_hardware("rtx4090-threadripper"), d2h_bytes_per_s=1e8)
    work = Workload(method="lsp", batch_size=4, seq_length=512, shard_threads=30)
    dim = largest_hidden_dim(model, work, machine)
    assert 32 <= dim < 512
    said = why_no_larger(model, replace(work, subspace_dim=dim), machine, "layerwise")
    assert re.fullmatch(
        rf"the largest that is hidden: {dim + 32} would expose \S+ s of a simulated step of \S+ s, mostly the way down",
        said,
    )


@pytest.mark.parametrize(
    ("num_gpus", "num_replicas", "seen"),
    [(None, None, (1, 1)), (None, 3, (1, 3)), (2, None, (2, 1)), (2, 5, (2, 3))],  # the one with most parts counts
)
def test_a_subspace_is_chosen_for_the_gpus_and_parts_of_the_run(
    tmp_path: Path, num_gpus: int | None, num_replicas: int | None, seen: tuple[int, int]
) -> None:
    runtime = {} if num_gpus is None else {"num_gpus": num_gpus}
    cluster = cluster_of(tiny_config(tmp_path, lsp=AUTO, num_replicas=num_replicas, runtime=runtime), "cpu")
    assert (cluster.gpus_per_node, cluster.parts_per_gpu, cluster.num_away) == (*seen, 0)


def test_where_other_machines_compute_a_subspace_has_to_be_a_number_before_anything_is_measured(tmp_path: Path) -> None:
    asked = replace(tiny_config(tmp_path, lsp=AUTO, runtime={"address": "auto"}), model_name_or_path="/nowhere")
    two = [Machine(name=name, num_gpus=0, cores=2, has_bf16=False) for name in "ab"]
    line = (
        "^lsp.subspace_dim must be a number where GPUs of other machines compute, as nobody has measured the network,"
    )
    with pytest.raises(ConfigError, match=line):
        with_subspace_dim(asked, lambda _line: None, two)
    alone = replace(asked, runtime=replace(asked.runtime, num_gpus=1))
    assert cluster_of(alone, "cpu", two).num_gpus == 1


@pytest.mark.parametrize("changes", [{"method": "native", "lsp": AUTO}, {"method": "zero_offload", "lsp": AUTO}, {}])
def test_a_run_without_an_open_subspace_is_left_as_it_is(tmp_path: Path, changes: dict[str, Any]) -> None:
    asked = replace(tiny_config(tmp_path, **changes), model_name_or_path="/nowhere")
    assert with_subspace_dim(asked, lambda _line: None) is asked


def test_a_subspace_that_is_still_open_is_no_number() -> None:
    with pytest.raises(ConfigError, match=r"^lsp.subspace_dim must be a number by now, got 'auto'$"):
        _ = LspConfig(subspace_dim="auto").dim
    assert LspConfig(subspace_dim=64).dim == 64


def test_a_throttle_slows_link_and_updates_and_makes_nothing_faster() -> None:
    machine = load_hardware("rtx3060")
    slow = throttled(machine, Throttle(link_gbps=1.0, updates_per_s=0.5e9), 56)
    assert (slow.d2h_bytes_per_s, slow.h2d_bytes_per_s, slow.host_bytes_per_s) == (1e9, 1e9, 28e9)
    assert throttled(machine, Throttle(link_gbps=1e3, updates_per_s=1e12), 56) == machine
    assert throttled(machine, Throttle(), 56) == machine
