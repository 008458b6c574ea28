"""Several GPUs and nodes: times worked out by hand, what holds for all costs, and the figures of the design."""

from __future__ import annotations

import hashlib
import random
from dataclasses import make_dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lsp_ray.config import PayloadDtype
from lsp_ray.errors import ConfigError
from lsp_ray.schedule.delta_room import DeltaRoom
from lsp_ray.schedule.policy import POLICIES
from lsp_ray.sim.cost_model import CostModel
from lsp_ray.sim.costs import HostShares, LayerCosts, StepCosts
from lsp_ray.sim.hardware_profile import load_hardware
from lsp_ray.sim.network import Crossing, NetworkCosts
from lsp_ray.sim.simulation import Simulation
from lsp_ray.sim.simulator import Simulator
from lsp_ray.sim.workload import Workload
from lsp_ray.trace import WorkStream
from scripts.sim_paper import llama

ORDERED = sorted(name for name, policy in POLICIES.items() if policy.staleness == 0)
LAYER = LayerCosts(forward_s=1.0, backward_s=2.0, apply_s=0.5, d2h_s=0.25, cpu_s=4.0, h2d_s=0.125)
ALONE_S = 3.0 + 0.5 + 0.25 + 4.0 + 0.125


def simulate(
    costs: StepCosts,
    *,
    gpu_of_part: tuple[int, ...] = (0,),
    network: NetworkCosts | None = None,
    policy: str = "layerwise",
    num_shards: int = 1,
    num_steps: int = 4,
) -> Simulation:
    owners = [layer % num_shards for layer in range(len(costs.layers))]
    decides = POLICIES[policy](owners, gpu_of_part=gpu_of_part)
    return Simulator(costs, decides, owners, num_steps=num_steps, network=network).run()


def nodes(num_nodes: int, *layers: Crossing, is_one: bool = False, shards_per_node: int = 1) -> NetworkCosts:
    """Nodes of a GPU each; `is_one` lets one stand for all."""
    every = tuple(range(num_nodes))
    return NetworkCosts(
        num_nodes=num_nodes,
        node_of_shard=every * shards_per_node,
        nodes_of_gpu=(every,) if is_one else tuple((node,) for node in every),
        layers=layers,
    )


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


# several nodes


def test_payloads_cross_to_the_shards_node_and_deltas_back() -> None:
    crossing = Crossing(sum_s=32.0, down_s=8.0, up_s=16.0)
    done = simulate(StepCosts(layers=(LAYER,)), gpu_of_part=(0, 1), network=nodes(2, crossing))
    assert [step.step_s for step in done.steps] == [3.0, *[ALONE_S + 32.0 + 8.0 + 16.0] * 3]
    # on its way to an update the network's part is the update's, on its way to a GPU h2d's
    late = done.typical.exposed
    assert (late.d2h_s, late.cpu_s, late.h2d_s) == (0.25, 32.0 + 8.0 + 4.0, 16.0 + 0.125)
    assert (done.typical.crossing.cpu_s, done.typical.crossing.h2d_s) == (32.0 + 8.0, 16.0)
    assert done.typical.network_s == 16.0


@pytest.mark.parametrize("num_nodes", [2, 3, 5])
@pytest.mark.parametrize("is_one", [True, False])
def test_nodes_that_send_to_one_are_served_one_after_the_other(num_nodes: int, is_one: bool) -> None:
    network = nodes(num_nodes, Crossing(down_s=8.0, up_s=16.0), is_one=is_one)
    gpus = (0,) if is_one else tuple(range(num_nodes))
    done = simulate(StepCosts(layers=(LAYER,)), gpu_of_part=gpus, network=network)
    # each by itself, all but the last to get its delta send theirs while that one still waits
    last_s = (num_nodes - 1) * 8.0 if is_one else 8.0
    assert done.typical.step_s == ALONE_S + last_s + (num_nodes - 1) * 16.0
    assert done.typical.network_s == (num_nodes - 1) * 16.0


