"""Policies: exact action lists, and what holds for every order of completions."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lsp_ray.schedule.ops import GradientReady, Launch, Op, OpDone
from lsp_ray.schedule.policy import POLICIES, Layerwise, Policy, Sequential
from lsp_ray.trace import WorkStream

PREVIOUS = {WorkStream.CPU: WorkStream.D2H, WorkStream.H2D: WorkStream.CPU}


def down(layer: int, step: int = 0) -> Op:
    return Op(stream=WorkStream.D2H, step=step, layer=layer)


def update(layer: int, step: int = 0) -> Op:
    return Op(stream=WorkStream.CPU, step=step, layer=layer)


def up(layer: int, step: int = 0) -> Op:
    return Op(stream=WorkStream.H2D, step=step, layer=layer)


def ready(policy: Policy, *layers: int, step: int = 0) -> list[list[Op]]:
    return [[action.op for action in policy.handle(GradientReady(step=step, layer=layer))] for layer in layers]


def done(policy: Policy, *ops: Op) -> list[list[Op]]:
    return [[action.op for action in policy.handle(OpDone(op=op))] for op in ops]


def test_a_gradient_is_answered_with_its_transfer_down() -> None:
    assert Layerwise([0]).handle(GradientReady(step=4, layer=0)) == [Launch(op=down(0, step=4))]


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_a_single_layer_goes_down_through_its_update_and_up(name: str) -> None:
    policy = POLICIES[name]([0])
    assert ready(policy, 0) == [[down(0)]]
    assert done(policy, down(0), update(0), up(0)) == [[update(0)], [up(0)], []]


def test_layerwise_serves_deep_layers_in_order_of_arrival() -> None:
    policy = Layerwise([0] * 6, depth=1, transition_layer=0)
    assert ready(policy, 4, 5, 2, 3) == [[down(4)], [], [], []]
    assert done(policy, down(4), down(5), down(2), down(3)) == [[update(4), down(5)], [down(2)], [down(3)], []]
    assert done(policy, update(4), update(5), update(2)) == [[update(5), up(4)], [update(2)], [update(3)]]


def test_layerwise_serves_the_shallowest_first_from_the_transition_layer_on() -> None:
    policy = Layerwise([0] * 6, depth=1, transition_layer=3)
    assert ready(policy, 5, 4, 3, 2, 1, 0) == [[down(5)], [], [], [], [], []]
    order = [down(5), down(0), down(1), down(2), down(4)]
    launched = done(policy, *order)
    assert launched == [[update(5), down(0)], [down(1)], [down(2)], [down(4)], [down(3)]]


def test_a_shallow_layer_overtakes_the_backlog_of_deep_updates() -> None:
    policy = Layerwise([0] * 4, depth=1)
    ready(policy, 3, 2, 1, 0)
    assert done(policy, down(3), down(0), down(1), down(2)) == [[update(3), down(0)], [down(1)], [down(2)], []]
    assert done(policy, update(3)) == [[update(0), up(3)]]
    assert done(policy, update(0), update(1), update(2)) == [[update(1)], [update(2)], []]
    assert done(policy, up(3), up(0), up(1)) == [[up(0)], [up(1)], [up(2)]]


def test_what_is_launched_is_not_called_back_for_a_shallower_layer() -> None:
    policy = Layerwise([0] * 4, depth=2)
    assert ready(policy, 3, 2, 1, 0) == [[down(3)], [down(2)], [], []]
    assert done(policy, down(3)) == [[update(3), down(0)]]


def test_the_transition_layer_is_the_middle_unless_given() -> None:
    assert Layerwise([0] * 7).transition_layer == 3
    assert Layerwise([0] * 7, transition_layer=5).transition_layer == 5


def test_a_transition_layer_above_all_layers_serves_every_layer_shallowest_first() -> None:
    policy = Layerwise([0] * 4, depth=1, transition_layer=4)
    ready(policy, 0, 3, 2, 1)
    assert done(policy, down(0), down(1), down(2)) == [[update(0), down(1)], [down(2)], [down(3)]]


def test_layerwise_updates_one_layer_while_another_is_still_to_come() -> None:
    policy = Layerwise([0, 0], depth=1)
    assert ready(policy, 1) == [[down(1)]]
    assert done(policy, down(1), update(1), up(1)) == [[update(1)], [up(1)], []]
    assert ready(policy, 0) == [[down(0)]]


def test_a_new_steps_deep_layer_waits_behind_the_old_steps_shallow_one() -> None:
    policy = Layerwise([0] * 4, depth=1)
    ready(policy, 3)
    done(policy, down(3), update(3), up(3))
    ready(policy, 2, 1)
    assert ready(policy, 3, step=1) == [[]]
    assert done(policy, down(2), down(1)) == [[update(2), down(1)], [down(3, step=1)]]


def test_sequential_updates_nothing_before_every_payload_is_down() -> None:
    policy = Sequential([0] * 3, depth=2)
    assert ready(policy, 2, 1, 0) == [[down(2)], [down(1)], []]
    assert done(policy, down(2), down(1), down(0)) == [[down(0)], [], [update(2), update(1)]]


def test_sequential_sends_nothing_up_before_every_update_is_done() -> None:
    policy = Sequential([0] * 3, depth=2)
    ready(policy, 2, 1, 0)
    done(policy, down(2), down(1), down(0))
    assert done(policy, update(2), update(1), update(0)) == [[update(0)], [], [up(0), up(1)]]
    assert done(policy, up(0), up(1), up(2)) == [[up(2)], [], []]


def test_sequential_serves_layers_in_order_of_arrival_and_on_the_way_up_the_first_first() -> None:
    policy = Sequential([0] * 4, depth=1)
    ready(policy, 1, 3, 0, 2)
    assert done(policy, down(1), down(3), down(0), down(2)) == [[down(3)], [down(0)], [down(2)], [update(1)]]
    assert done(policy, update(1), update(3), update(0), update(2)) == [[update(3)], [update(0)], [update(2)], [up(0)]]


def test_sequential_counts_each_step_for_itself() -> None:
    policy = Sequential([0, 0], depth=2)
    for step in range(4):
        assert ready(policy, 1, 0, step=step) == [[down(1, step)], [down(0, step)]]
        assert done(policy, down(0, step), down(1, step)) == [[], [update(0, step), update(1, step)]]
        assert done(policy, update(0, step), update(1, step)) == [[], [up(0, step), up(1, step)]]
        assert done(policy, up(0, step), up(1, step)) == [[], []]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_lane_holds_as_many_operations_as_its_depth(depth: int) -> None:
    policy = Layerwise([0] * 5, depth=depth)
    launched = ready(policy, 4, 3, 2, 1, 0)
    assert [len(ops) for ops in launched] == [1] * depth + [0] * (5 - depth)
    assert done(policy, down(4)) == [[update(4), down(0)]]


def test_each_shard_is_a_lane_of_its_own() -> None:
    policy = Layerwise([0, 1, 0, 1], depth=1)
    ready(policy, 3, 2, 1, 0)
    assert done(policy, down(3), down(0), down(1), down(2)) == [
        [update(3), down(0)],
        [update(0), down(1)],
        [down(2)],
        [],
    ]
    assert done(policy, update(0)) == [[update(2), up(0)]]
    assert done(policy, update(3)) == [[update(1)]]


def test_both_directions_of_the_link_are_lanes_of_their_own() -> None:
    policy = Layerwise([0, 0, 0], depth=1)
    ready(policy, 2, 1)
    done(policy, down(2), down(1))
    assert done(policy, update(2)) == [[update(1), up(2)]]
    assert ready(policy, 0) == [[down(0)]]


def test_a_step_is_done_on_a_stream_when_its_last_layer_is() -> None:
    policy = Layerwise([0, 0])
    ready(policy, 1, 0)
    done(policy, down(1))
    assert not policy.all_done(WorkStream.D2H, 0)
    done(policy, down(0))
    assert policy.all_done(WorkStream.D2H, 0)
    assert not policy.all_done(WorkStream.CPU, 0)


@dataclass(kw_only=True)
class Playback:
    """Feeds a policy gradients, deepest layer first, and completions, in the order that `chance` draws.

    A layer's gradient of the next step comes only after its own delta is up: two steps then overlap.
    """

    policy: Policy
    shard_of_layer: Sequence[int]
    depth: int
    num_steps: int
    chance: random.Random
    in_flight: list[Op] = field(default_factory=list)
    launched: list[Op] = field(default_factory=list)
    finished: set[Op] = field(default_factory=set)
    gradients: int = 0

    @property
    def num_layers(self) -> int:
        return len(self.shard_of_layer)

    def run(self) -> None:
        while True:
            gradient = self.next_gradient()
            choices: list[GradientReady | OpDone] = [OpDone(op=op) for op in self.in_flight]
            choices += [gradient] if gradient else []
            if not choices:
                return
            self.feed(self.chance.choice(choices))

    def next_gradient(self) -> GradientReady | None:
        step, position = divmod(self.gradients, self.num_layers)
        layer = self.num_layers - 1 - position
        blocked = step > 0 and up(layer, step - 1) not in self.finished
        return None if step == self.num_steps or blocked else GradientReady(step=step, layer=layer)

    def feed(self, event: GradientReady | OpDone) -> None:
        if isinstance(event, OpDone):
            self.in_flight.remove(event.op)
            self.finished.add(event.op)
        else:
            self.gradients += 1
        for action in self.policy.handle(event):
            self.check(action.op)
            self.in_flight.append(action.op)
            self.launched.append(action.op)
        assert all(held <= self.depth for held in Counter(map(self.lane, self.in_flight)).values())

    def check(self, op: Op) -> None:
        if op.stream in PREVIOUS:
            assert Op(stream=PREVIOUS[op.stream], step=op.step, layer=op.layer) in self.finished
        else:
            assert op.step * self.num_layers + self.num_layers - 1 - op.layer < self.gradients

    def lane(self, op: Op) -> tuple[WorkStream, int]:
        return op.stream, self.shard_of_layer[op.layer] if op.stream is WorkStream.CPU else 0

    def waiting(self) -> list[Op]:
        """Operations whose predecessor is done, but which are not launched."""
        following = {before: after for after, before in PREVIOUS.items()}
        nexts = [
            Op(stream=following[op.stream], step=op.step, layer=op.layer)
            for op in self.finished
            if op.stream in following
        ]
        return [op for op in nexts if op not in self.launched]


class EagerPlayback(Playback):
    """Checks that no lane idles while an operation waits for it."""

    def feed(self, event: GradientReady | OpDone) -> None:
        super().feed(event)
        held = Counter(map(self.lane, self.in_flight))
        assert all(held[self.lane(op)] == self.depth for op in self.waiting())


class BarrierPlayback(Playback):
    """Checks Zero-Offload's order: a stream starts on a step when the stream before it has finished that step."""

    def check(self, op: Op) -> None:
        super().check(op)
        if op.stream in PREVIOUS:
            before = {Op(stream=PREVIOUS[op.stream], step=op.step, layer=layer) for layer in range(self.num_layers)}
            assert before <= self.finished


