"""What passes between the keepers of two machines: sums in place of parts, each delta once, whoever asks and in what
order. Both are in this process; `test_machines` has real ones."""

from __future__ import annotations

import socket
import threading
import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lsp_ray.config import PayloadDtype
from lsp_ray.errors import StaleSlotError, WorkerLostError
from lsp_ray.optim.codec import Codec
from lsp_ray.optim.parts import tree_sum
from lsp_ray.runtime.actors.keepers import Keepers
from lsp_ray.runtime.actors.node_keeper import Neighbours, NodeKeeper
from lsp_ray.runtime.cluster.nodes import Node
from lsp_ray.runtime.transport.line import Line, Lines
from lsp_ray.runtime.transport.network import HANDSHAKE_TIMEOUT_S
from lsp_ray.runtime.transport.slots import Bytes, OpenSlots, as_bytes, new_slot
from lsp_ray.sim.store import singly, sum_blocks

NUMEL = 700
HERE, THERE = "driver's", "other"


@dataclass
class OwnSlots:
    """A unit's slots in this process's memory."""

    unit: int
    codec: Codec
    parts: list[range]
    numel: int = NUMEL
    total: torch.Tensor = field(default_factory=lambda: torch.zeros(NUMEL))

    def __post_init__(self) -> None:
        wire = self.codec.wire_numel(self.numel)
        down = {
            own.start: new_slot(wire, "down", self.codec.dtype) if len(own) == 1 else new_slot(self.numel, "sum")
            for own in self.parts
        }
        self.opened = OpenSlots(down=down, up=new_slot(wire, "up", self.codec.dtype))

    def open(self) -> OpenSlots:
        return self.opened

    def open_total(self) -> torch.Tensor:
        return self.total


class CountingKeeper(NodeKeeper):
    """Notes what comes in and what goes out."""

    came: list[tuple[int, int]]
    went: int

    def put(self, step: int, unit: int, first: int, payload: Bytes) -> None:
        self.came = [*getattr(self, "came", []), (first, payload.nbytes)]
        super().put(step, unit, first, payload)

    def get(self, step: int, unit: int) -> Bytes:
        self.went = getattr(self, "went", 0) + 1
        return super().get(step, unit)


class Pair:
    """Keepers of two machines; the first has the shards, the second one computes the parts `own` of 4."""

    def __init__(self, payload_dtype: PayloadDtype, own: range, fewest: int) -> None:
        codec = Codec(payload_dtype)
        blocks = sum_blocks(own, 4, fewest)
        others = [range(part, part + 1) for part in range(4) if part not in own]
        self.home = OwnSlots(unit=0, codec=codec, parts=sorted([*others, *blocks], key=lambda block: block.start))
        self.away = OwnSlots(unit=0, codec=codec, parts=singly(own))
        self.keepers = {HERE: CountingKeeper("127.0.0.1"), THERE: CountingKeeper("127.0.0.1")}
        addresses = {name: keeper.address() for name, keeper in self.keepers.items()}
        for name, keeper in self.keepers.items():
            driver = None if name == HERE else HERE
            keeper.know(Neighbours(addresses=addresses, homes=[HERE], driver=driver))
        home: Any = [self.home]
        away: Any = [self.away]
        self.keepers[HERE].hold(home)
        self.index = self.keepers[THERE].serve_gpus(away, blocks)

    def line(self) -> Line:
        return Line(self.keepers[THERE].address())

    def write(self, part: int, step: int, values: torch.Tensor) -> None:
        slot = self.away.opened.down[part]
        self.away.codec.encode_(slot.to_write(), values)
        slot.publish(step)