def test_several_gpus_of_a_node_send_once_when_the_last_has_its_payload_down_and_get_the_delta_once() -> None:
    network = NetworkCosts(
        num_nodes=2,
        node_of_shard=(0,),
        nodes_of_gpu=((0,), (1,), (1,)),
        layers=(Crossing(down_s=8.0, up_s=16.0),),
    )
    done = simulate(StepCosts(layers=(LAYER,)), gpu_of_part=(0, 1, 2, 2), network=network)
    assert done.typical.step_s == ALONE_S + 3.0 + 8.0 + 16.0
    assert done.typical.network_s == 16.0


def test_shards_on_all_nodes_share_the_networks_work() -> None:
    layers, crossing = (replace(LAYER, cpu_s=0.0),) * 8, Crossing(down_s=8.0, up_s=8.0)
    costs, network = StepCosts(layers=layers), nodes(4, *[crossing] * 8)
    one_node, all_nodes = (
        simulate(costs, gpu_of_part=(0, 1, 2, 3), network=network, num_shards=count).typical for count in (1, 4)
    )
    assert one_node.network_s == 8 * 3 * 8.0
    # each node owns a quarter of the layers: sends the payloads of the others, and its own ones' deltas to 3 nodes
    assert all_nodes.network_s == pytest.approx(6 * 8.0 + 2 * 3 * 8.0, rel=0.1)
    assert all_nodes.step_s < 0.75 * one_node.step_s


SECONDS = st.floats(min_value=0.0, max_value=4.0).map(lambda value: round(value, 3))
LAYERS = st.lists(
    st.builds(
        LayerCosts, forward_s=SECONDS, backward_s=SECONDS, apply_s=SECONDS, d2h_s=SECONDS, cpu_s=SECONDS, h2d_s=SECONDS
    ),
    min_size=1,
    max_size=6,
).map(tuple)


@st.composite
def clusters(draw: st.DrawFn) -> tuple[StepCosts, tuple[int, ...], NetworkCosts | None, int]:
    """Costs, the GPU of each part, the network, and shards; GPUs anywhere, each node with one at least."""
    layers = draw(LAYERS)
    shares = draw(st.none() | st.builds(HostShares, d2h=st.floats(0, 2), cpu=st.floats(0, 2), h2d=st.floats(0, 2)))
    costs = StepCosts(layers=layers, hop_s=draw(st.sampled_from([0.0, 0.01])), host=shares)
    num_nodes, num_shards = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    node_of_gpu = [*range(num_nodes), *draw(st.lists(st.integers(0, num_nodes - 1), max_size=2))]
    gpus = range(len(node_of_gpu))
    gpu_of_part = (*gpus, *draw(st.lists(st.sampled_from(gpus), max_size=2)))
    if num_nodes == 1:
        return costs, gpu_of_part, None, num_shards
    crossing = st.builds(Crossing, sum_s=SECONDS, down_s=SECONDS, up_s=SECONDS)
    network = NetworkCosts(
        num_nodes=num_nodes,
        node_of_shard=tuple(draw(st.lists(st.integers(0, num_nodes - 1), min_size=num_shards, max_size=num_shards))),
        nodes_of_gpu=tuple((node,) for node in node_of_gpu),
        layers=tuple(draw(crossing) for _ in layers),
    )
    return costs, gpu_of_part, network, num_shards


@pytest.mark.parametrize("name", sorted(POLICIES))
@given(cluster=clusters())
@settings(max_examples=30, deadline=None)
def test_each_payload_and_delta_moves_once_and_only_when_it_is_where_it_has_to_be(
    name: str, cluster: tuple[StepCosts, tuple[int, ...], NetworkCosts | None, int]
) -> None:
    costs, gpu_of_part, network, num_shards = cluster
    done = simulate(costs, gpu_of_part=gpu_of_part, network=network, policy=name, num_shards=num_shards, num_steps=3)
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
        owner = 0 if network is None else network.node_of_shard[layer % num_shards]
        for part, gpu in enumerate(gpu_of_part):
            down, up = moved[WorkStream.D2H, step, layer, part], moved[WorkStream.H2D, step, layer, gpu]
            is_far = network is not None and network.nodes_of_gpu[gpu] != (owner,)
            crossing = network.layers[layer] if network is not None and is_far else Crossing(down_s=0.0, up_s=0.0)
            assert down.end_s + crossing.sum_s + crossing.down_s <= update.start_s + 1e-9
            assert update.end_s + crossing.up_s <= up.start_s + 1e-9


