"""Several GPUs and nodes in a plan: what crosses and is kept, by hand; what is shown and refused."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from lsp_ray.config import PayloadDtype, ShardNodes
from lsp_ray.errors import ConfigError
from lsp_ray.plan.__main__ import main
from lsp_ray.plan.options import PlanConfig, PlanLspConfig, PlanRuntimeConfig
from lsp_ray.plan.plan import choices_of, make_plan, workload_of
from lsp_ray.plan.skeleton import shape_of
from lsp_ray.run import parse
from lsp_ray.sim.advice import largest_hidden_dim
from lsp_ray.sim.cluster import COPY_BYTES_PER_S, DRIVER_S, Cluster, arrivals
from lsp_ray.sim.cost_model import CostModel
from lsp_ray.sim.forecast import Forecast, forecast, simulate
from lsp_ray.sim.hardware_profile import load_hardware
from lsp_ray.sim.memory import host_memory, host_memory_elsewhere
from lsp_ray.sim.model_shape import ModelShape
from lsp_ray.sim.store import SPARE_BYTES, slot_bytes
from lsp_ray.sim.workload import Workload
from lsp_ray.trace import WorkStream
from scripts.sim_paper import llama

LLAMA_7B = llama(4096, 11008, 32, 32000)
SMALL = llama(1024, 2816, 6, 32000)
MACHINE = load_hardware("rtx4090-threadripper")
WORK = Workload(
    method="lsp", batch_size=4, seq_length=512, subspace_dim=256, nnz_per_row=8, num_shards=2, shard_threads=14
)


def on(work: Workload, num_nodes: int = 1, gpus_per_node: int = 1, gbit: float = 10.0) -> Workload:
    return replace(work, cluster=Cluster(num_nodes=num_nodes, gpus_per_node=gpus_per_node, network_gbit=gbit))


# costs


@pytest.mark.parametrize(("dtype", "kept", "a_part"), [("float32", 40, 14), ("bfloat16", 22, 12), ("int8", 14, 16)])
def test_a_shard_reads_every_further_part_beside_its_update_and_keeps_their_sum(
    dtype: PayloadDtype, kept: int, a_part: int
) -> None:
    work = replace(WORK, payload_dtype=dtype)
    alone, both, all_parts = (
        CostModel(model=LLAMA_7B, workload=on(work, 1, gpus), hardware=MACHINE).step().layers[1].cpu_s
        for gpus in (1, 2, 8)
    )
    element_s = 2 * work.payload_numel(LLAMA_7B.layers[1]) / MACHINE.host_bytes_per_s  # two shards share the memory
    assert both - alone == pytest.approx((kept + a_part) * element_s)
    assert all_parts - both == pytest.approx(6 * a_part * element_s)


@pytest.mark.parametrize(
    ("num_nodes", "gbit", "most"),
    [
        (2, 1.0, 1.0),
        (2, 40.0, COPY_BYTES_PER_S / (0.9 * 5e9)),  # what one connection reaches is less than the network
        (16, 10.0, 1.0),
    ],
)
@pytest.mark.parametrize("gpus", [1, 4])
def test_a_machine_sends_its_sum_and_gets_one_delta_over_its_part_of_the_homes_link(
    num_nodes: int, gbit: float, most: float, gpus: int
) -> None:
    work, layer = on(WORK, num_nodes, gpus, gbit), LLAMA_7B.layers[1]
    network = CostModel(model=LLAMA_7B, workload=work, hardware=MACHINE).step().network
    assert network is not None
    assert (network.away, network.at) == (num_nodes - 1, None)
    assert network.most == pytest.approx(most)
    numel, rate = WORK.payload_numel(layer), 0.9 * gbit * 1e9 / 8
    assert network.up_s[1] == pytest.approx(2 * numel / rate)
    assert network.down_s[1] == pytest.approx((4 if gpus == 4 else 2) * numel / rate), "a sum is float32"
    assert network.sum_s[1] == pytest.approx(4 * 12 * numel / MACHINE.core_bytes_per_s if gpus == 4 else 0.0)
    assert CostModel(model=LLAMA_7B, workload=on(WORK, 1, 8), hardware=MACHINE).step().network is None


@pytest.mark.parametrize(
    ("dtype", "gpus", "sent", "num_single", "num_sums"),
    [
        ("float32", 1, 4.0, 2, 0),
        ("float32", 2, 4.0, 2, 1),
        ("bfloat16", 2, 2 * 2.0, 4, 0),  # a sum of two is no fewer bytes
        ("bfloat16", 3, 3 * 2.0, 6, 0),  # parts 3 to 5 are no block, nor are 4 and 5 worth a sum
        ("bfloat16", 4, 4.0, 4, 1),
        ("bfloat16", 8, 4.0, 8, 1),
        ("int8", 4, 4.0, 4, 1),
        ("int8", 2, 2 * 66 / 64, 4, 0),
    ],
)
def test_parts_of_a_machine_leave_it_as_one_sum_where_that_is_fewer_bytes(
    dtype: PayloadDtype, gpus: int, sent: float, num_single: int, num_sums: int
) -> None:
    work, layer = on(replace(WORK, payload_dtype=dtype), 2, gpus), LLAMA_7B.layers[1]
    assert work.sent_bytes(layer) == pytest.approx(sent * work.payload_numel(layer), rel=1e-3)
    come = arrivals(work.cluster, dtype)
    assert (come.num_single, come.num_sums) == (num_single, num_sums)
    # the shard decodes and adds each that comes, a sum as float32
    kept, part = {"float32": (40, 14), "bfloat16": (22, 12), "int8": (14, 16)}[dtype]
    assert work.sum_bytes == kept + (num_single - 1) * part + num_sums * 14
    # where a GPU has several parts they may be divided by pace, and leave singly
    divided = replace(work, cluster=replace(work.cluster, parts_per_gpu=2))
    assert divided.sent_bytes(layer) == 2 * gpus * work.payload_bytes(layer)
    assert divided.summed_bytes(layer) == 0


def test_machines_that_are_no_block_of_the_tree_send_what_they_do_on_average() -> None:
    # of parts 6 to 11, four are a sum and two single; of 12 to 17 the first four, and the last two of all
    come = arrivals(Cluster(num_nodes=3, gpus_per_node=6), "bfloat16")
    assert (come.num_single, come.num_sums, come.sent_single, come.sent_sums) == (6 + 4, 2, 2.0, 1.0)


@pytest.mark.parametrize(
    ("shard_nodes", "num_nodes", "seconds"),
    [
        ("driver", 2, 3.0),  # what comes in is more than what goes out
        ("all", 2, 2.0 + 0.5),  # two layers' payloads, and the delta of the third
        ("driver", 3, 2 * 3.0),
        ("auto", 3, 2 * 1.0 + 2 * 0.5),
        ("auto", 4, 3 * 1.0 + 2 * 0.5),
    ],
)
def test_the_busiest_link_is_that_of_a_home(shard_nodes: ShardNodes, num_nodes: int, seconds: float) -> None:
    cluster = Cluster(num_nodes=num_nodes, network_gbit=8 / 0.9, shard_nodes=shard_nodes)  # 1 GB/s
    assert cluster.network_s([1e9] * 3, [0.5e9] * 3) == pytest.approx(seconds)
    slow = replace(cluster, network_gbit=1e6)
    # a connection to each other machine
    assert slow.network_s([1e9] * 3, [0.5e9] * 3) == pytest.approx(seconds / (3.0 * (num_nodes - 1)))
    assert Cluster().network_s([1e9], [1e9]) == 0.0


def test_shards_on_all_machines_divide_the_updates_and_the_network() -> None:
    step_s, network_s = (
        [
            getattr(
                forecast(
                    LLAMA_7B, replace(work, cluster=replace(work.cluster, shard_nodes=where)), MACHINE, "layerwise"
                ),
                name,
            )
            for where in ("driver", "all")
        ]
        for name in ("step_s", "network_s")
        for work in (on(replace(WORK, payload_dtype="float32"), 8, 1, 1.0),)
    )
    assert step_s[1] < 0.5 * step_s[0]
    # of two ways through a link with an eighth of all layers each, where one way took all of them
    assert network_s[1] == pytest.approx(network_s[0] / 4, rel=0.25), "34 layers are not eight times as many"
    assert forecast(LLAMA_7B, on(WORK, 8, 1, 1.0), MACHINE, "layerwise").workload.cluster.num_homes == 8
    assert forecast(LLAMA_7B, on(WORK, 2, 1, 1.0), MACHINE, "layerwise").workload.cluster.num_homes == 1


def test_copies_of_the_network_take_cores_from_updates() -> None:
    work, few = replace(WORK, payload_dtype="float32"), replace(MACHINE, num_cores=2)
    one, two = (
        CostModel(model=LLAMA_7B, workload=on(work, *shape), hardware=few).step().layers[1].cpu_s
        for shape in ((1, 2), (2, 1))
    )
    compute = CostModel(model=LLAMA_7B, workload=work, hardware=few).step()
    device_s = sum(layer.forward_s + layer.backward_s for layer in compute.layers)
    copied_s = 2 * sum(map(work.payload_bytes, LLAMA_7B.layers)) / COPY_BYTES_PER_S
    taken = copied_s / device_s / 2  # of two cores
    assert 0 < taken < 0.5
    assert two == pytest.approx(one / (1 - taken))


def test_copies_and_sums_of_all_machines_take_cores_from_their_own_updates() -> None:
    work, few = on(WORK, 3, 4), replace(MACHINE, num_cores=1)
    layers = LLAMA_7B.layers
    one, all_homes = (
        CostModel(model=LLAMA_7B, workload=own, hardware=few).step()
        for own in (replace(work, cluster=Cluster(gpus_per_node=4)), work)
    )
    device_s = sum(layer.forward_s + layer.backward_s for layer in one.layers)
    numel = sum(map(WORK.payload_numel, layers))
    copied_s = 2 * 2 / 3 * (2 + 4) * numel / COPY_BYTES_PER_S  # in and out: deltas, and sums
    added_s = 2 / 3 * 4 * 12 * numel / few.core_bytes_per_s
    left = 1 - (copied_s + added_s) / device_s
    assert 0.5 < left < 0.9
    of_one, of_all = WORK.update_bytes + 22 + 3 * 12, WORK.update_bytes + 22 + 3 * 12 + 2 * 14
    assert all_homes.layers[1].cpu_s == pytest.approx(one.layers[1].cpu_s * of_all / of_one / left)


def test_the_drivers_machine_has_all_states_of_a_star_and_each_machine_slots_of_its_own() -> None:
    ways, sums = (
        sum(slot_bytes(size(layer)) for layer in LLAMA_7B.layers)
        for size in (WORK.payload_bytes, lambda layer: 4 * WORK.payload_numel(layer))
    )
    four_by_two = replace(on(WORK, 2, 4), cluster=Cluster(num_nodes=2, gpus_per_node=4))
    alone, four, two, star = (
        host_memory(LLAMA_7B, work, on_gpu=True) for work in (WORK, on(WORK, 1, 4), on(WORK, 2, 1), four_by_two)
    )
    assert four.object_store - alone.object_store == 3 * ways
    assert two.object_store - alone.object_store == ways
    assert star.object_store - four.object_store == sums, "what comes of the other machine is one sum"
    assert four.weights == star.weights == 4 * alone.weights
    assert four.processes - alone.processes == 3 * 400e6
    assert star.processes - four.processes == two.processes - alone.processes == 200e6, "a keeper"
    elsewhere = host_memory_elsewhere(LLAMA_7B, four_by_two, on_gpu=True)
    assert elsewhere is not None
    assert elsewhere.object_store == SPARE_BYTES + 5 * ways
    assert elsewhere.processes == 4 * 400e6 + 200e6
    assert elsewhere.weights == 4 * alone.weights
    assert host_memory_elsewhere(LLAMA_7B, on(WORK, 1, 4), on_gpu=True) is None


def test_shards_on_all_machines_divide_states_and_each_machine_has_its_own_processes() -> None:
    star, spread = (
        (host_memory(LLAMA_7B, work, on_gpu=True), host_memory_elsewhere(LLAMA_7B, work, on_gpu=True))
        for where in get_args(ShardNodes)[1:]
        for work in [replace(WORK, cluster=Cluster(num_nodes=4, shard_nodes=where))]
    )
    assert star[1] is not None
    assert spread[1] is not None
    assert spread[0].processes == star[0].processes
    assert spread[1].processes == star[0].processes - 400e6, "without the driver"
    assert star[1].processes == 400e6 + 200e6
    both = [machine.object_store - SPARE_BYTES for machine in (spread[0], spread[1])]
    # a quarter of what the driver's machine has of a star, and slots of three quarters of the layers
    expected = 0.25 * (star[0].object_store - SPARE_BYTES) + 0.75 * (star[1].object_store - SPARE_BYTES)
    assert both == pytest.approx([expected] * 2, rel=0.05)
    needs = forecast(LLAMA_7B, replace(WORK, cluster=Cluster(num_nodes=4)), MACHINE, "layerwise").needs
    [shared] = [need for need in needs if need.where == "shared"]
    assert shared.needed_bytes == max(spread[0].object_store, spread[1].object_store)


def test_frozen_weights_that_stay_are_there_once_for_all_gpus_and_what_is_not_streamed_beside_them() -> None:
    work = replace(WORK, weights="host", apart=True, gradient_checkpointing=True, bits=4)
    one, two, four = (host_memory(LLAMA_7B, on(work, 1, num), on_gpu=True).weights for num in (1, 2, 4))
    head = 2 * LLAMA_7B.num_logits * LLAMA_7B.hidden_size
    assert two == four
    assert two - one == pytest.approx(head, rel=0.01), "and norms"


def test_a_gpu_that_computes_several_parts_sends_each_and_gets_one_delta() -> None:
    both = replace(WORK, cluster=Cluster(parts_per_gpu=2))
    assert both.tokens_per_step == 2 * WORK.tokens_per_step
    costs = [CostModel(model=LLAMA_7B, workload=work, hardware=MACHINE).step() for work in (both, on(WORK, 1, 2))]
    assert costs[0].layers == costs[1].layers
    spans = simulate(LLAMA_7B, both, MACHINE, "layerwise").spans
    num = Counter(span.stream for span in spans)
    assert num[WorkStream.D2H] == 2 * num[WorkStream.CPU] == 2 * num[WorkStream.H2D]
    found = forecast(LLAMA_7B, both, MACHINE, "layerwise")
    assert found.step_s == found.single_s > 1.9 * forecast(LLAMA_7B, WORK, MACHINE, "layerwise").step_s


def test_parts_that_a_gpu_computes_in_turn_cross_one_by_one_and_slices_have_homes_as_layers_do() -> None:
    both = replace(
        on(WORK, 2, 2, 1.0), cluster=Cluster(num_nodes=2, gpus_per_node=2, network_gbit=1.0, parts_per_gpu=2)
    )
    network = CostModel(model=LLAMA_7B, workload=both, hardware=MACHINE).step().network
    assert network is not None
    # of each of a machine's two GPUs one
    assert network.down_s[1] == pytest.approx(2 * network.up_s[1])
    assert both.cluster.num_homes == 1
    sliced = on(replace(WORK, shard_by="slice"), 4)
    spans = simulate(LLAMA_7B, sliced, MACHINE, "layerwise").spans
    updates = [span for span in spans if span.stream is WorkStream.CPU and span.step == 3]
    assert len(updates) == len(LLAMA_7B.layers)


def test_weights_that_come_up_share_the_link_with_lanes_to_all_homes() -> None:
    work = replace(WORK, batch_size=1, weights="host", apart=True, gradient_checkpointing=True)
    assert on(work, 3).cluster.num_homes == 3
    one, three = (simulate(LLAMA_7B, on(work, nodes, 1, 25.0), MACHINE, "layerwise").typical for nodes in (1, 3))
    assert one.exposed.weights_s > 0.2 * one.step_s
    assert three.step_s == pytest.approx(one.step_s, rel=0.05)
    assert three.exposed.weights_s == pytest.approx(one.exposed.weights_s, rel=0.05)


def test_a_driver_of_many_gpus_bounds_the_step() -> None:
    many = forecast(SMALL, on(WORK, 64, 8, 100.0), MACHINE, "layerwise")
    assert many.driver_s == pytest.approx((2 * 512 + 1) * len(SMALL.layers) * DRIVER_S)
    assert (many.step_s, many.bound) == (many.driver_s, "driver")
    assert forecast(SMALL, WORK, MACHINE, "layerwise").driver_s == 0


@pytest.mark.parametrize(
    ("work", "bound"),
    [
        (on(WORK, 1, 2), "gpu"),
        (on(WORK, 2, 1, 0.1), "network"),
        (on(WORK, 8, 8, 0.5), "network"),
        (on(replace(WORK, method="zero_offload"), 1, 8), "cpu"),
    ],
)
def test_what_bounds_a_step_is_named(work: Workload, bound: str) -> None:
    found = forecast(LLAMA_7B, work, MACHINE, "layerwise")
    assert found.bound == bound
    assert (found.efficiency > 0.98) == (bound == "gpu")


@given(
    num_nodes=st.integers(1, 6),
    gpus=st.integers(1, 4),
    gbit=st.sampled_from([0.5, 1.0, 10.0, 25.0]),
    dim=st.sampled_from([32, 128, 512]),
)
@settings(max_examples=25, deadline=None)
def test_several_gpus_are_no_more_than_as_many_times_one_and_a_faster_network_is_no_slower(
    num_nodes: int, gpus: int, gbit: float, dim: int
) -> None:
    work = on(replace(WORK, subspace_dim=dim), num_nodes, gpus, gbit)
    found = forecast(SMALL, work, MACHINE, "earliest_deadline")
    assert found.efficiency <= 1.005  # the order of two that come at one time may be luck
    assert found.tokens_per_s == pytest.approx(found.efficiency * work.cluster.num_gpus * work.tokens / found.single_s)
    faster = forecast(SMALL, on(work, num_nodes, gpus, 2 * gbit), MACHINE, "earliest_deadline")
    assert faster.step_s <= 1.02 * found.step_s


def test_a_slower_network_hides_a_smaller_d() -> None:
    dims = [largest_hidden_dim(LLAMA_7B, on(WORK, 4, 1, gbit), MACHINE) for gbit in (1.0, 4.0, 10.0)]
    assert dims == sorted(dims)
    assert dims[0] < dims[-1]
    bytes_of = [replace(WORK, payload_dtype=dtype) for dtype in ("float32", "bfloat16", "int8")]
    by_type = [largest_hidden_dim(LLAMA_7B, on(work, 4, 1, 1.0), MACHINE) for work in bytes_of]
    assert by_type == sorted(by_type)


def test_a_method_that_sends_nothing_has_one_gpu() -> None:
    with pytest.raises(ConfigError, match=r"^workload.cluster must be one GPU for native, got 2$"):
        simulate(SMALL, on(replace(WORK, method="native"), 2), MACHINE, None)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"num_nodes": 0}, "cluster.num_nodes must be at least 1, got 0"),
        ({"gpus_per_node": 0}, "cluster.gpus_per_node must be at least 1, got 0"),
        ({"network_gbit": math.nan}, "cluster.network_gbit must be a number above 0, got nan"),
    ],
)
def test_a_cluster_that_cannot_be_is_named(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Cluster(**changes)
    assert str(caught.value) == line


# the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration without weights."""
    path = tmp_path_factory.mktemp("llama")
    LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=6, num_attention_heads=16, vocab_size=32000
    ).save_pretrained(path)
    return path