SHARDS = st.lists(st.integers(0, 2), min_size=1, max_size=7)
DEPTHS = st.integers(1, 3)
CHANCES = st.integers(0, 2**32 - 1).map(random.Random)


def assert_every_operation_ran_once(playback: Playback) -> None:
    layers, steps = range(playback.num_layers), range(playback.num_steps)
    expected = {kind(layer, step) for kind in (down, update, up) for layer in layers for step in steps}
    assert len(playback.launched) == len(expected)
    assert playback.finished == expected


@settings(deadline=None)
@given(shards=SHARDS, depth=DEPTHS, chance=CHANCES, transition=st.one_of(st.none(), st.integers(0, 7)))
def test_layerwise_runs_every_operation_once_and_never_idles_whatever_the_order_of_completions(
    shards: list[int], depth: int, chance: random.Random, transition: int | None
) -> None:
    policy = Layerwise(shards, depth=depth, transition_layer=transition)
    playback = EagerPlayback(policy=policy, shard_of_layer=shards, depth=depth, num_steps=4, chance=chance)
    playback.run()
    assert_every_operation_ran_once(playback)


@settings(deadline=None)
@given(shards=SHARDS, depth=DEPTHS, chance=CHANCES)
def test_sequential_runs_every_operation_once_behind_its_barriers_whatever_the_order_of_completions(
    shards: list[int], depth: int, chance: random.Random
) -> None:
    policy = Sequential(shards, depth=depth)
    playback = BarrierPlayback(policy=policy, shard_of_layer=shards, depth=depth, num_steps=4, chance=chance)
    playback.run()
    assert_every_operation_ran_once(playback)


@pytest.mark.parametrize("name", sorted(POLICIES))
@given(chance=CHANCES)
@settings(deadline=None, max_examples=10)
def test_the_same_events_give_the_same_actions(name: str, chance: random.Random) -> None:
    shards = [0, 1, 0, 1]
    state = chance.getstate()
    launched = []
    for _ in range(2):
        chance.setstate(state)
        playback = Playback(policy=POLICIES[name](shards), shard_of_layer=shards, depth=2, num_steps=2, chance=chance)
        playback.run()
        launched.append(playback.launched)
    assert launched[0] == launched[1]