@pytest.mark.parametrize("name", ORDERED)
@given(cluster=clusters())
@settings(max_examples=30, deadline=None)
def test_a_step_is_no_shorter_than_any_gpu_or_any_lane_of_the_network(
    name: str, cluster: tuple[StepCosts, tuple[int, ...], NetworkCosts | None, int]
) -> None:
    costs, gpu_of_part, network, num_shards = cluster
    done = simulate(costs, gpu_of_part=gpu_of_part, network=network, policy=name, num_shards=num_shards, num_steps=5)
    mean_s = sum(step.step_s for step in done.steps[1:]) / 4
    most_parts = max(gpu_of_part.count(gpu) for gpu in gpu_of_part)
    assert mean_s >= most_parts * costs.both_ways_s + sum(layer.apply_s for layer in costs.layers) - 1e-6
    if network is not None:
        owners = [network.node_of_shard[layer % num_shards] for layer in range(len(costs.layers))]
        for node in range(network.num_nodes):
            out_s = sum(
                (network.num_nodes - 1) * crossing.up_s if owner == node else crossing.down_s
                for owner, crossing in zip(owners, network.layers, strict=True)
            )
            assert mean_s >= out_s - 1e-6


@given(cluster=clusters())
@settings(max_examples=20, deadline=None)
def test_the_same_cluster_gives_the_same_trace_to_the_last_bit(
    cluster: tuple[StepCosts, tuple[int, ...], NetworkCosts | None, int],
) -> None:
    costs, gpu_of_part, network, num_shards = cluster
    first, second = (simulate(costs, gpu_of_part=gpu_of_part, network=network, num_shards=num_shards) for _ in range(2))
    assert first == second


def test_a_network_that_does_not_fit_its_gpus_is_named() -> None:
    crossing = Crossing(down_s=1.0, up_s=1.0)
    with pytest.raises(ConfigError, match=r"^sim.nodes_of_gpu must name every node, of at least 2, got "):
        NetworkCosts(num_nodes=3, node_of_shard=(0,), nodes_of_gpu=((0,), (1,)), layers=(crossing,))
    with pytest.raises(ConfigError, match=r"^sim.nodes_of_gpu must name every node, of at least 2, got "):
        NetworkCosts(num_nodes=1, node_of_shard=(0,), nodes_of_gpu=((0,),), layers=(crossing,))
    with pytest.raises(ConfigError, match=r"^sim.node_of_shard must be nodes from 0 to 1, got \(2,\)$"):
        NetworkCosts(num_nodes=2, node_of_shard=(2,), nodes_of_gpu=((0,), (1,)), layers=(crossing,))
    with pytest.raises(ConfigError, match=r"^sim.nodes_of_gpu must name the nodes of 1 GPUs, got 2$"):
        simulate(StepCosts(layers=(LAYER,)), network=nodes(2, crossing))
    with pytest.raises(ConfigError, match=r"^sim.node_of_shard must name the node of 3 shards, got 2$"):
        simulate(StepCosts(layers=(LAYER,) * 3), gpu_of_part=(0, 1), network=nodes(2, *[crossing] * 3), num_shards=3)
    with pytest.raises(ConfigError, match=r"^sim.gpu_of_part must give GPU 0 a part, got \(1,\)$"):
        simulate(StepCosts(layers=(LAYER,)), gpu_of_part=(1,))


# the design's figures