def test_a_plan_for_several_nodes_shows_efficiency_and_bound_in_80_columns(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model_name_or_path", str(folder), "--hardware", "rtx4090-threadripper"]
    options += ["--num_gpus", "2", "--nodes", "16", "--network_gbit", "25", "--lsp.subspace_dim", "256"]
    assert main(options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "on 16 nodes of 2 GPUs at 25 Gbit/s, each GPU with the batch above:" in lines
    [head] = [line for line in lines if "efficiency  tokens/s" in line]
    rows = {line.split()[0]: line.rstrip() for line in lines[lines.index(head) + 2 :][:5]}
    assert list(rows) == ["native", "zero_offload", "lsp", "galore", "lora"]
    for method, row in rows.items():
        assert row.endswith("runs on one GPU") == (method not in ("lsp", "zero_offload"))
    [advised] = [line for line in lines if line.startswith("recommended: ")]
    assert advised.startswith("recommended: lsp with d = 256 in ")
    [command] = [line for line in lines if line.startswith("python -m lsp_ray.run")]
    run = parse(shlex.split(command)[3:])
    assert (run.num_replicas, run.runtime.address, run.runtime.num_gpus) == (32, "auto", "auto")
    assert run.runtime.shard_nodes == "auto", "which is all: as planned"
    assert [line for line in lines if line.startswith("host: of the driver's node; of others ")]
    assert "forecast alone" not in "".join(lines)
    shown = [line for line in lines if line not in (advised, command)]
    assert max(map(len, shown)) <= 80
    assert not [line for line in shown if "…" in line]


def test_one_gpu_is_planned_for_as_ever(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model_name_or_path", str(folder), "--hardware", "rtx4090-threadripper"]
    assert main(options) == 0
    plain = capsys.readouterr().out
    assert main([*options, "--num_gpus", "1", "--nodes", "1"]) == 0
    assert capsys.readouterr().out == plain
    assert "efficiency" not in plain
    assert "num_replicas" not in plain
    assert "runtime.address" not in plain


def test_a_plan_as_json_has_the_cluster_and_what_the_network_and_the_driver_take(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model_name_or_path", str(folder), "--hardware", "rtx4090-threadripper", "--json"]
    assert main([*options, "--num_gpus", "2", "--nodes", "3", "--network_gbit", "0.1"]) == 0
    content = json.loads(capsys.readouterr().out)
    rows = {row["method"]: row for row in content["methods"]}
    assert [rows[method]["num_gpus"] for method in rows] == [1, 6, 6, 1, 1]
    lsp, native = rows["lsp"], rows["native"]
    assert (lsp["num_nodes"], lsp["network_gbit"]) == (3, 0.1)
    assert (native["num_nodes"], native["network_gbit"], native["payload_dtype"]) == (1, None, None)
    assert lsp["busy_s"]["network"] > 0
    assert lsp["busy_s"]["driver"] > 0
    assert lsp["exposed_s"]["of_it_network_s"] > 0
    assert 0 < lsp["host_bytes_elsewhere"]["object_store"] < 1.1 * lsp["host_bytes"]["object_store"]
    assert native["host_bytes_elsewhere"] is None
    assert 0 < lsp["efficiency"] <= 1.005
    assert native["efficiency"] == 1
    assert lsp["bound"] in ("gpu", "d2h", "cpu", "h2d", "network", "driver")
    # so slow a network hides no d of 256 in bfloat16
    assert lsp["payload_dtype"] == "int8"
    assert "--runtime.payload_dtype int8" in content["command"]
    assert content["recommended"] == lsp


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--num_gpus", "0"], "error: num_gpus must be at least 1, got 0"),
        (["--nodes", "0"], "error: nodes must be at least 1, got 0"),
        (["--nodes", "2"], "error: network_gbit must be given with 2 nodes, got None; 1, 10 and 25 are common"),
        (["--nodes", "2", "--network_gbit", "0"], "error: network_gbit must be a number above 0, got 0.0"),
        (["--nodes", "2", "--network_gbit", "inf"], "error: network_gbit must be a number, got 'inf'"),
        (["--runtime.shard_nodes", "all"], "error: runtime.shard_nodes must be left out with one node, got 'all'"),
        (["--network_gbit", "10"], "error: network_gbit must be left out with one node, got 10.0"),
        (["--nodes", "129", "--network_gbit", "10"], "error: nodes must be at most 128, got 129"),
        (
            ["--nodes", "128", "--num_gpus", "9", "--network_gbit", "10"],
            "error: num_gpus must be at most 8, as there are 1024 GPUs at most, got 9",
        ),
        (
            ["--num_gpus", "2", "--method", "lora"],
            "error: method must be lsp or zero_offload with several GPUs, got 'lora'",
        ),
    ],
)
def test_a_cluster_that_cannot_be_planned_for_is_refused_in_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], line: str
) -> None:
    assert main(["--model_name_or_path", str(folder), "--hardware", "rtx3060", *options]) == 2
    assert capsys.readouterr().err == line + "\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU is to be measured")
