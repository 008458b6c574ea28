"""Several GPUs and machines: times worked out by hand, and what holds for all costs."""

from __future__ import annotations

import hashlib
import random
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
    num_steps: int = 4,
) -> Simulation:
    owners = [layer % num_shards for layer in range(len(costs.layers))]
    decides = POLICIES[policy](owners, gpu_of_part=gpu_of_part)
    return Simulator(costs, decides, owners, num_steps=num_steps).run()


def star(*layers_s: float, away: tuple[int, ...], most: float = 1.0) -> NetworkCosts:
    return NetworkCosts(layers_s=layers_s, away=away, most=most)


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
    done = simulate(StepCosts(layers=(LAYER,), network=star(8.0, away=(0, 1))), gpu_of_part=(0, 1), policy=policy)
    assert [step.step_s for step in done.steps] == [3.0, *[ALONE_S + 8.0 + 8.0] * 3]
    late = done.typical.exposed
    assert (late.d2h_s, late.cpu_s, late.h2d_s) == (0.25 + 8.0, 4.0, 8.0 + 0.125)
    last = {(span.stream, span.part): span.end_s - span.start_s for span in done.spans}
    assert [last[WorkStream.D2H, part] for part in (0, 1)] == [0.25, 8.25]
    assert [last[WorkStream.H2D, gpu] for gpu in (0, 1)] == [0.125, 8.125]


@pytest.mark.parametrize(("num_away", "most", "slower"), [(2, 1.0, 2.0), (5, 1.0, 5.0), (2, 0.25, 4.0), (5, 0.25, 5.0)])
@pytest.mark.parametrize("is_one", [True, False])
def test_gpus_elsewhere_share_the_drivers_link_and_none_gets_more_than_its_connection_reaches(
    num_away: int, most: float, slower: float, is_one: bool
) -> None:
    away = (num_away,) if is_one else (0, *(1,) * num_away)
    costs = StepCosts(layers=(LAYER,), network=star(8.0, away=away, most=most))
    done = simulate(costs, gpu_of_part=tuple(range(len(away))))
    assert done.typical.step_s == pytest.approx(ALONE_S + 2 * slower * 8.0)


def test_who_comes_to_the_network_while_another_is_on_it_halves_its_rate() -> None:
    # GPU 1 computes two parts: its first payload is on the network beside GPU 2's only one, its second one alone
    network = star(2.0, away=(0, 1, 1))
    costs = StepCosts(layers=(replace(LAYER, d2h_s=1.0),), network=network)
    done = simulate(costs, gpu_of_part=(0, 1, 1, 2), num_steps=1)
    ends_s = {span.part: span.end_s for span in done.spans if span.stream is WorkStream.D2H}
    assert ends_s == {0: 4.0, 1: 3.0 + 1.0 + 4.0, 2: 8.0 + 1.0 + 2.0, 3: 3.0 + 1.0 + 4.0}


def test_a_link_is_free_for_the_other_way_while_a_payload_is_on_the_network() -> None:
    layers = (replace(LAYER, h2d_s=1.0, d2h_s=1.0), replace(LAYER, h2d_s=1.0, d2h_s=1.0))
    costs = StepCosts(layers=layers, network=star(50.0, 50.0, away=(1,)), shared_link_rate=0.5)
    free = replace(costs, shared_link_rate=1.0)
    assert simulate(costs).typical.step_s == pytest.approx(simulate(free).typical.step_s)


SECONDS = st.floats(min_value=0.0, max_value=4.0).map(lambda value: round(value, 3))
LAYERS = st.lists(
    st.builds(
        LayerCosts, forward_s=SECONDS, backward_s=SECONDS, apply_s=SECONDS, d2h_s=SECONDS, cpu_s=SECONDS, h2d_s=SECONDS
    ),
    min_size=1,
    max_size=6,
).map(tuple)


@st.composite
def clusters(draw: st.DrawFn) -> tuple[StepCosts, tuple[int, ...], int]:
    """Costs, the GPU of each part, and shards; GPUs anywhere."""
    layers = draw(LAYERS)
    shares = draw(st.none() | st.builds(HostShares, d2h=st.floats(0, 2), cpu=st.floats(0, 2), h2d=st.floats(0, 2)))
    gpus = range(draw(st.integers(1, 4)))
    gpu_of_part = (*gpus, *draw(st.lists(st.sampled_from(gpus), max_size=2)))
    network = draw(
        st.none()
        | st.builds(
            NetworkCosts,
            layers_s=st.tuples(*[SECONDS] * len(layers)),
            away=st.tuples(*[st.integers(0, 2)] * len(gpus)),
            most=st.sampled_from([0.25, 0.75, 1.0]),
        )
    )
    hop_s, rate = draw(st.sampled_from([0.0, 0.01])), draw(st.sampled_from([0.5, 1.0]))
    costs = StepCosts(layers=layers, hop_s=hop_s, shared_link_rate=rate, host=shares, network=network)
    return costs, gpu_of_part, draw(st.integers(1, 3))


