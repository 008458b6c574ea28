"""Where actors run on machines with several NUMA nodes, told by a tree of files as the kernel's."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lsp_ray.runtime.actors.numa_nodes import (
    NumaNode,
    cores_in,
    node_near,
    node_of_actor,
    nodes_of_shards,
    numa_nodes,
    run_on,
    threads_near,
)
from lsp_ray.runtime.prepare.layout import Layout

CARDS = {"0000:3b:00.0": "0", "0000:af:00.0": "1", "0001:00:1e.0": "-1"}
TWO = [NumaNode(index=0, cores=frozenset(range(8))), NumaNode(index=1, cores=frozenset(range(8, 16)))]


def tree(folder: Path, cpulists: Mapping[int, str]) -> Path:
    """A /sys with these nodes, and a card near each of the first two."""
    for node_index, cpulist in cpulists.items():
        node = folder / "devices" / "system" / "node" / f"node{node_index}"
        node.mkdir(parents=True)
        (node / "cpulist").write_text(f"{cpulist}\n")
    for pci, index in CARDS.items():
        card = folder / "bus" / "pci" / "devices" / pci
        card.mkdir(parents=True)
        (card / "numa_node").write_text(f"{index}\n")
    return folder


@given(cores=st.sets(st.integers(0, 200)), joined=st.booleans())
def test_the_kernels_lists_of_cores_are_read(cores: set[int], joined: bool) -> None:
    ranges: list[list[int]] = []
    for core in sorted(cores):
        if joined and ranges and ranges[-1][-1] == core - 1:
            ranges[-1].append(core)
        else:
            ranges.append([core])
    told = ",".join(str(own[0]) if len(own) == 1 else f"{own[0]}-{own[-1]}" for own in ranges)
    assert cores_in(f"{told}\n") == cores


def test_a_gpu_is_near_its_node_and_no_core_is_another_process_may_not_use(tmp_path: Path) -> None:
    system = tree(tmp_path, {0: "0-7,16-23", 1: "8-15,24-31", 2: "", 10: "32"})
    there = numa_nodes(range(4, 33), system)
    assert [node.index for node in there] == [0, 1, 10]  # memory without cores is no place to run
    assert there[0].cores == {4, 5, 6, 7, *range(16, 24)}
    assert str(there[1]) == "the 16 cores of NUMA node 1"
    near = [node_near(pci, there, system) for pci in CARDS]
    assert near == [there[0], there[1], None]
    assert node_near("0000:ff:00.0", there, system) is None
    assert node_near("", there, system) is None
    within_one = numa_nodes(range(8, 16), system)
    assert within_one == []
    beside = numa_nodes([8, 9, 32], system)  # a cpuset that the first card's node has no core of
    assert node_near("0000:3b:00.0", beside, system) is None


def test_a_machine_with_one_node_or_that_says_nothing_binds_nothing(tmp_path: Path) -> None:
    assert numa_nodes(range(8), tree(tmp_path / "one", {0: "0-7"})) == []
    assert numa_nodes(range(8), tmp_path / "nothing") == []
    assert numa_nodes(range(8), tree(tmp_path / "other", {0: "zero", 1: "0-7"})) == []
    assert nodes_of_shards([], 2, 4, {}) == [None, None]


@given(
    sizes=st.lists(st.integers(1, 16), min_size=2, max_size=8),
    num_shards=st.integers(1, 8),
    num_threads=st.integers(1, 16),
    taken=st.lists(st.integers(0, 16), min_size=8, max_size=8),
)
def test_shards_are_spread_and_their_threads_share_no_core(
    sizes: list[int], num_shards: int, num_threads: int, taken: list[int]
) -> None:
    there = [NumaNode(index=at, cores=frozenset(range(99 * at, 99 * at + size))) for at, size in enumerate(sizes)]
    chosen = nodes_of_shards(there, num_shards, num_threads, dict(enumerate(taken)))
    assert len(chosen) == num_shards
    counts = [chosen.count(node) for node in there]
    for node, count, gpu_threads in zip(there, counts, taken, strict=False):
        assert not count or count * num_threads + gpu_threads <= len(node.cores)
    assert max(counts) <= -(-num_shards // len(sizes))
    if all(size >= num_shards * num_threads + own for size, own in zip(sizes, taken, strict=False)):
        assert None not in chosen


def test_actors_have_their_node_where_their_threads_have_a_core_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cards = [SimpleNamespace(pci_domain_id=0, pci_bus_id=bus, pci_device_id=0) for bus in (0x3B, 0xAF)]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda gpu: cards[gpu])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    system = tree(tmp_path, {0: "0-7", 1: "8-15"})
    assert node_of_actor(TWO, 8, system) is TWO[0]
    assert node_of_actor(TWO, 9, system) is None
    assert node_of_actor([], 1, system) is None
    assert threads_near([], 2, 2, system) == {}
    assert threads_near(TWO, 1, 2, system) == {0: 2, 1: 0}
    assert threads_near(TWO, 5, 2, system) == {0: 2, 1: 2}  # the others are on other machines
    assert nodes_of_shards(TWO, 2, 7, {0: 2, 1: 0}) == [None, TWO[1]]
    del cards[0].pci_bus_id  # as of older versions of torch
    assert node_of_actor(TWO, 1, system) is None


def test_gpus_of_a_machine_are_counted() -> None:
    layout = Layout(device_threads=1, shard_threads=1, shard_of_unit=(0,), gpu_of_part=(0, 1, 2))
    assert layout.num_beside(0) == 3
    assert [replace(layout, nodes=("a", "b", "b")).num_beside(gpu) for gpu in range(3)] == [1, 2, 2]


@pytest.fixture
def affinities() -> Iterator[None]:
    """All threads run where they did, at the end."""
    before = os.sched_getaffinity(0)
    yield
    for thread in psutil.Process().threads():
        with suppress(ProcessLookupError):  # one that has been joined is gone a little later
            os.sched_setaffinity(thread.id, before)


@pytest.mark.usefixtures("affinities")
def test_a_process_keeps_to_cores_with_the_threads_that_it_has_and_will_have_and_gets_none_that_it_had_not() -> None:
    before, may_look = os.sched_getaffinity(0), threading.Event()
    found: list[set[int]] = []

    def look() -> None:
        may_look.wait()
        found.append(os.sched_getaffinity(0))

    started, later = threading.Thread(target=look), threading.Thread(target=look)
    started.start()
    foreign = max(before) + 1
    run_on([foreign])
    assert os.sched_getaffinity(0) == before
    run_on([min(before), foreign])
    later.start()
    may_look.set()
    for thread in (started, later):
        thread.join()
    assert [os.sched_getaffinity(0), *found] == [{min(before)}] * 3
