"""What holds for every policy whatever layers cost, and the transition layer against searches and formulas."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import astuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lsp_ray.schedule.delta_room import DeltaRoom
from lsp_ray.schedule.ops import CostsMeasured, LayerSeconds, Op
from lsp_ray.schedule.policy import POLICIES, Delayed, EarliestDeadline, Lane, Layerwise, LayerwiseFcfs, Policy
from lsp_ray.schedule.transition import transition_layer
from lsp_ray.trace import WorkStream
from tests.timeline import Ran, Timeline

NUM_STEPS = 5
WAY = (WorkStream.D2H, WorkStream.CPU, WorkStream.H2D)
SECONDS = st.integers(0, 12).map(float)  # whole numbers: sums are exact, and ties happen
LAYERS = st.lists(
    st.builds(LayerSeconds, forward_s=SECONDS, backward_s=SECONDS, d2h_s=SECONDS, cpu_s=SECONDS, h2d_s=SECONDS),
    min_size=1,
    max_size=7,
)


def alike(num_layers: int, **seconds: float) -> list[LayerSeconds]:
    """Layers that all cost the same; what is not given costs nothing."""
    nothing = dict.fromkeys(("forward_s", "backward_s", "d2h_s", "cpu_s", "h2d_s"), 0.0)
    return [LayerSeconds(**(nothing | seconds))] * num_layers


def timeline(policy: Policy, shards: list[int], layers: list[LayerSeconds]) -> Timeline:
    line = Timeline(policy=policy, shard_of_layer=shards, layers=layers, num_steps=NUM_STEPS)
    line.run()
    return line


@st.composite
def workloads(draw: st.DrawFn) -> tuple[list[LayerSeconds], list[int]]:
    layers = draw(LAYERS)
    return layers, draw(st.lists(st.integers(0, 2), min_size=len(layers), max_size=len(layers)))


@pytest.mark.parametrize("name", POLICIES)
@given(workload=workloads(), depth=st.integers(1, 3))
@settings(deadline=None)
def test_every_layer_goes_down_is_updated_and_comes_up_once_a_step(
    name: str, workload: tuple[list[LayerSeconds], list[int]], depth: int
) -> None:
    layers, shards = workload
    line = timeline(POLICIES[name](shards, depth=depth), shards, layers)
    ran = {one.op: one for one in line.ran}
    assert len(line.ran) == len(ran) == 3 * NUM_STEPS * len(layers)
    for step in range(NUM_STEPS):
        for layer in range(len(layers)):
            down, update, up = (ran[Op(stream=stream, step=step, layer=layer)] for stream in WAY)
            assert down.end_s <= update.start_s
            assert update.end_s <= up.start_s


@pytest.mark.parametrize("name", POLICIES)
@given(workload=workloads())
@settings(deadline=None)
def test_every_delta_is_added_once_in_the_step_that_the_staleness_names_and_never_before_it_is_up(
    name: str, workload: tuple[list[LayerSeconds], list[int]]
) -> None:
    layers, shards = workload
    policy = POLICIES[name](shards)
    line = timeline(policy, shards, layers)
    late = 1 + policy.staleness
    expected = [(step - late, layer, step) for step in range(late, NUM_STEPS) for layer in range(len(layers))]
    assert [(one.delta_step, one.layer, one.step) for one in line.applied] == expected
    up_s = {(one.op.step, one.op.layer): one.end_s for one in line.ran if one.op.stream is WorkStream.H2D}
    assert all(one.at_s >= up_s[one.delta_step, one.layer] for one in line.applied)


@pytest.mark.parametrize("name", POLICIES)
@given(workload=workloads(), depth=st.integers(1, 3), chance=st.data())
@settings(deadline=None)
def test_what_waits_on_the_device_stays_within_its_room_and_every_delta_is_added_in_its_turn(
    name: str, workload: tuple[list[LayerSeconds], list[int]], depth: int, chance: st.DataObject
) -> None:
    layers, shards = workload
    sizes = chance.draw(st.lists(st.integers(1, 9), min_size=len(layers), max_size=len(layers)))
    room = DeltaRoom(sizes=tuple(sizes), num_bytes=2 * max(sizes) + chance.draw(st.integers(0, 9)))
    policy = POLICIES[name](shards, depth=depth, room=room)
    line = timeline(policy, shards, layers)
    assert len(line.ran) == len({one.op for one in line.ran}) == 3 * NUM_STEPS * len(layers)
    late = 1 + policy.staleness
    steps = range(late, NUM_STEPS + late)
    expected = [(step - late, layer, min(step, NUM_STEPS)) for step in steps for layer in range(len(layers))]
    assert [(one.delta_step, one.layer, one.step) for one in line.applied] == expected
    changes = [(one.start_s, sizes[one.op.layer]) for one in line.ran if one.op.stream is WorkStream.H2D]
    changes += [(one.at_s, -sizes[one.layer]) for one in line.applied]
    held = 0
    for _, change in sorted(changes):
        held += change
        assert held <= room.num_bytes


@given(workload=workloads())
@settings(deadline=None)
def test_a_room_for_all_deltas_changes_nothing(workload: tuple[list[LayerSeconds], list[int]]) -> None:
    layers, shards = workload
    room = DeltaRoom(sizes=(1,) * len(layers), num_bytes=3 * len(layers))
    free, bounded = (timeline(LayerwiseFcfs(shards, room=room), shards, layers) for room in (None, room))
    assert bounded.ran == free.ran
    assert bounded.applied[: len(free.applied)] == free.applied


@pytest.mark.parametrize("name", POLICIES)
@given(workload=workloads(), depth=st.integers(1, 3))
@settings(deadline=None)
def test_no_slot_is_written_before_its_content_was_read(
    name: str, workload: tuple[list[LayerSeconds], list[int]], depth: int
) -> None:
    layers, shards = workload
    ran = {one.op: one for one in timeline(POLICIES[name](shards, depth=depth), shards, layers).ran}
    for op, one in ran.items():
        if op.step > 0 and op.stream is not WorkStream.H2D:
            reader = Op(stream=WAY[WAY.index(op.stream) + 1], step=op.step - 1, layer=op.layer)
            assert one.start_s >= ran[reader].end_s


def test_only_delayed_is_stale_and_its_update_runs_beside_the_next_step() -> None:
    assert {name for name, policy in POLICIES.items() if policy.staleness} == {"delayed"}
    layers = alike(4, forward_s=1.0, backward_s=2.0, d2h_s=1.0, cpu_s=2.0, h2d_s=1.0)
    ends_s = {}
    for name in ("sequential", "delayed"):
        ends_s[name] = timeline(POLICIES[name]([0] * 4), [0] * 4, layers).applied[-1].at_s
    assert Delayed.staleness == 1
    # sequential: 4 × (forward 4, backward 8, the last way down 1, updates 8, the first way up 1), then the other 3 up
    assert ends_s == {"sequential": 4 * 22.0 + 3, "delayed": 4 * 12.0 + 3}


@given(workload=workloads(), depth=st.integers(1, 3))
@settings(deadline=None)
def test_first_come_first_served_serves_every_lane_in_order_of_arrival(
    workload: tuple[list[LayerSeconds], list[int]], depth: int
) -> None:
    layers, shards = workload
    lanes: defaultdict[Lane, list[Ran]] = defaultdict(list)
    for one in timeline(LayerwiseFcfs(shards, depth=depth), shards, layers).ran:
        lanes[one.op.stream, shards[one.op.layer] if one.op.stream is WorkStream.CPU else 0].append(one)
    for ran in lanes.values():
        arrivals_s = [one.ready_s for one in ran]
        assert arrivals_s == sorted(arrivals_s)


@given(workload=workloads())
@settings(deadline=None)
def test_earliest_deadline_never_starts_a_layer_while_a_shallower_one_waits(
    workload: tuple[list[LayerSeconds], list[int]],
) -> None:
    layers, shards = workload
    ran = timeline(EarliestDeadline(shards, depth=1), shards, layers).ran
    for one in ran:
        for other in ran:
            same_lane = one.op.stream is other.op.stream and (
                one.op.stream is not WorkStream.CPU or shards[one.op.layer] == shards[other.op.layer]
            )
            overtaken = other.ready_s < one.start_s < other.start_s
            if same_lane and overtaken:
                assert (one.op.step, one.op.layer) < (other.op.step, other.op.layer)


@pytest.mark.parametrize("stream", ["d2h_s", "cpu_s", "h2d_s"])
@given(num_layers=st.integers(2, 40), backward_s=SECONDS, slower_by=st.integers(1, 9), forward_s=SECONDS)
def test_of_layers_alike_all_overtake_if_one_stream_is_slower_than_the_backward(
    stream: str, num_layers: int, backward_s: float, slower_by: int, forward_s: float
) -> None:
    slow = {stream: backward_s + slower_by}
    layers = alike(num_layers, forward_s=forward_s, backward_s=backward_s, **slow)
    assert transition_layer(layers, [0] * num_layers) == num_layers


def test_the_transition_is_where_the_queue_begins_that_makes_a_layer_late() -> None:
    light, heavy = alike(3, backward_s=2.0, cpu_s=1.0), alike(3, backward_s=2.0, cpu_s=5.0)
    assert transition_layer([*heavy, *light], [0] * 6) == 3
    assert transition_layer([*heavy, *light], [0, 1, 2, 0, 0, 0]) == 0  # each heavy one has a shard of its own


def test_a_queue_of_deep_layers_that_makes_none_late_is_left_alone() -> None:
    light, heavy = alike(3, backward_s=4.0, cpu_s=1.0), alike(3, backward_s=1.0, cpu_s=3.0)
    assert transition_layer([*light, *heavy], [0] * 6) == 0


@given(layers=LAYERS)
@settings(deadline=None)
def test_layers_that_are_not_overtaken_make_none_late(layers: list[LayerSeconds]) -> None:
    shards = [0] * len(layers)
    transition = transition_layer(layers, shards)
    spared = [
        LayerSeconds(forward_s=layer.forward_s, backward_s=layer.backward_s, d2h_s=0.0, cpu_s=0.0, h2d_s=0.0)
        for layer in layers[transition:]
    ]
    with_deep, without = first_deltas_up_s(layers, shards), first_deltas_up_s(layers[:transition] + spared, shards)
    for layer in late_layers(layers, shards):
        assert with_deep[layer] == without[layer]


@given(workload=workloads())
def test_where_no_lane_is_slower_than_the_backward_no_layer_overtakes(
    workload: tuple[list[LayerSeconds], list[int]],
) -> None:
    layers, shards = workload
    slowest_s = max(max(layer.d2h_s, layer.cpu_s, layer.h2d_s) for layer in layers)
    even = [
        LayerSeconds(forward_s=layer.forward_s, backward_s=slowest_s, d2h_s=slowest_s, cpu_s=slowest_s, h2d_s=slowest_s)
        for layer in layers
    ]
    assert transition_layer(even, shards) == 0


@given(workload=workloads(), power=st.integers(-20, 20))
def test_the_transition_does_not_depend_on_the_unit_of_time(
    workload: tuple[list[LayerSeconds], list[int]], power: int
) -> None:
    layers, shards = workload
    scaled = [
        LayerSeconds(**dict(zip(LayerSeconds.__slots__, scaled_by(layer, power), strict=True))) for layer in layers
    ]
    assert transition_layer(scaled, shards) == transition_layer(layers, shards)


def scaled_by(layer: LayerSeconds, power: int) -> list[float]:
    return [seconds * 2.0**power for seconds in astuple(layer)]


@given(workload=workloads())
@settings(deadline=None)
def test_every_layer_that_an_executor_sees_late_overtakes_and_none_does_where_none_is_late(
    workload: tuple[list[LayerSeconds], list[int]],
) -> None:
    layers, shards = workload
    late, transition = late_layers(layers, shards), transition_layer(layers, shards)
    assert all(layer < transition for layer in late)
    assert bool(late) == (transition > 0)


def late_layers(layers: list[LayerSeconds], shards: list[int]) -> list[int]:
    """Layers whose delta, first come, first served, is up after their forward could start if none queued."""
    up_s, alone_s = (first_deltas_up_s(layers, shards, queues=queues) for queues in (True, False))
    start_s, late = 0.0, []
    for index, layer in enumerate(layers):
        start_s = max(start_s, alone_s[index])
        late += [index] if up_s[index] > start_s else []
        start_s += layer.forward_s
    return late


def first_deltas_up_s(layers: list[LayerSeconds], shards: list[int], *, queues: bool = True) -> list[float]:
    """When the deltas of one step are up after its backward began, by executing it; without queues, one layer a run."""
    forward_s = sum(layer.forward_s for layer in layers)
    runs = [list(range(len(layers)))] if queues else [[layer] for layer in range(len(layers))]
    up_s = [0.0] * len(layers)
    for owners in runs:
        costs = [
            layer
            if index in owners
            else LayerSeconds(forward_s=layer.forward_s, backward_s=layer.backward_s, d2h_s=0.0, cpu_s=0.0, h2d_s=0.0)
            for index, layer in enumerate(layers)
        ]
        line = Timeline(policy=LayerwiseFcfs(shards), shard_of_layer=shards, layers=costs, num_steps=1)
        line.run()
        for one in line.ran:
            if one.op.stream is WorkStream.H2D and one.op.layer in owners:
                up_s[one.op.layer] = one.end_s - forward_s
    return up_s


def test_layerwise_starts_from_the_middle_learns_the_transition_and_a_given_one_stays() -> None:
    layers = tuple(alike(32, forward_s=12.2, backward_s=28.1, d2h_s=22.0, cpu_s=60.0, h2d_s=22.0))
    learning, fixed = Layerwise([0] * 32), Layerwise([0] * 32, transition_layer=5)
    assert learning.transition_layer == 16
    for policy in (learning, fixed):
        assert policy.handle(CostsMeasured(step=0, layers=layers)) == []
    assert (learning.transition_layer, fixed.transition_layer) == (32, 5)


def test_the_learned_transition_makes_the_papers_steps_as_short_as_the_best_one() -> None:
    layers = alike(32, forward_s=12.2, backward_s=28.1, d2h_s=22.0, cpu_s=60.0, h2d_s=22.0)
    shards = [0] * 32

    def end_s(transition: int) -> float:
        return timeline(Layerwise(shards, transition_layer=transition), shards, layers).applied[-1].at_s

    found = end_s(transition_layer(layers, shards))
    assert found == min(end_s(transition) for transition in range(33))
    assert found < end_s(0)