@pytest.mark.parametrize("name", sorted(POLICIES))
@given(cluster=clusters())
@settings(max_examples=30, deadline=None)
def test_each_payload_and_delta_moves_once_in_its_order_and_no_faster_than_link_and_network(
    name: str, cluster: tuple[StepCosts, tuple[int, ...], int]
) -> None:
    costs, gpu_of_part, num_shards = cluster
    done = simulate(costs, gpu_of_part=gpu_of_part, policy=name, num_shards=num_shards, num_steps=3)
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
            network = costs.network
            away = 0 if network is None else network.away[gpu]
            crossing_s = (
                0.0 if network is None else network.layers_s[layer] * (max(away, 1 / network.most) if away else 0)
            )
            assert down.end_s - down.start_s >= costs.layers[layer].d2h_s + crossing_s - 1e-9
            assert up.end_s - up.start_s >= costs.layers[layer].h2d_s + crossing_s - 1e-9
            assert down.end_s <= update.start_s + 1e-9
            assert update.end_s <= up.start_s + 1e-9


@pytest.mark.parametrize("name", ORDERED)
@given(cluster=clusters())
@settings(max_examples=30, deadline=None)
def test_a_step_is_no_shorter_than_any_gpu_or_the_network(
    name: str, cluster: tuple[StepCosts, tuple[int, ...], int]
) -> None:
    costs, gpu_of_part, num_shards = cluster
    done = simulate(costs, gpu_of_part=gpu_of_part, policy=name, num_shards=num_shards, num_steps=5)
    mean_s = sum(step.step_s for step in done.steps[1:]) / 4
    most_parts = max(gpu_of_part.count(gpu) for gpu in gpu_of_part)
    assert mean_s >= most_parts * costs.both_ways_s + sum(layer.apply_s for layer in costs.layers) - 1e-6
    if costs.network is not None:
        out_s = sum(costs.network.away) * sum(costs.network.layers_s)
        assert mean_s >= out_s - 1e-6


@pytest.mark.parametrize("name", ORDERED)
@pytest.mark.parametrize(("network_s", "within"), [(0.05, 0.01), (0.4, 0.01), (2.0, 0.15)])
def test_one_gpu_elsewhere_stands_for_all_that_do_the_same(name: str, network_s: float, within: float) -> None:
    # where two things happen at one time, their order is luck: no two layers are alike; a network that is full has them
    # waiting for each other all the time
    layers = tuple(
        replace(LAYER, backward_s=2.0 + 0.1 * layer, d2h_s=0.1 + 0.01 * layer, cpu_s=0.2 + 0.003 * layer)
        for layer in range(6)
    )
    steps_s = []
    for away in ((3,), (1, 1, 1), (0, 1, 1, 1)):
        costs = StepCosts(layers=layers, hop_s=0.001, network=star(*[network_s] * len(layers), away=away, most=0.9))
        done = simulate(costs, gpu_of_part=tuple(range(len(away))), policy=name, num_shards=2)
        steps_s.append(done.typical.step_s)
    assert steps_s == pytest.approx([steps_s[0]] * 3, rel=within)


@given(cluster=clusters())
@settings(max_examples=20, deadline=None)
def test_the_same_cluster_gives_the_same_trace_to_the_last_bit(
    cluster: tuple[StepCosts, tuple[int, ...], int],
) -> None:
    costs, gpu_of_part, num_shards = cluster
    first, second = (simulate(costs, gpu_of_part=gpu_of_part, num_shards=num_shards) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"away": (-1,)}, "sim.away must be numbers of at least 0, got (-1,)"),
        ({"most": 0.0}, "sim.most must be above 0 and at most 1, got 0.0"),
        ({"layers_s": (-1.0,)}, "sim.layers_s must be a finite number of seconds, at least 0, got -1.0"),
        ({"layers_s": (1.0, 1.0)}, "sim.layers_s must be of 1 layers, got 2"),
        ({"away": (1, 1)}, "sim.away must be of 1 GPUs, got 2"),
    ],
)
def test_a_network_that_cannot_be_is_named(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        simulate(StepCosts(layers=(LAYER,), network=NetworkCosts(**{"layers_s": (1.0,), "away": (1,), **changes})))
    assert str(caught.value) == line


def test_a_gpu_without_a_part_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^sim.gpu_of_part must give GPU 0 a part, got \(1,\)$"):
        simulate(StepCosts(layers=(LAYER,)), gpu_of_part=(1,))