@pytest.mark.parametrize(
    ("payload_dtype", "own", "expected"),
    [
        ("float32", range(2, 4), [(2, 4 * NUMEL)]),
        ("bfloat16", range(2, 4), [(2, 2 * NUMEL), (3, 2 * NUMEL)]),
        ("bfloat16", range(1, 4), [(1, 2 * NUMEL), (2, 2 * NUMEL), (3, 2 * NUMEL)]),
        ("bfloat16", range(4), [(0, 4 * NUMEL)]),
        ("int8", range(4), [(0, 4 * NUMEL)]),
    ],
)
def test_what_a_machine_computes_crosses_as_few_bytes_and_the_shard_reads_the_same_sum(
    payload_dtype: PayloadDtype, own: range, expected: list[tuple[int, int]]
) -> None:
    pair = Pair(payload_dtype, own, {"float32": 2, "bfloat16": 3, "int8": 4}[payload_dtype])
    values = torch.randn(4, NUMEL, generator=torch.Generator().manual_seed(0))
    codec = pair.home.codec
    wires = {part: new_slot(codec.wire_numel(NUMEL), "wire", codec.dtype) for part in range(4)}
    for part, wire in wires.items():
        codec.encode_(wire.to_write(), values[part])
    for step in range(2):
        for part in range(4):
            if part in own:
                pair.write(part, step, values[part])
                pair.line().ask("forward", pair.index, step, 0, part)
            else:
                slot = pair.home.opened.down[part]
                slot.to_write().copy_(wires[part].payload)
                slot.publish(step)
        codecs = [codec if len(block) == 1 else Codec() for block in pair.home.parts]
        read = [
            own_codec.decode(wire, NUMEL).float()
            for own_codec, wire in zip(codecs, pair.home.opened.gradients(step), strict=True)
        ]
        reference = tree_sum([codec.decode(wire.payload, NUMEL).float() for wire in wires.values()])
        assert torch.equal(tree_sum(read, [block.start for block in pair.home.parts]), reference)
    assert pair.keepers[HERE].came == [*expected, *expected]


