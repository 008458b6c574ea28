"""Policies that launch updates before their step is judged."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lsp_ray.schedule.ops import Event, GradientReady, Op, OpDone, StepJudged
from lsp_ray.schedule.policy import POLICIES, Layerwise, Policy
from lsp_ray.trace import WorkStream


def op(stream: WorkStream, layer: int, step: int = 0) -> Op:
    return Op(stream=stream, step=step, layer=layer)


def down(layer: int, step: int = 0) -> Op:
    return op(WorkStream.D2H, layer, step)


def update(layer: int, step: int = 0) -> Op:
    return op(WorkStream.CPU, layer, step)


def up(layer: int, step: int = 0) -> Op:
    return op(WorkStream.H2D, layer, step)


def answers(policy: Policy, *events: Event) -> list[list[Op]]:
    return [[action.op for action in policy.handle(event)] for event in events]


def with_one_update_done_one_under_way_and_one_payload_to_come() -> Policy:
    policy = Layerwise([0] * 3, depth=1, speculates=True)
    answers(policy, *(GradientReady(step=0, layer=layer) for layer in (2, 1, 0)))
    launched = answers(policy, *(OpDone(op=one) for one in (down(2), update(2), down(0))))
    assert launched == [[update(2), down(0)], [], [update(0), down(1)]]  # nothing goes up yet
    return policy


def test_what_stands_goes_up_once_that_is_known() -> None:
    policy = with_one_update_done_one_under_way_and_one_payload_to_come()
    assert answers(policy, StepJudged(step=0, stands=True)) == [[up(2)]]
    assert answers(policy, OpDone(op=update(0)), OpDone(op=down(1))) == [[], [update(1)]]
    assert answers(policy, OpDone(op=up(2)), OpDone(op=update(1))) == [[up(0)], []]


def test_what_does_not_stand_is_updated_again_before_it_goes_up() -> None:
    policy = with_one_update_done_one_under_way_and_one_payload_to_come()
    assert answers(policy, StepJudged(step=0, stands=False)) == [[]]  # the lane is taken
    assert answers(policy, OpDone(op=update(0))) == [[update(0)]]  # ended, but with gradients that were not scaled
    assert answers(policy, OpDone(op=update(0))) == [[update(2), up(0)]]
    assert answers(policy, OpDone(op=down(1)), OpDone(op=update(2)), OpDone(op=up(0))) == [[], [update(1)], [up(2)]]
    assert answers(policy, OpDone(op=update(1)), OpDone(op=up(2))) == [[], [up(1)]]  # launched late enough: once


def test_a_payload_of_the_next_step_waits_until_the_one_before_is_judged() -> None:
    policy = Layerwise([0], speculates=True)
    answers(policy, GradientReady(step=0, layer=0), OpDone(op=down(0)), OpDone(op=update(0)))
    assert answers(policy, GradientReady(step=1, layer=0)) == [[]]  # as under a stale policy
    assert answers(policy, StepJudged(step=0, stands=False)) == [[update(0)]]
    assert answers(policy, OpDone(op=update(0))) == [[down(0, step=1), up(0)]]


@dataclass(kw_only=True)
class Playback:
    """A device that goes on only with deltas of judged steps, and operations that end in an order that chance draws."""

    policy: Policy
    num_layers: int
    stands: list[bool]
    chance: random.Random
    in_flight: list[Op] = field(default_factory=list)
    begun_judged: dict[Op, bool] = field(default_factory=dict)
    has_final: set[Op] = field(default_factory=set)
    up: set[Op] = field(default_factory=set)
    num_judged: int = 0

    def run(self) -> None:
        for step in range(len(self.stands)):
            for layer in reversed(range(self.num_layers)):
                while step > self.policy.staleness and up(layer, step - 1 - self.policy.staleness) not in self.up:
                    self.end_one()
                while self.in_flight and self.chance.random() < 0.5:
                    self.end_one()
                self.feed(GradientReady(step=step, layer=layer))
            self.num_judged = step + 1
            self.feed(StepJudged(step=step, stands=self.stands[step]))
        while self.in_flight:
            self.end_one()

    def end_one(self) -> None:
        ended = self.in_flight.pop(self.chance.randrange(len(self.in_flight)))
        if ended.stream is WorkStream.CPU and (self.stands[ended.step] or self.begun_judged[ended]):
            self.has_final.add(ended)
        if ended.stream is WorkStream.H2D:
            self.up.add(ended)
        self.feed(OpDone(op=ended))

    def feed(self, event: Event) -> None:
        for action in self.policy.handle(event):
            new = action.op
            assert new not in self.in_flight
            is_judged = new.step < self.num_judged
            if new.stream is WorkStream.CPU:
                assert new not in self.has_final
                self.begun_judged[new] = is_judged
            if new.stream is WorkStream.H2D:
                assert is_judged
                assert update(new.layer, new.step) in self.has_final
                assert new not in self.up
            if new.stream is WorkStream.D2H and new.step:  # it overwrites what an update may need again
                assert update(new.layer, new.step - 1) in self.has_final
                assert new.step - 1 < self.num_judged
            self.in_flight.append(new)


@pytest.mark.parametrize("name", sorted(POLICIES))
@settings(deadline=None, max_examples=40)
@given(
    shards=st.lists(st.integers(0, 2), min_size=1, max_size=6),
    stands=st.lists(st.booleans(), min_size=1, max_size=4),
    depth=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_delta_goes_up_once_from_an_update_that_holds(
    name: str, shards: list[int], stands: list[bool], depth: int, seed: int
) -> None:
    policy = POLICIES[name](shards, depth=depth, speculates=True)
    playback = Playback(policy=policy, num_layers=len(shards), stands=stands, chance=random.Random(seed))
    playback.run()
    assert playback.up == {up(layer, step) for layer in range(len(shards)) for step in range(len(stands))}
