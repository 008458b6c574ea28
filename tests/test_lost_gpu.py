"""Whatever of a GPU's messages came before it was lost, the driver makes every step, each once.

Messages of one lane keep their order, those of different lanes need not.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lsp_ray.device.step_report import StepReport
from lsp_ray.errors import GpuLostError, WorkerLostError
from lsp_ray.runtime.actors.ray_workers import RayWorkers
from lsp_ray.runtime.drive.driver import Completion, Driver
from lsp_ray.runtime.drive.ledger import ClosedStep, OpReport
from lsp_ray.runtime.drive.step_judge import StepJudge
from lsp_ray.schedule.ops import GradientReady, Op
from lsp_ray.schedule.policy import POLICIES
from lsp_ray.trace import Span, WorkStream

NUM_GPUS, NUM_STEPS = 2, 8
LANES = ("news", "compute", "d2h", "h2d")


def step_report(step: int, gpu: int) -> StepReport:
    more: dict[str, Any] = {"num_tokens": 1, "waits": (), "grad_norm": 1.0, "grad_scale": 1.0, "bias": None}
    more |= {
        "start_s": float(step),
        "end_s": step + 1.0,
        "forward_s": 0.1,
        "backward_s": 0.2,
        "peak_device_bytes": None,
    }
    return StepReport(step=step, losses={gpu: 1.0}, **more)


def op_report(op: Op) -> OpReport:
    span = Span(stream=op.stream, step=op.step, layer=op.layer, start_s=0.0, end_s=0.1, part=op.part)
    return OpReport(span=span, square_sum=1.0 if op.stream is WorkStream.CPU else None)


@dataclass
class Gpu:
    """Runs steps one by one, each once all deltas of the one before are up."""

    number: int
    num_layers: int
    next_step: int = 0
    started: deque[int] = field(default_factory=deque)
    up: set[tuple[int, int]] = field(default_factory=set)
    lanes: dict[str, deque[Completion]] = field(default_factory=lambda: {name: deque() for name in LANES})

    def go_on(self) -> None:
        while self.started and all((self.started[0] - 1, layer) in self.up for layer in range(self.num_layers)):
            self.next_step = self.started.popleft()
            for layer in reversed(range(self.num_layers)):
                self.lanes["news"].append(GradientReady(step=self.next_step, layer=layer, part=self.number))
            self.lanes["compute"].append(step_report(self.next_step, self.number))
            self.next_step += 1


class LossyWorkers:
    """GPUs and a shard without time: chance says who speaks next, when a GPU is lost and what of it was heard."""

    def __init__(self, num_layers: int, chance: random.Random, num_losses: int) -> None:
        self._num_layers, self._chance, self._num_losses = num_layers, chance, num_losses
        self.gpus = [self._new(gpu, 0) for gpu in range(NUM_GPUS)]
        self._shard: deque[Completion] = deque()
        self._lost: int | None = None

    def _new(self, gpu: int, step: int) -> Gpu:
        own = Gpu(number=gpu, num_layers=self._num_layers, next_step=step)
        own.up |= {(step - 1, layer) for layer in range(self._num_layers)}
        return own

    def start_step(self, step: int) -> None:
        for gpu in self.gpus:
            if gpu.number != self._lost:
                gpu.started.append(step)

    def drain(self) -> None:
        raise AssertionError("deltas are not bounded")

    def launch(self, op: Op, grad_scale: float = 1.0) -> None:
        if op.stream is WorkStream.CPU:
            self._shard.append(op_report(op))
        elif op.part != self._lost:
            gpu = self.gpus[op.part]
            gpu.lanes[str(op.stream)].append(op_report(op))
            if op.stream is WorkStream.H2D:
                assert (op.step, op.layer) not in gpu.up, "a delta comes up once"
                gpu.up.add((op.step, op.layer))

    def next_completions(self) -> list[Completion]:
        for gpu in self.gpus:
            if gpu.number != self._lost:
                gpu.go_on()
        if self._lost is None and self._num_losses and self._chance.random() < 0.05:
            self._num_losses -= 1
            self._lost = self._chance.randrange(NUM_GPUS)
            for messages in self.gpus[self._lost].lanes.values():
                for _ in range(self._chance.randint(0, len(messages))):
                    messages.pop()
            raise GpuLostError("lost", self._lost)
        speaking = [lane for gpu in self.gpus for lane in gpu.lanes.values() if lane and gpu.number != self._lost]
        speaking += [self._shard] if self._shard else []
        assert speaking, "the run hangs"
        return [self._chance.choice(speaking).popleft()]

    def forget(self, gpu: int) -> list[Completion]:
        return [message for messages in self.gpus[gpu].lanes.values() for message in messages]

    def can_replace(self, gpu: int, step: int) -> bool:
        return True

    def is_idle(self) -> bool:
        others = [gpu for gpu in self.gpus if gpu.number != self._lost]
        return not self._shard and not any(gpu.lanes[name] for gpu in others for name in ("d2h", "h2d"))

    def replace(self, gpu: int, step: int) -> None:
        donor = self.gpus[1 - gpu]
        assert (step, 0) not in donor.up, "the other one is past the step"
        assert gpu == self._lost
        self._lost = None
        self.gpus[gpu] = self._new(gpu, step)

    def start_again(self, gpu: int, steps: range, *, drains: bool) -> None:
        self.gpus[gpu].started.extend(steps)


@given(
    policy=st.sampled_from(["layerwise", "sequential"]),
    num_layers=st.integers(1, 4),
    seed=st.integers(0, 10**6),
    num_losses=st.integers(0, 2),
)
def test_no_message_that_is_missing_makes_a_run_hang_or_miss_a_step(
    policy: Any, num_layers: int, seed: int, num_losses: int
) -> None:
    workers = LossyWorkers(num_layers, random.Random(seed), num_losses)
    closed: list[ClosedStep] = []
    driver = Driver(
        workers,
        POLICIES[policy]([0] * num_layers, gpu_of_part=tuple(range(NUM_GPUS))),
        [0.1] * NUM_STEPS,
        judge=StepJudge(num_layers, num_parts=NUM_GPUS, num_gpus=NUM_GPUS),
        on_step=closed.append,
    )
    try:
        driver.train(NUM_STEPS)
    except GpuLostError:  # before anybody could take its place: a run goes back to its checkpoint
        return
    assert [step.metrics.step for step in closed] == list(range(1, NUM_STEPS + 1))
    assert all(gpu.next_step == NUM_STEPS for gpu in workers.gpus)


class _Pool:
    def __init__(self, lanes: list[Any]) -> None:
        self.lanes, self.copying = lanes, lanes

    def gpu_of(self, lane: Any) -> int:
        return self.lanes.index(lane)


class _Watch:
    """As the test says what is ready."""

    def __init__(self, lanes: list[Any]) -> None:
        self.lanes = lanes
        self.ready: list[Any] = []

    def wait(self, _timeout_s: float) -> list[Any]:
        return self.ready


def test_what_has_come_before_a_gpu_is_lost_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    said = [GradientReady(step=0, layer=layer) for layer in range(3)]
    alive, lost = SimpleNamespace(said=deque(said[:1])), SimpleNamespace(said=deque(said[1:]))
    workers = RayWorkers.__new__(RayWorkers)
    workers._untold = None
    workers._job = SimpleNamespace(layout=SimpleNamespace(num_gpus=2))  # type: ignore[assignment]
    workers._gpus, workers._shards, workers._completion_timeout_s = _Pool([alive, lost]), None, 1.0  # type: ignore[assignment]

    def told(lane: Any) -> list[Completion]:
        if not lane.said:
            raise WorkerLostError("lost")
        completion = lane.said.popleft()
        lane.holds_more = lane is lost  # as if the beginning of a message had come as well
        return [completion]

    workers._watch = watch = _Watch([alive, lost])  # type: ignore[assignment]
    monkeypatch.setattr(workers, "_told", told, raising=False)
    watch.ready = [alive, lost]
    assert workers.next_completions() == said
    watch.ready = [lost]
    with pytest.raises(GpuLostError):
        workers.next_completions()
