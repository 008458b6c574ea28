"""Several GPUs and machines: times worked out by hand, and what holds for all costs."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from dataclasses import make_dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lsp_ray.errors import ConfigError
from lsp_ray.schedule.delta_room import DeltaRoom
from lsp_ray.schedule.policy import POLICIES
from lsp_ray.sim.costs import HostShares, LayerCosts, NetworkCosts, StepCosts
from lsp_ray.sim.simulation import Simulation
from lsp_ray.sim.simulator import Simulator
from lsp_ray.trace import WorkStream

ORDERED = sorted(name for name, policy in POLICIES.items() if policy.staleness == 0)
LAYER = LayerCosts(forward_s=1.0, backward_s=2.0, apply_s=0.5, d2h_s=0.25, cpu_s=4.0, h2d_s=0.125)
ALONE_S = 3.0 + 0.5 + 0.25 + 4.0 + 0.125


def simulate(
    costs: StepCosts,
    *,
    gpu_of_part: tuple[int, ...] = (0,),
    policy: str = "layerwise",
    num_shards: int = 1,
    num_homes: int = 1,
    num_steps: int = 4,
) -> Simulation:
    """`num_shards` are those of each machine that has any; layers are at home on these in turn."""
    owners = [layer % (num_shards * num_homes) for layer in range(len(costs.layers))]
    homes = [shard % num_homes for shard in owners]
    decides = POLICIES[policy](owners, gpu_of_part=gpu_of_part, home_of_layer=homes)
    return Simulator(costs, decides, owners, num_steps=num_steps).run()


def network(*down_s: float, **how: Any) -> NetworkCosts:
    """A delta takes as long as what a machine sends."""
    return NetworkCosts(down_s=down_s, up_s=down_s, **how)


# one GPU


def test_a_step_of_one_gpu_is_to_the_last_bit_what_it_was_before_there_were_several() -> None:
    dice, digest = random.Random(1), hashlib.sha256()
    Late = make_dataclass("Exposed", ["d2h_s", "cpu_s", "h2d_s"])

    def seconds() -> float:
        return dice.choice([0.0, round(dice.random() * 3, 3), dice.random()])

    for _ in range(20):
        layers = tuple(
            LayerCosts(
                forward_s=seconds(),
                backward_s=seconds(),
                apply_s=seconds(),
                d2h_s=seconds(),
                cpu_s=seconds(),
                h2d_s=seconds(),
            )
            for _ in range(dice.randint(1, 9))
        )
        costs = StepCosts(
            layers=layers,
            loss_s=seconds(),
            num_micro_batches=dice.randint(1, 3),
            hop_s=dice.choice([0.0, 0.01]),
            shared_link_rate=dice.choice([1.0, 0.75, 0.5]),
            waits_for_all=dice.random() < 0.2,
        )
        owners = [dice.randrange(3) for _ in layers]
        room = dice.choice([None, DeltaRoom(sizes=(1,) * len(layers), num_bytes=3)])
        for name in (None, *sorted(POLICIES)):
            done = Simulator(costs, POLICIES[name](owners, room=room) if name else None, owners, num_steps=4).run()
            spans = [(span.stream, span.step, span.layer, span.start_s, span.end_s) for span in done.spans]
            late = [Late(step.exposed.d2h_s, step.exposed.cpu_s, step.exposed.h2d_s) for step in done.steps]
            steps = [(step.step, step.step_s, own, step.busy_s) for step, own in zip(done.steps, late, strict=True)]
            digest.update(repr((spans, done.waits, steps)).encode())
    assert digest.hexdigest() == "83ff17059bcfc1332e700c7b58c8ae0a1d602d2fee1e3aaca8e461b6b778665b"


# several GPUs


@pytest.mark.parametrize("name", ORDERED)
@pytest.mark.parametrize("num_gpus", [2, 3])
def test_gpus_that_do_the_same_at_one_time_take_a_step_as_long_as_one(name: str, num_gpus: int) -> None:
    costs = StepCosts(layers=(LAYER, replace(LAYER, d2h_s=1.0), LAYER), loss_s=8.0, num_micro_batches=2)
    alone, together = (
        simulate(costs, policy=name, gpu_of_part=tuple(range(count)), num_shards=2) for count in (1, num_gpus)
    )
    assert [step.step_s for step in together.steps] == pytest.approx([step.step_s for step in alone.steps])
    assert [step.busy_s for step in together.steps] == [pytest.approx(step.busy_s) for step in alone.steps]


def test_a_gpu_computes_its_parts_one_after_the_other_and_the_update_waits_for_all() -> None:
    costs = StepCosts(layers=(LAYER,))
    steps_s = [step.step_s for step in simulate(costs, gpu_of_part=(0, 0, 0)).steps]
    # the first payloads go down beside the parts that follow
    assert steps_s == [9.0, *[9.0 + ALONE_S - 3.0] * 3]


def test_a_step_ends_with_the_slowest_gpu_and_the_fast_one_waits_for_its_payload() -> None:
    costs = StepCosts(layers=(LAYER,))
    done = simulate(costs, gpu_of_part=(0, 0, 1))
    assert [step.step_s for step in done.steps] == [6.0, *[6.0 + ALONE_S - 3.0] * 3]
    begun = [wait.start_s for wait in done.waits if wait.step == 0]
    assert sorted(begun) == [3.0, 6.0]
    # of the GPU that ends the step: not the three seconds in which the other waits for its payload
    assert done.typical.exposed.d2h_s == 0.25
    assert done.typical.busy_s[WorkStream.GPU] == 6.5


def test_copies_and_updates_that_ask_for_more_than_the_host_moves_slow_down_alike() -> None:
    shares = HostShares(d2h=1.5, cpu=0.5, h2d=4.0)
    free = StepCosts(layers=(LAYER,))
    steps_s = [simulate(costs).typical.step_s for costs in (free, replace(free, host=shares))]
    assert steps_s[1] - steps_s[0] == pytest.approx(0.5 * 0.25 + 3.0 * 0.125)
    fits = replace(free, host=HostShares(d2h=0.3, cpu=0.3, h2d=0.3))
    assert simulate(fits).typical.step_s == steps_s[0]
    # layer 1's update, alone for half a second, then runs beside layer 0's way down: each at two thirds
    layers = (replace(LAYER, backward_s=0.5), replace(LAYER, d2h_s=0.0, cpu_s=1.0))
    both = StepCosts(layers=layers, host=HostShares(d2h=1.0, cpu=0.5, h2d=0.1))
    ends_s = {(span.stream, span.layer): span.end_s for span in simulate(both, num_steps=1, num_shards=2).spans}
    assert ends_s[WorkStream.D2H, 0] == pytest.approx(4.5 + 0.25 * 1.5)
    assert ends_s[WorkStream.CPU, 1] == pytest.approx(5.0 + 0.25 * 0.5)


# several machines


@pytest.mark.parametrize("policy", ORDERED)
def test_a_payload_crosses_after_its_link_and_a_delta_before_it(policy: str) -> None:
    done = simulate(StepCosts(layers=(LAYER,), network=network(8.0, at=(0, 1))), gpu_of_part=(0, 1), policy=policy)
    assert [step.step_s for step in done.steps] == [3.0, *[ALONE_S + 8.0 + 8.0] * 3]
    late = done.typical.exposed
    assert (late.d2h_s, late.cpu_s, late.h2d_s) == (0.25 + 8.0, 4.0, 8.0 + 0.125)
    last = {(span.stream, span.part): span.end_s - span.start_s for span in done.spans}
    assert [last[WorkStream.D2H, part] for part in (0, 1)] == [0.25, 8.25]
    assert [last[WorkStream.H2D, gpu] for gpu in (0, 1)] == [0.125, 8.125]


@pytest.mark.parametrize(("num_away", "most", "slower"), [(2, 1.0, 2.0), (5, 1.0, 5.0), (2, 0.25, 4.0), (5, 0.25, 5.0)])
@pytest.mark.parametrize("is_one", [True, False])
def test_machines_without_shards_share_the_homes_link_and_none_gets_more_than_its_connection_reaches(
    num_away: int, most: float, slower: float, is_one: bool
) -> None:
    gpus = (0,) if is_one else tuple(range(1 + num_away))
    who: dict[str, Any] = {"away": num_away} if is_one else {"at": gpus}
    done = simulate(StepCosts(layers=(LAYER,), network=network(8.0, most=most, **who)), gpu_of_part=gpus)
    assert done.typical.step_s == pytest.approx(ALONE_S + 2 * slower * 8.0)


def test_who_comes_to_the_network_while_another_is_on_it_halves_its_rate() -> None:
    # GPU 1 computes two parts: its first payload is on the network beside GPU 2's only one, its second one alone
    costs = StepCosts(layers=(replace(LAYER, d2h_s=1.0),), network=network(2.0, at=(0, 1, 2)))
    done = simulate(costs, gpu_of_part=(0, 1, 1, 2), num_steps=1)
    ends_s = {span.part: span.end_s for span in done.spans if span.stream is WorkStream.D2H}
    assert ends_s == {0: 4.0, 1: 3.0 + 1.0 + 4.0, 2: 8.0 + 1.0 + 2.0, 3: 3.0 + 1.0 + 4.0}


def test_a_link_is_free_for_the_other_way_while_a_payload_is_on_the_network() -> None:
    layers = (replace(LAYER, h2d_s=1.0, d2h_s=1.0), replace(LAYER, h2d_s=1.0, d2h_s=1.0))
    costs = StepCosts(layers=layers, network=network(50.0, 50.0), shared_link_rate=0.5)
    free = replace(costs, shared_link_rate=1.0)
    assert simulate(costs).typical.step_s == pytest.approx(simulate(free).typical.step_s)


def test_a_machine_adds_its_parts_up_before_they_cross_and_gets_its_delta_once() -> None:
    # four GPUs' parts, 2 s each, cross as a sum of 4 s, for which a core works 3 s; the delta takes 2 s for all of them
    costs = NetworkCosts(down_s=(4.0,), up_s=(2.0,), sum_s=(3.0,))
    done = simulate(StepCosts(layers=(LAYER,), network=costs))
    assert done.typical.step_s == pytest.approx(ALONE_S + 3.0 + 4.0 + 2.0)
    assert (done.typical.exposed.d2h_s, done.typical.exposed.h2d_s) == (0.25 + 3.0 + 4.0, 2.0 + 0.125)
    three = simulate(StepCosts(layers=(LAYER,), network=replace(costs, away=3)))
    assert three.typical.step_s == pytest.approx(ALONE_S + 3.0 + 3 * 4.0 + 3 * 2.0), "cores add up at one time"


# machines that all have shards

EASY = LayerCosts(forward_s=1.0, backward_s=0.0)  # what crosses is all that takes long


def crossings(costs: StepCosts, stream: WorkStream, **how: Any) -> list[tuple[float, float]]:
    """When what each layer sends, or gets, of the first step is on its way; deepest first, of part or GPU 0."""
    spans = [span for span in simulate(costs, num_steps=2, **how).spans if span.stream is stream and span.step == 0]
    own = {span.layer: (span.start_s, span.end_s) for span in spans if span.part == 0}
    return [own[layer] for layer in sorted(own, reverse=True)]


def test_payloads_to_different_homes_cross_at_one_time_each_filling_its_homes_link() -> None:
    # three machines: both that are elsewhere send a layer to its home at the same time
    costs = StepCosts(layers=(EASY,) * 3, network=NetworkCosts(down_s=(1.0,) * 3, up_s=(0.0,) * 3, away=2))
    assert crossings(costs, WorkStream.D2H, num_homes=3) == [(3.0, 5.0)] * 3
    # on the driver's machine one comes after the other
    assert crossings(costs, WorkStream.D2H) == [(3.0, 5.0), (5.0, 7.0), (7.0, 9.0)]


def test_of_two_homes_each_has_every_other_layer() -> None:
    costs = StepCosts(layers=(EASY,) * 4, network=NetworkCosts(down_s=(2.0,) * 4, up_s=(0.0,) * 4))
    assert crossings(costs, WorkStream.D2H, num_homes=2) == [(4.0, 6.0), (4.0, 6.0), (6.0, 8.0), (6.0, 8.0)]


def test_where_all_machines_are_homes_deltas_come_in_on_the_link_of_payloads() -> None:
    # layer 1's delta sets out at 6, when layer 0's payload has crossed half of its way, from a machine to another one
    layers = (EASY, replace(EASY, forward_s=0.0))
    costs = StepCosts(layers=layers, network=NetworkCosts(down_s=(10.0, 5.0), up_s=(0.0, 3.0)))
    both, star = (
        {
            (span.stream, span.layer): (span.start_s, span.end_s)
            for span in simulate(costs, num_steps=2, policy="layerwise_fcfs", num_homes=num_homes).spans
            if span.step == 0
        }
        for num_homes in (2, 1)
    )
    # each GPU is at home of one of two layers: half of the ways of the other direction share a link with one
    assert both[WorkStream.H2D, 1] == pytest.approx((6.0, 6.0 + 3.0 * 1.5))
    assert both[WorkStream.D2H, 0] == pytest.approx((1.0, 6.0 + 4.5 + (5.0 - 3.0)))
    assert star[WorkStream.H2D, 1] == pytest.approx((6.0, 9.0)), "a star's link carries payloads in and deltas out"
    assert star[WorkStream.D2H, 0] == (6.0, 16.0)


def test_of_machines_each_by_itself_a_layer_crosses_to_its_home_alone_and_both_ends_links_are_shared() -> None:
    costs = StepCosts(layers=(EASY,) * 2, network=network(2.0, 2.0, at=(0, 1)))
    done = simulate(costs, gpu_of_part=(0, 1), num_homes=2, num_steps=1)
    ways = {(span.stream, span.layer, span.part): span.end_s - span.start_s for span in done.spans}
    assert [ways[WorkStream.D2H, 0, part] for part in (0, 1)] == [0.0, 2.0]
    assert [ways[WorkStream.D2H, 1, part] for part in (0, 1)] == [2.0, 0.0]
    # of three machines one is at home nowhere: what it sends to both homes at one time shares its own link
    alone = StepCosts(layers=(EASY,) * 2, network=network(2.0, 2.0, at=(2,)))
    assert crossings(alone, WorkStream.D2H, num_homes=2) == [(2.0, 6.0)] * 2


def test_lanes_of_a_gpu_to_several_homes_share_its_link() -> None:
    layers = (replace(EASY, d2h_s=2.0),) * 3
    three = StepCosts(layers=layers, network=NetworkCosts(down_s=(0.0,) * 3, up_s=(0.0,) * 3, away=2))
    assert crossings(three, WorkStream.D2H, num_homes=3) == [(3.0, 9.0)] * 3
    assert crossings(replace(three, network=None), WorkStream.D2H, num_homes=3) == [(3.0, 9.0)] * 3
    shares = HostShares(d2h=2.0, cpu=0.0, h2d=0.0)  # and ask for no more of the host than one of them
    assert crossings(replace(three, host=shares), WorkStream.D2H, num_homes=3) == [(3.0, 15.0)] * 3


SECONDS = st.floats(min_value=0.0, max_value=4.0).map(lambda value: round(value, 3))
LAYERS = st.lists(
    st.builds(
        LayerCosts, forward_s=SECONDS, backward_s=SECONDS, apply_s=SECONDS, d2h_s=SECONDS, cpu_s=SECONDS, h2d_s=SECONDS
    ),
    min_size=1,
    max_size=6,
).map(tuple)


Run = tuple[StepCosts, tuple[int, ...], int, int]


@st.composite
def clusters(draw: st.DrawFn) -> Run:
    """Costs, the GPU of each part, shards of a machine, and homes; GPUs anywhere, or one that stands for all."""
    layers = draw(LAYERS)
    shares = draw(st.none() | st.builds(HostShares, d2h=st.floats(0, 2), cpu=st.floats(0, 2), h2d=st.floats(0, 2)))
    gpus = range(draw(st.integers(1, 4)))
    gpu_of_part = (*gpus, *draw(st.lists(st.sampled_from(gpus), max_size=2)))
    by_layer = st.tuples(*[SECONDS] * len(layers))
    num_homes = min(draw(st.integers(1, 3)), len(layers))
    found = None
    if draw(st.booleans()):
        stands_for_all = len(gpus) == 1 and draw(st.booleans())
        at = None if stands_for_all else draw(st.tuples(*[st.integers(0, 3)] * len(gpus)))
        away = draw(st.integers(1, 3)) if num_homes == 1 else num_homes - 1
        down_s, up_s, sum_s = draw(by_layer), draw(by_layer), draw(st.just(()) | by_layer)
        most = draw(st.sampled_from([0.25, 0.75, 1.0]))
        found = NetworkCosts(down_s=down_s, up_s=up_s, sum_s=sum_s, away=away, at=at, most=most)
    hop_s, rate = draw(st.sampled_from([0.0, 0.01])), draw(st.sampled_from([0.5, 1.0]))
    costs = StepCosts(layers=layers, hop_s=hop_s, shared_link_rate=rate, host=shares, network=found)
    return costs, gpu_of_part, draw(st.integers(1, 3)), num_homes


def crossing_s(costs: StepCosts, layer: int, gpu: int, num_homes: int) -> tuple[float, float]:
    """The least that the network takes of a payload's way, and of a delta's."""
    found = costs.network
    if found is None or (found.at is not None and found.at[gpu] == layer % num_homes):
        return 0.0, 0.0
    slower = max(found.away if found.at is None else 1, 1 / found.most)
    sum_s = found.sum_s[layer] if found.sum_s else 0.0
    return sum_s + slower * found.down_s[layer], slower * found.up_s[layer]


@pytest.mark.parametrize("name", sorted(POLICIES))
@given(cluster=clusters())
@settings(max_examples=30, deadline=None)
def test_each_payload_and_delta_moves_once_in_its_order_and_no_faster_than_link_and_network(
    name: str, cluster: Run
) -> None:
    costs, gpu_of_part, num_shards, num_homes = cluster
    how: dict[str, Any] = {"policy": name, "num_shards": num_shards, "num_homes": num_homes}
    done = simulate(costs, gpu_of_part=gpu_of_part, num_steps=3, **how)
    moved = {
        (span.stream, span.step, span.layer, span.part): span
        for span in done.spans
        if span.stream is not WorkStream.GPU
    }
    num_gpus = len(set(gpu_of_part))
    assert len(moved) == sum(span.stream is not WorkStream.GPU for span in done.spans)
    assert len(moved) == 3 * len(costs.layers) * (len(gpu_of_part) + 1 + num_gpus)
    for (stream, step, layer, _), update in moved.items():
        if stream is not WorkStream.CPU:
            continue
        for part, gpu in enumerate(gpu_of_part):
            down, up = moved[WorkStream.D2H, step, layer, part], moved[WorkStream.H2D, step, layer, gpu]
            down_s, up_s = crossing_s(costs, layer, gpu, num_homes)
            assert down.end_s - down.start_s >= costs.layers[layer].d2h_s + down_s - 1e-9
            assert up.end_s - up.start_s >= costs.layers[layer].h2d_s + up_s - 1e-9
            assert down.end_s <= update.start_s + 1e-9
            assert update.end_s <= up.start_s + 1e-9


@pytest.mark.parametrize("name", ORDERED)
@given(cluster=clusters())
@settings(max_examples=30, deadline=None)
def test_a_step_is_no_shorter_than_any_gpu_its_link_or_a_machines_link_to_others(name: str, cluster: Run) -> None:
    costs, gpu_of_part, num_shards, num_homes = cluster
    how: dict[str, Any] = {"policy": name, "num_shards": num_shards, "num_homes": num_homes}
    done = simulate(costs, gpu_of_part=gpu_of_part, num_steps=5, **how)
    mean_s = sum(step.step_s for step in done.steps[1:]) / 4
    most_parts = max(gpu_of_part.count(gpu) for gpu in gpu_of_part)
    assert mean_s >= most_parts * costs.both_ways_s + sum(layer.apply_s for layer in costs.layers) - 1e-6
    assert mean_s >= most_parts * sum(layer.d2h_s for layer in costs.layers) - 1e-6
    assert mean_s >= sum(layer.h2d_s for layer in costs.layers) - 1e-6
    if costs.network is not None:
        assert mean_s >= busiest_s(costs.network, gpu_of_part, num_homes) - 1e-6


def busiest_s(network: NetworkCosts, gpu_of_part: tuple[int, ...], num_homes: int) -> float:
    """Seconds a step of the busiest link between machines; of one GPU for all, both directions are an average."""
    if network.at is None:
        at_home = [range(home, len(network.down_s), num_homes) for home in range(num_homes)]
        alone = max(network.away * sum(ways[layer] for layer in own) for own in at_home for ways in _ways(network))
        both = network.away / num_homes * sum(map(sum, _ways(network))) if num_homes > 1 else 0.0
        return max(alone, len(gpu_of_part) * network.away * sum(network.down_s) / num_homes, both)
    comes, goes = Counter[int](), Counter[int]()
    for layer, (down_s, up_s) in enumerate(zip(*_ways(network), strict=True)):
        home = layer % num_homes
        for gpu, machine in enumerate(network.at):
            if machine != home:
                sent_s = gpu_of_part.count(gpu) * down_s
                comes.update({home: sent_s, machine: up_s})
                goes.update({machine: sent_s, home: up_s})
    return max([*comes.values(), *goes.values()], default=0.0)


def _ways(network: NetworkCosts) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return network.down_s, network.up_s


@pytest.mark.parametrize("name", ORDERED)
@pytest.mark.parametrize(("network_s", "within"), [(0.05, 0.01), (0.4, 0.01), (2.0, 0.15)])
@pytest.mark.parametrize("num_homes", [1, 4])
def test_one_gpu_elsewhere_stands_for_all_that_do_the_same(
    name: str, network_s: float, within: float, num_homes: int
) -> None:
    # where two things happen at one time, their order is luck: no two layers are alike; a network that is full has them
    # waiting for each other all the time
    layers = tuple(
        replace(LAYER, backward_s=2.0 + 0.1 * layer, d2h_s=0.1 + 0.01 * layer, cpu_s=0.2 + 0.003 * layer)
        for layer in range(6)
    )
    steps_s = []
    everyone: list[dict[str, Any]] = [{"away": 3}, {"at": (0, 1, 2, 3)}]
    for who in [*everyone, {"at": (1, 2, 3)}] if num_homes == 1 else everyone:
        crossing = network(*[network_s] * len(layers), most=0.9, **who)
        costs, gpus = StepCosts(layers=layers, hop_s=0.001, network=crossing), tuple(range(len(who.get("at", (0,)))))
        done = simulate(
            costs, gpu_of_part=gpus, policy=name, num_shards=2 if num_homes == 1 else 1, num_homes=num_homes
        )
        steps_s.append(done.typical.step_s)
    assert steps_s == pytest.approx([steps_s[0]] * len(steps_s), rel=within)


@given(cluster=clusters())
@settings(max_examples=20, deadline=None)
def test_the_same_cluster_gives_the_same_trace_to_the_last_bit(cluster: Run) -> None:
    costs, gpu_of_part, num_shards, num_homes = cluster
    how: dict[str, Any] = {"gpu_of_part": gpu_of_part, "num_shards": num_shards, "num_homes": num_homes}
    first, second = (simulate(costs, **how) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"away": 0}, "sim.away must be at least 1, got 0"),
        ({"at": (-1,)}, "sim.at must be numbers of at least 0, got (-1,)"),
        ({"most": 0.0}, "sim.most must be above 0 and at most 1, got 0.0"),
        ({"down_s": (-1.0,)}, "sim.down_s must be a finite number of seconds, at least 0, got -1.0"),
        ({"up_s": (1.0, 1.0)}, "sim.up_s must be of 1 layers, got 2"),
        ({"sum_s": (1.0, 1.0)}, "sim.sum_s must be of 1 layers, got 2"),
        ({"down_s": (1.0, 1.0), "up_s": (1.0, 1.0)}, "sim.down_s must be of 1 layers, got 2"),
        ({"at": (1, 1)}, "sim.at must be of 1 GPUs, got (1, 1)"),
    ],
)
def test_a_network_that_cannot_be_is_named(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        simulate(StepCosts(layers=(LAYER,), network=NetworkCosts(**{"down_s": (1.0,), "up_s": (1.0,), **changes})))
    assert str(caught.value) == line


def test_one_gpu_for_all_machines_is_the_only_one() -> None:
    with pytest.raises(ConfigError, match=r"^sim.at must be of 2 GPUs, got None$"):
        simulate(StepCosts(layers=(LAYER,), network=network(1.0)), gpu_of_part=(0, 1))


def test_a_gpu_without_a_part_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^sim.gpu_of_part must give GPU 0 a part, got \(1,\)$"):
        simulate(StepCosts(layers=(LAYER,)), gpu_of_part=(1,))