LLAMA_7B = llama(4096, 11008, 32, 32000)
COMPUTE_S = 1.3
NODES = (2, 4, 8)
Case = tuple[int, int, PayloadDtype]  # Gbit/s, d, type
DESIGN: dict[Case, tuple[float, float, float]] = {
    (1, 256, "float32"): (0.99, 0.89, 0.82),
    (1, 512, "bfloat16"): (0.76, 0.78, 0.69),
    (1, 1024, "bfloat16"): (0.32, 0.22, 0.19),
    (1, 2048, "bfloat16"): (0.09, 0.06, 0.05),
    (10, 256, "float32"): (1.0, 1.0, 1.0),
    (10, 512, "bfloat16"): (1.0, 1.0, 1.0),
    (10, 1024, "bfloat16"): (0.99, 0.96, 0.90),
    (10, 2048, "bfloat16"): (0.74, 0.52, 0.45),
    (25, 256, "float32"): (1.0, 1.0, 1.0),
    (25, 512, "bfloat16"): (1.0, 1.0, 1.0),
    (25, 1024, "bfloat16"): (1.0, 1.0, 1.0),
    (25, 2048, "bfloat16"): (0.93, 0.87, 0.89),
}
# Where the network takes about as long as the compute or longer. The design let one GPU's policy order the traffic of
# a link that both directions share; here each node has a lane each way and takes what comes in order.
OFF_BY_MORE = {
    (1, 512, "bfloat16", 4): 0.61,
    (1, 512, "bfloat16", 8): 0.54,
    (10, 2048, "bfloat16", 2): 0.61,
    (10, 2048, "bfloat16", 4): 0.45,
    (10, 2048, "bfloat16", 8): 0.39,
    (25, 2048, "bfloat16", 8): 0.72,
}


def efficiency(case: Case, num_nodes: int, *, is_one: bool = False) -> float:
    """Of nodes with a GPU each; the network carries its whole rate, whatever its copies cost, as in the design."""
    gbit, dim, dtype = case
    work = Workload(
        method="lsp",
        batch_size=4,
        seq_length=1024,
        subspace_dim=dim,
        payload_dtype=dtype,
        num_shards=2,
        shard_threads=15,
    )
    costs = CostModel(model=LLAMA_7B, workload=work, hardware=load_hardware("rtx4090-threadripper")).step()
    pace = COMPUTE_S / costs.compute_s
    layers = tuple(
        replace(
            layer, forward_s=pace * layer.forward_s, backward_s=pace * layer.backward_s, apply_s=pace * layer.apply_s
        )
        for layer in costs.layers
    )
    costs = replace(costs, layers=layers, loss_s=pace * costs.loss_s)
    crossings_s = [8 * work.payload_bytes(layer) / (gbit * 1e9) for layer in LLAMA_7B.layers]
    network = nodes(
        num_nodes,
        *(Crossing(down_s=seconds, up_s=seconds) for seconds in crossings_s),
        is_one=is_one,
        shards_per_node=2,
    )
    gpus = (0,) if is_one else tuple(range(num_nodes))
    alone = simulate(costs, num_shards=2).typical
    together = simulate(costs, gpu_of_part=gpus, network=network, num_shards=2 * num_nodes).typical
    return alone.step_s / together.step_s


@pytest.mark.parametrize("case", DESIGN, ids=str)
def test_efficiencies_are_the_designs_but_where_the_network_is_full(case: Case) -> None:
    for num_nodes, designed in zip(NODES, DESIGN[case], strict=True):
        expected = OFF_BY_MORE.get((*case, num_nodes), designed)
        assert efficiency(case, num_nodes) == pytest.approx(expected, abs=0.05 if expected == designed else 0.01)


@pytest.mark.parametrize("case", [(1, 256, "float32"), (1, 1024, "bfloat16"), (10, 1024, "bfloat16")], ids=str)
def test_one_gpu_that_stands_for_all_nodes_comes_near_to_them_all(case: Case) -> None:
    for num_nodes in NODES:
        each, one = (efficiency(case, num_nodes, is_one=is_one) for is_one in (False, True))
        assert one == pytest.approx(each, rel=0.06)