def test_parts_that_are_sent_again_do_not_cross_again_and_one_that_is_missing_is_waited_for() -> None:
    pair = Pair("float32", range(2, 4), 2)
    line = pair.line()
    pair.write(2, 0, torch.ones(NUMEL))
    line.ask("forward", pair.index, 0, 0, 2)
    assert pair.home.opened.down[2].generation is None
    pair.write(3, 0, torch.ones(NUMEL))
    both = [threading.Thread(target=pair.line().ask, args=("forward", pair.index, 0, 0, part)) for part in (2, 3)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert pair.keepers[HERE].came == [(2, 4 * NUMEL)]
    assert torch.equal(pair.home.opened.down[2].to_read(0), torch.full((NUMEL,), 2.0))


def test_a_delta_comes_to_a_machine_once_however_many_ask_at_one_time() -> None:
    pair = Pair("bfloat16", range(2, 4), 3)
    up = pair.home.opened.up
    with pytest.raises(StaleSlotError, match="slot up holds no payload, expected step 0"):
        pair.line().ask("bring", pair.index, 0, 0)
    up.to_write().copy_(torch.arange(NUMEL))
    up.publish(0)
    asking = [threading.Thread(target=pair.line().ask, args=("bring", pair.index, 0, 0)) for _ in range(4)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert torch.equal(pair.away.opened.up.to_read(0), up.payload)
    assert pair.keepers[HERE].went == 2  # the first one was refused


def test_a_shards_sum_may_begin_elsewhere_and_one_machines_clock_is_told_by_the_others() -> None:
    pair = Pair("float32", range(2, 4), 2)
    total = torch.arange(NUMEL, dtype=torch.float32)
    pair.line().ask("begin_with", 0, as_bytes(total))
    assert torch.equal(pair.home.total, total)
    assert abs(pair.line().ask("offset_s")) < 0.1  # both are this process's
    assert Line(pair.keepers[HERE].address()).ask("offset_s") == 0.0


def test_who_asks_a_keeper_that_is_gone_is_told_and_a_slower_network_is_as_slow_as_asked() -> None:
    pair = Pair("float32", range(2, 4), 2)
    pair.write(2, 0, torch.ones(NUMEL))
    pair.write(3, 0, torch.ones(NUMEL))
    pair.keepers[THERE].keep_to({HERE: 4 * NUMEL / 0.2})
    start_s = time.monotonic()
    pair.line().ask("forward", pair.index, 0, 0, 3)
    assert time.monotonic() - start_s > 0.19
    line = pair.line()
    line.ask("clock")
    line._connection.close()
    with pytest.raises(WorkerLostError, match=r"^what passes payloads on at 127.0.0.1 is lost \(clock\)$"):
        line.ask("clock")


def test_strangers_who_say_nothing_keep_nobody_out() -> None:
    pair = Pair("float32", range(2, 4), 2)
    address = pair.keepers[THERE].address()
    strangers = [socket.create_connection((address.host, address.port)) for _ in range(3)]
    start_s = time.monotonic()
    pair.line().ask("clock")
    assert time.monotonic() - start_s < HANDSHAKE_TIMEOUT_S
    for stranger in strangers:
        stranger.close()


def test_what_comes_late_from_a_machine_that_was_given_up_is_refused() -> None:
    pair = Pair("float32", range(2, 4), 2)
    line = Line(pair.keepers[HERE].address())
    sums = [as_bytes(torch.full((NUMEL,), float(step))) for step in range(3)]
    for step in (1, 2, 2):
        line.ask("put", step, 0, 2, sums[step])
    with pytest.raises(StaleSlotError, match=r"^a payload of step 1 comes after that of step 2$"):
        line.ask("put", 1, 0, 2, sums[1])
    assert torch.equal(pair.home.opened.down[2].to_read(2), torch.full((NUMEL,), 2.0))


def test_a_thread_whose_keeper_was_lost_asks_the_next_time_by_another_connection() -> None:
    pair = Pair("float32", range(2, 4), 2)
    lines, address = Lines(), pair.keepers[THERE].address()
    lines.ask(address, "clock")
    lines._own.lines[address].close()
    with pytest.raises(WorkerLostError, match=r"^what passes payloads on at 127.0.0.1 is lost"):
        lines.ask(address, "clock")
    assert lines.ask(address, "clock") <= time.monotonic()


def test_a_gpu_that_finds_no_place_has_the_one_before_and_whoever_tries_again_is_told_the_same() -> None:
    names = ["a", "a", "b", "b"]
    nodes = {name: Node(id=name, name=name, ip=name, num_gpus=2, store_bytes=0, is_own=name == "a") for name in "abc"}
    keepers = Keepers.__new__(Keepers)
    layout = SimpleNamespace(nodes=names, gpu_of_part=(0, 1, 2, 3), name_of=lambda gpu: f"gpu-{gpu}")
    job: Any = SimpleNamespace(
        layout=layout, config=SimpleNamespace(replicas=4), codec=Codec(), has_parts_to_divide=False
    )
    gpus = [nodes[name] for name in names]
    places: Any = SimpleNamespace(gpus=gpus, find=lambda _gpu: (nodes["c"], [nodes["a"], nodes["c"]]))
    keepers._job, keepers._places = job, places
    for _ in range(2):
        with pytest.raises(WorkerLostError, match=r"^the machine of gpu-2 is lost, which adds up parts there$"):
            keepers.find_place(2)
        assert gpus[2] is nodes["b"]


@settings(deadline=None)
@given(data=st.data())
def test_whatever_is_added_up_before_the_sum_has_the_bits_of_all_parts(data: Any) -> None:
    num_parts = data.draw(st.integers(1, 17))
    cuts = sorted(data.draw(st.sets(st.integers(1, num_parts - 1), max_size=4)) if num_parts > 1 else [])
    fewest = data.draw(st.integers(2, 5))
    values = data.draw(st.lists(st.floats(-1e3, 1e3, width=32), min_size=num_parts, max_size=num_parts))
    parts = [torch.tensor([value]) for value in values]
    blocks = [
        block
        for first, end in zip([0, *cuts], [*cuts, num_parts], strict=True)
        for block in sum_blocks(range(first, end), num_parts, fewest)
    ]
    assert [part for block in blocks for part in block] == list(range(num_parts))
    assert all(len(block) == 1 or len(block) >= fewest for block in blocks)
    begun = [tree_sum([parts[part] for part in block]) for block in blocks]
    whole = tree_sum(parts)
    assert torch.equal(tree_sum(begun, [block.start for block in blocks]), whole)
    torch.testing.assert_close(whole, torch.stack(parts).sum(dim=0), rtol=1e-4, atol=1e-2)
