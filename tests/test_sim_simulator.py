"""The simulator against times worked out by hand, and what holds for all costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lsp_ray.errors import ConfigError
from lsp_ray.schedule.delta_room import DeltaRoom
from lsp_ray.schedule.ops import Action, Event
from lsp_ray.schedule.policy import POLICIES, Layerwise
from lsp_ray.schedule.transition import transition_layer
from lsp_ray.sim.costs import LayerCosts, StepCosts
from lsp_ray.sim.event_queue import EventQueue
from lsp_ray.sim.simulation import Simulation
from lsp_ray.sim.simulator import Simulator
from lsp_ray.trace import Span, WorkStream

ORDERED = sorted(name for name, policy in POLICIES.items() if policy.staleness == 0)


def simulate(
    policy: str | None, costs: StepCosts, shards: Sequence[int] | None = None, num_steps: int = 6
) -> Simulation:
    owners = [0] * len(costs.layers) if shards is None else shards
    return Simulator(costs, POLICIES[policy](owners) if policy else None, owners, num_steps=num_steps).run()


def layer(*, compute_s: float = 1.0, d2h_s: float = 0.0, cpu_s: float = 0.0, h2d_s: float = 0.0) -> LayerCosts:
    return LayerCosts(forward_s=compute_s, backward_s=compute_s, d2h_s=d2h_s, cpu_s=cpu_s, h2d_s=h2d_s)


seconds = st.floats(min_value=0.0, max_value=4.0).map(lambda value: round(value, 3))
layer_costs = st.builds(
    LayerCosts,
    forward_s=seconds,
    backward_s=seconds,
    apply_s=seconds,
    d2h_s=seconds,
    cpu_s=seconds,
    h2d_s=seconds,
)
step_costs = st.builds(
    StepCosts,
    layers=st.lists(layer_costs, min_size=1, max_size=8).map(tuple),
    loss_s=seconds,
    num_micro_batches=st.integers(1, 3),
    hop_s=st.sampled_from([0.0, 0.01]),
    shared_link_rate=st.sampled_from([1.0, 0.75, 0.5]),
    waits_for_all=st.booleans(),
)


@pytest.mark.parametrize("name", ORDERED)
def test_one_layer_takes_the_sum_of_all_its_work(name: str) -> None:
    costs = StepCosts(
        layers=(LayerCosts(forward_s=1.0, backward_s=2.0, apply_s=0.5, d2h_s=0.25, cpu_s=4.0, h2d_s=0.125),), loss_s=8.0
    )
    simulation = simulate(name, costs)
    assert [step.step_s for step in simulation.steps] == [11.0, *[11.0 + 0.5 + 0.25 + 4.0 + 0.125] * 5]
    late = simulation.typical.exposed
    assert (late.d2h_s, late.cpu_s, late.h2d_s) == (0.25, 4.0, 0.125)


@pytest.mark.parametrize("num_layers", [2, 5])
def test_a_pipeline_of_equal_costs_exposes_three_stages_of_one_layer(num_layers: int) -> None:
    # every stream takes 1 s a layer, so layer 0, the last to come down, passes d2h, CPU and h2d without queueing
    costs = StepCosts(layers=(layer(d2h_s=1.0, cpu_s=1.0, h2d_s=1.0),) * num_layers)
    assert simulate("earliest_deadline", costs).typical.step_s == 2.0 * num_layers + 3.0


def test_sequential_takes_compute_then_all_updates_then_the_rest_of_the_way_up() -> None:
    # the 4 payloads are down 1 s after the backward, updates take 4 s, and the forward then follows the deltas
    costs = StepCosts(layers=(layer(d2h_s=1.0, cpu_s=1.0, h2d_s=1.0),) * 4)
    assert simulate("sequential", costs).typical.step_s == 8.0 + 1.0 + 4.0 + 1.0


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_where_offloading_costs_nothing_a_step_takes_the_compute_alone(name: str) -> None:
    costs = StepCosts(layers=(layer(),) * 4, loss_s=0.5, num_micro_batches=2)
    assert simulate(name, costs).typical.step_s == costs.compute_s == 17.0


def test_a_step_on_the_device_alone_takes_its_compute_and_its_updates() -> None:
    costs = StepCosts(layers=(LayerCosts(forward_s=1.0, backward_s=2.0, update_s=0.25),) * 3)
    simulation = simulate(None, costs)
    assert [step.step_s for step in simulation.steps] == [9.75] * 6
    assert simulation.waits == ()


def test_where_the_cpu_is_the_bottleneck_a_layerwise_step_comes_near_its_updates() -> None:
    costs = StepCosts(layers=(layer(compute_s=0.01, cpu_s=1.0),) * 32)
    assert 32.0 <= simulate("layerwise", costs).typical.step_s < 32.7


def test_copies_in_both_directions_share_a_link_that_has_no_bandwidth_for_both() -> None:
    # layer 1's delta comes up while layer 0's payload goes down: from 3 s to 5 s each has half of the link
    layers = (layer(d2h_s=2.0, h2d_s=0.0), LayerCosts(forward_s=1.0, backward_s=0.0, h2d_s=1.0))
    costs = StepCosts(layers=layers, shared_link_rate=0.5)
    spans = simulate("layerwise_fcfs", costs, num_steps=1).spans
    assert _span(spans, WorkStream.H2D, 1).end_s == 3.0
    assert _span(spans, WorkStream.D2H, 0).end_s == 5.0
    slow_up = replace(costs, layers=(layers[0], replace(layers[1], h2d_s=2.0)))
    spans = simulate("layerwise_fcfs", slow_up, num_steps=1).spans
    # 1 s alone (from 2 s to 3 s), then the second half at half rate beside the payload, which ends 1 s of its own later
    assert _span(spans, WorkStream.H2D, 1).end_s == 5.0
    assert _span(spans, WorkStream.D2H, 0).end_s == 6.0


def test_a_forward_that_waits_for_all_deltas_hides_none_of_them() -> None:
    costs = StepCosts(layers=(layer(d2h_s=1.0, cpu_s=1.0, h2d_s=1.0),) * 4, waits_for_all=True)
    assert simulate("sequential", costs).typical.step_s == 8.0 + 1.0 + 4.0 + 4.0


def test_two_shards_halve_what_the_cpu_exposes() -> None:
    costs = StepCosts(layers=(layer(compute_s=0.0, cpu_s=1.0),) * 8)
    assert simulate("sequential", costs).typical.step_s == 8.0
    assert simulate("sequential", costs, [0, 1] * 4).typical.step_s == 4.0


def test_a_delayed_update_hides_behind_the_next_step() -> None:
    costs = StepCosts(layers=(layer(cpu_s=1.5),) * 4)
    assert simulate("delayed", costs).typical.step_s == costs.compute_s
    assert simulate("sequential", costs).typical.step_s > costs.compute_s


def test_layerwise_takes_its_transition_layer_from_the_costs() -> None:
    policy = Layerwise([0] * 32)
    table_1 = StepCosts(layers=(LayerCosts(forward_s=0.0122, backward_s=0.0281, cpu_s=0.060),) * 32)
    before = policy.transition_layer
    Simulator(table_1, policy, [0] * 32).run()
    assert policy.transition_layer == transition_layer(table_1.measured, [0] * 32) != before


@pytest.mark.parametrize("name", ORDERED)
@given(costs=step_costs)
@settings(max_examples=60, deadline=None)
def test_a_step_is_no_shorter_than_any_stream_and_no_longer_than_all(name: str, costs: StepCosts) -> None:
    simulation = simulate(name, costs)
    streams_s = {
        WorkStream.D2H: sum(cost.d2h_s for cost in costs.layers),
        WorkStream.CPU: sum(cost.cpu_s for cost in costs.layers),
        WorkStream.H2D: sum(cost.h2d_s for cost in costs.layers),
    }
    mean_s = math.fsum(step.step_s for step in simulation.steps[1:]) / 5
    slowest_s = max(costs.compute_s, *streams_s.values())
    link_s = (streams_s[WorkStream.D2H] + streams_s[WorkStream.H2D]) / costs.shared_link_rate
    hops_s = 4 * len(costs.layers) * costs.hop_s
    all_s = costs.compute_s + streams_s[WorkStream.CPU] + link_s + hops_s
    assert slowest_s - 1e-6 <= mean_s <= all_s + 1e-6


@pytest.mark.parametrize("name", ORDERED)
@given(costs=step_costs)
@settings(max_examples=40, deadline=None)
def test_exposed_time_is_all_that_a_step_takes_beside_its_compute(name: str, costs: StepCosts) -> None:
    for step in simulate(name, costs).steps[1:]:
        assert step.step_s == pytest.approx(costs.compute_s + step.exposed.total_s, abs=1e-6)
        assert step.busy_s[WorkStream.GPU] == pytest.approx(costs.compute_s, abs=1e-6)


@pytest.mark.parametrize("name", sorted(POLICIES))
@given(costs=step_costs, num_shards=st.integers(1, 3), num_held=st.sampled_from([None, 2, 3]))
@settings(max_examples=40, deadline=None)
def test_every_operation_runs_once_and_after_the_one_it_needs(
    name: str, costs: StepCosts, num_shards: int, num_held: int | None
) -> None:
    owners = [index % num_shards for index in range(len(costs.layers))]
    sizes = [1] * len(costs.layers)
    room = None if num_held is None else DeltaRoom(sizes=tuple(sizes), num_bytes=num_held)
    policy = POLICIES[name](owners, room=room)
    spans = Simulator(costs, policy, owners, num_steps=3).run().spans
    moved = {(span.stream, span.step, span.layer): span for span in spans if span.stream is not WorkStream.GPU}
    assert len(moved) == sum(span.stream is not WorkStream.GPU for span in spans) == 9 * len(costs.layers)
    for step in range(3):
        for index in range(len(costs.layers)):
            down, update, up = (
                moved[stream, step, index] for stream in (WorkStream.D2H, WorkStream.CPU, WorkStream.H2D)
            )
            assert down.end_s <= update.start_s <= update.end_s <= up.start_s


@pytest.mark.parametrize("name", sorted(POLICIES))
@given(costs=step_costs)
@settings(max_examples=20, deadline=None)
def test_the_same_costs_give_the_same_trace_to_the_last_bit(name: str, costs: StepCosts) -> None:
    assert simulate(name, costs) == simulate(name, costs)


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_costs_that_are_no_durations_are_named(value: float) -> None:
    with pytest.raises(ConfigError, match=r"^sim.cpu_s must be a finite number of seconds, at least 0, got "):
        LayerCosts(forward_s=1.0, backward_s=1.0, cpu_s=value)


def test_costs_that_make_no_step_are_named() -> None:
    with pytest.raises(ConfigError, match=r"^sim.layers must be at least one layer, got 0$"):
        StepCosts(layers=())
    with pytest.raises(ConfigError, match=r"^sim.num_micro_batches must be at least 1, got 0$"):
        StepCosts(layers=(layer(),), num_micro_batches=0)
    with pytest.raises(ConfigError, match=r"^sim.shared_link_rate must be above 0 and at most 1, got 2.0$"):
        StepCosts(layers=(layer(),), shared_link_rate=2.0)


def test_arguments_that_do_not_fit_each_other_are_named() -> None:
    costs = StepCosts(layers=(layer(),) * 3)
    with pytest.raises(ConfigError, match=r"^sim.shard_of_layer must name a shard for each of the 3 layers.*, got 2$"):
        Simulator(costs, Layerwise([0, 0]), [0, 0])
    with pytest.raises(ConfigError, match=r"^sim.num_steps must be at least 1, got 0$"):
        Simulator(costs, None, [], num_steps=0)


class Forgetful(Layerwise):
    """Launches nothing."""

    def handle(self, event: Event) -> list[Action]:
        return []


def test_a_policy_that_forgets_a_delta_is_named_and_not_waited_for() -> None:
    with pytest.raises(ConfigError, match=r"^sim.policy must bring every delta up, got "):
        Simulator(StepCosts(layers=(layer(),)), Forgetful([0]), [0]).run()


@given(st.lists(st.tuples(st.sampled_from([0.0, 1.0, 2.0]), st.integers(0, 2))))
def test_ties_are_broken_by_priority_and_then_by_order_of_entry(keys: list[tuple[float, int]]) -> None:
    queue: EventQueue[int] = EventQueue()
    for position, (time_s, priority) in enumerate(keys):
        queue.push(time_s, position, priority=priority)
    popped = [queue.pop() for _ in keys]
    assert [position for _, position in popped] == sorted(
        range(len(keys)), key=lambda position: (keys[position], position)
    )
    assert len(queue) == 0


def _span(spans: Sequence[Span], stream: WorkStream, layer_index: int) -> Span:
    return next(span for span in spans if span.stream is stream and span.layer == layer_index)
