"""Steps of several parts: the same as one large batch, whoever computes them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lsp_ray.config import RunConfig
from lsp_ray.errors import ConfigError
from lsp_ray.optim.adamw import AdamWHyper
from lsp_ray.optim.parts import square_sum
from lsp_ray.optim.shard import OptimizerShard
from lsp_ray.runtime.prepare.job import resumed
from lsp_ray.schedule.delta_room import DeltaRoom
from lsp_ray.schedule.ops import DeltaDue, Event, GradientReady, Op, OpDone, StepJudged, StepRun
from lsp_ray.schedule.policy import POLICIES, Policy
from lsp_ray.sim.store import singly
from lsp_ray.trace import WorkStream
from tests.tiny_jobs import assert_same_bits, run_on_threads, saved_weights, tiny_job, weights_after

FLOAT32 = {"payload_dtype": "float32"}


@pytest.mark.parametrize("lsp", [{}, {"delta": "apart"}])
def test_two_parts_are_two_micro_batches_to_the_bit_in_float32(tmp_path: Path, lsp: dict[str, str]) -> None:
    same: dict[str, Any] = {"per_device_train_batch_size": 4, "runtime": FLOAT32, "lsp": lsp}
    in_turn = weights_after(tmp_path, "accumulated", gradient_accumulation_steps=2, **same)
    assert_same_bits(weights_after(tmp_path, "parts", num_replicas=2, **same), in_turn)


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_accumulation_steps": 2, "runtime": FLOAT32},
        {"method": "zero_offload", "runtime": FLOAT32},
        {"runtime": FLOAT32 | {"policy": "delayed"}},
        {"lsp": {"check_every": 4, "max_bias": 0.0, "calibration_batches": 1}, "runtime": FLOAT32},
    ],
    ids=["accumulated", "zero_offload", "delayed", "refits"],
)
def test_three_parts_train_as_three_micro_batches_do(tmp_path: Path, changes: dict[str, Any]) -> None:
    times = changes.get("gradient_accumulation_steps", 1)
    accumulated = {**changes, "gradient_accumulation_steps": 3 * times}
    refits = "lsp" in changes
    reference = weights_after(tmp_path, "accumulated", max_steps=4 if refits else 6, **accumulated)
    ours = weights_after(tmp_path, "parts", num_replicas=3, max_steps=4 if refits else 6, **changes)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, reference[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("max_grad_norm", [0.05, 1e9])
def test_the_norm_is_that_of_the_sum_and_clips_it(tmp_path: Path, max_grad_norm: float) -> None:
    same: dict[str, Any] = {"runtime": FLOAT32, "max_grad_norm": max_grad_norm, "max_steps": 4}
    one = tiny_job(tmp_path, gradient_accumulation_steps=2, **same)
    two = tiny_job(tmp_path, num_replicas=2, **same)
    (summary, expected), (_, found) = (run_on_threads(job, tmp_path / f"o{n}") for n, job in enumerate((one, two)))
    assert (summary.num_clipped > 0) is (max_grad_norm < 1.0)
    for ours, theirs in zip(found.steps, expected.steps, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-6)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-5)
        assert ours.grad_scale == pytest.approx(theirs.grad_scale, rel=1e-5)
        assert ours.bytes_d2h == 2 * theirs.bytes_d2h
        assert ours.bytes_h2d == theirs.bytes_h2d
    weights = saved_weights(two, tmp_path / "o1")
    for name, tensor in saved_weights(one, tmp_path / "o0").items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-6)


def test_a_resumed_run_of_parts_has_the_same_bits_and_keeps_their_number(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"num_replicas": 2, "save_steps": 3, "max_steps": 6, "max_grad_norm": 0.05, "bf16": True}
    job = tiny_job(tmp_path, **changes)
    run_on_threads(job, tmp_path / "whole")
    again = resumed(job, tmp_path / "whole" / "checkpoint-3")
    (tmp_path / "rest").mkdir()
    run_on_threads(again, tmp_path / "rest")
    assert_same_bits(saved_weights(job, tmp_path / "rest"), saved_weights(job, tmp_path / "whole"))
    with pytest.raises(ConfigError, match="num_replicas"):
        resumed(tiny_job(tmp_path, **changes | {"num_replicas": 1}), tmp_path / "whole" / "checkpoint-3")


def test_a_method_that_sends_nothing_has_no_parts() -> None:
    with pytest.raises(ConfigError, match="num_replicas must be 1 with method native"):
        RunConfig(method="native", num_replicas=2)


# sums


@pytest.mark.parametrize("numel", [1, 4096, 10_001])
def test_a_square_sum_is_the_norms_square_and_the_same_with_any_threads(numel: int) -> None:
    values = torch.randn(numel, generator=torch.Generator().manual_seed(numel))
    assert square_sum(values) == pytest.approx(float(values.double().norm()) ** 2)
    before, found = torch.get_num_threads(), set()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.add(square_sum(values))
    torch.set_num_threads(before)
    assert len(found) == 1
    assert square_sum(torch.tensor([1e30, 2e30])) == pytest.approx(5e60)
    assert square_sum(torch.tensor([1.0, float("nan")])) != square_sum(torch.tensor([1.0, float("nan")]))


def test_an_update_of_parts_is_adams_of_their_sum() -> None:
    numel = 2**19 + 77
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(numel, generator=generator) for _ in range(4)]
    ours, delta = torch.nn.Parameter(torch.zeros(numel)), torch.empty(numel)
    shard = OptimizerShard({0: numel}, parts=singly(range(4)))
    optimizer = torch.optim.AdamW([ours], lr=1.0, weight_decay=0.0, eps=AdamWHyper().eps)
    for step in range(3):
        ours.grad = (parts[0] + parts[1]) + (parts[2] + parts[3])
        before = ours.detach().clone()
        optimizer.step()
        squares = shard.update(0, parts, delta, learning_rate=1.0)
        assert squares == pytest.approx(float(ours.grad.double().norm()) ** 2)
        torch.testing.assert_close(delta, ours.detach() - before, rtol=1e-5, atol=1e-5)
        parts = [part * (step + 2) for part in parts]
    assert (
        shard.update(0, [torch.tensor([float("nan")]).expand(numel), *parts[1:]], delta, learning_rate=1.0) is not None
    )
    assert not delta.any()


# the policy


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(POLICIES)),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(1, 2),
    st.booleans(),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_every_gpu_gets_every_delta_once_after_all_parts_are_down(
    name: str,
    num_gpus: int,
    num_layers: int,
    parts_each: int,
    num_shards: int,
    speculates: bool,
    is_bounded: bool,
    seed: int,
) -> None:
    chance = random.Random(seed)
    gpu_of_part = [gpu for gpu in range(num_gpus) for _ in range(chance.randint(1, parts_each))]
    shards = [layer % num_shards for layer in range(num_layers)]
    room = DeltaRoom(sizes=(1,) * num_layers, num_bytes=2) if is_bounded else None
    policy = POLICIES[name](shards, speculates=speculates, room=room, gpu_of_part=gpu_of_part)
    run = RandomRun(policy, gpu_of_part, num_gpus, chance)
    run.train(num_steps=4)
    expected = [(step, layer) for step in range(4) for layer in range(num_layers)]
    assert [sorted(found) for found in run.up] == [expected] * num_gpus


class RandomRun:
    """GPUs that compute, lanes that execute what a policy launched, in random order."""

    def __init__(self, policy: Policy, gpu_of_part: list[int], num_gpus: int, chance: random.Random) -> None:
        self._policy, self._gpu_of_part, self._chance = policy, gpu_of_part, chance
        self._parts = [[part for part, gpu in enumerate(gpu_of_part) if gpu == own] for own in range(num_gpus)]
        self.up: list[set[tuple[int, int]]] = [set() for _ in range(num_gpus)]
        self._launched: list[Op] = []
        self._down: set[tuple[int, int, int]] = set()
        self._updated: set[tuple[int, int]] = set()
        self._num_over: list[int] = []  # of the steps, GPUs whose backward is over
        self._judged: set[int] = set()

    def train(self, num_steps: int) -> None:
        self._num_over = [0] * num_steps
        gpus = [self._gpu(own, num_steps) for own in range(len(self._parts))]
        live = list(range(len(gpus)))
        while live or self._launched:
            choices: list[tuple[str, int]] = [("gpu", own) for own in live]
            choices += [("op", at) for at in range(len(self._launched))]
            kind, at = self._chance.choice(choices)
            if kind == "op":
                self._execute(self._launched.pop(at))
            elif next(gpus[at], "over") == "over":
                live.remove(at)
        assert not self._launched

    def _gpu(self, own: int, num_steps: int) -> Iterator[None]:
        for step in range(num_steps):
            yield from self._wait_for_all(own, step - 1 - self._policy.staleness)
            for part in self._parts[own]:
                for layer in reversed(range(self._policy.num_layers)):
                    self._tell(GradientReady(step=step, layer=layer, part=part))
                    yield
            self._num_over[step] += 1
            if len(self._parts) > 1 and self._num_over[step] == len(self._parts):
                self._tell(StepRun(step=step))
            if self._policy.speculates and self._num_over[step] == len(self._parts):
                self._judged.add(step)
                self._tell(StepJudged(step=step, stands=self._chance.random() < 0.7))
        for step in range(num_steps - 1 - self._policy.staleness, num_steps):
            yield from self._wait_for_all(own, step)

    def _wait_for_all(self, own: int, step: int) -> Iterator[None]:
        for layer in range(self._policy.num_layers) if step >= 0 else ():
            yield from self._awaits(own, step, layer)

    def _awaits(self, own: int, step: int, layer: int) -> Iterator[None]:
        if self._policy.room is not None:
            self._tell(DeltaDue(step=step, layer=layer, gpu=own))
        waited = 0
        while (step, layer) not in self.up[own]:
            waited += 1
            assert waited < 100_000, "a GPU waits for a delta that does not come"
            yield

    def _tell(self, event: Event) -> None:
        self._launched += [action.op for action in self._policy.handle(event)]

    def _execute(self, op: Op) -> None:
        where = op.step, op.layer
        match op.stream:
            case WorkStream.D2H:
                assert op.step == 0 or (op.step - 1, op.layer) in self._updated, "the slot had not been read"
                self._down.add((*where, op.part))
            case WorkStream.CPU:
                assert all((*where, part) in self._down for part in range(len(self._gpu_of_part)))
                before = op.step - 1, op.layer
                assert op.step == 0 or all(before in up for up in self.up), "the slot had not been read by all"
                self._updated.add(where)
            case WorkStream.H2D:
                assert where in self._updated
                assert not self._policy.speculates or op.step in self._judged
                assert where not in self.up[op.part], "came up twice"
                self.up[op.part].add(where)
        self._tell(OpDone(op=op))