def test_several_gpus_of_a_machine_without_one_are_refused_before_it_is_measured(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model_name_or_path", str(folder), "--measure", "--num_gpus", "2"]) == 2
    assert capsys.readouterr().err.endswith("error: num_gpus must be 1 on a machine without a GPU, got 2\n")


# the page

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "scaling.md").read_text(encoding="utf-8")
CHOICE = re.compile(r"d = (\d+), (\w+): ([\d.]+)")


@cache
def llama_7b() -> ModelShape:
    """With the units that a run sends; its configuration is transformers' own."""
    with TemporaryDirectory() as path:
        LlamaConfig().save_pretrained(path)
        return shape_of(Path(path))


def planned(**options: Any) -> Forecast:
    """What the page's machine makes of llama-7B."""
    config = PlanConfig(hardware="rtx4090-threadripper", max_seq_length=1024, method="lsp", **options)
    machine, model = config.machine, llama_7b()
    assert machine is not None
    work = workload_of(config, num_units=len(model.layers), cores=machine.num_cores, on_gpu=True)
    return make_plan(model, work, machine, choices_of(config)).advice.rows[0]


@pytest.mark.parametrize("num_nodes", [2, 8])
@pytest.mark.parametrize(("column", "gbit"), [(0, 1.0), (1, 10.0)])
def test_the_page_recommends_what_the_planner_does(num_nodes: int, column: int, gbit: float) -> None:
    [row] = re.findall(rf"^\| {num_nodes} \| (d = .*) \|$", PAGE, re.MULTILINE)
    dim, dtype, said = CHOICE.findall(row)[column]
    found = planned(nodes=num_nodes, network_gbit=gbit)
    assert (found.workload.subspace_dim, found.workload.payload_dtype) == (int(dim), dtype)
    assert found.efficiency == pytest.approx(float(said), abs=0.006)


@pytest.mark.parametrize("num_gpus", [8, 64, 512])
def test_the_page_says_of_many_gpus_what_the_planner_does(num_gpus: int) -> None:
    [row] = re.findall(rf"^\| {num_gpus} \|([\d. |]+)\|", PAGE.split("on paper")[1], re.MULTILINE)
    expected = [float(cell.strip() or 0) for cell in row.split("|")[:4]]
    network = {} if num_gpus == 8 else {"network_gbit": 25.0}
    runtime, lsp = PlanRuntimeConfig(payload_dtype="bfloat16"), PlanLspConfig(subspace_dim=256)
    found = planned(nodes=num_gpus // 8, num_gpus=8, lsp=lsp, runtime=runtime, **network)
    seen = found.network_s, found.busy_s[WorkStream.CPU], found.driver_s, found.efficiency
    assert seen == pytest.approx(expected, abs=0.006)
