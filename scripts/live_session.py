"""LiveSession: workers that stay up and run blocks of steps, each in an order and behind a throttle of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from datasets import Dataset

from lsp_ray.config import PolicyName, RunConfig
from lsp_ray.data.dataset import load_rows
from lsp_ray.data.tokenize import IGNORED, TokenizedRows, tokenize_rows
from lsp_ray.models.load import load_tokenizer
from lsp_ray.models.resolve import resolve_model
from lsp_ray.runtime.actors.ray_workers import RayWorkers
from lsp_ray.runtime.actors.thread_workers import ThreadWorkers
from lsp_ray.runtime.actors.throttle import Throttle
from lsp_ray.runtime.drive.driver import Driver
from lsp_ray.runtime.drive.ledger import ClosedStep
from lsp_ray.runtime.drive.step_judge import StepJudge
from lsp_ray.runtime.prepare.job import Job
from lsp_ray.schedule.ops import LayerSeconds
from lsp_ray.schedule.policy import POLICIES, Policy

_NUM_ROWS = 400  # of which one is chosen


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """What each step of a block took, seconds, and medians of what its layers cost; none where nothing is sent."""

    step_times_s: tuple[float, ...]
    waits_s: tuple[float, ...]
    layers: tuple[LayerSeconds, ...]

    @property
    def step_s(self) -> float:
        """Median."""
        return median(self.step_times_s)


class LiveSession:
    """Sets the workers up; leave by `close`.

    Args:
        job: The run.
        start: Starts its workers; Ray's need Ray running.

    Attributes:
        emulated: The throttle of the job's `runtime.emulate`; none where it emulates nothing.
        payload_sizes: Of the job.
    """

    def __init__(self, job: Job, start: Callable[[Job], RayWorkers | ThreadWorkers]) -> None:
        self._job = job
        self._workers = start(job)
        self._policies: dict[PolicyName, Policy] = {}  # what one has learned of the layers stays for its next block
        self._num_run = 0
        self.payload_sizes = job.payload_sizes
        self.emulated = self._workers.setup(lambda _text: None).throttle

    def run(self, name: PolicyName, throttle: Throttle, num_steps: int) -> Block:
        """Run one step that does not count, as its forward finds every delta there, and `num_steps` that do."""
        self._workers.keep_to(throttle)
        layout, num_sent = self._job.layout, len(self.payload_sizes)
        owners = layout.shard_of_unit if num_sent else ()
        fresh = POLICIES[name](
            owners, room=self._job.delta_room, gpu_of_part=layout.gpu_of_part, home_of_layer=layout.home_of_unit
        )
        policy = self._policies.setdefault(name, fresh)
        first, num_parts = self._num_run, len(layout.gpu_of_part)
        judge = StepJudge(num_sent, num_parts=num_parts, num_gpus=layout.num_gpus, first_step=first)
        closed: list[ClosedStep] = []
        rates = self._job.learning_rates
        driver = Driver(self._workers, policy, rates, judge=judge, on_step=closed.append, first_step=first)
        self._num_run += 1 + num_steps
        driver.train(self._num_run)
        counted = [step.metrics for step in closed[1:]]
        return Block(
            step_times_s=tuple(metrics.step_time_s for metrics in counted),
            waits_s=tuple(metrics.exposed_s for metrics in counted),
            layers=driver.times.medians() if self.payload_sizes else (),
        )

    def save(self, folder: Path) -> None:
        """Write the model, every delta added."""
        self._workers.save(folder)

    def close(self) -> None:
        """End the workers."""
        self._workers.close()


def alike_rows(config: RunConfig) -> TokenizedRows:
    """One row of the run's data over and over, so that no step takes longer than another for its batch.

    It is as long as rows may be, and of those the one with the median number of targets.
    """
    tokenizer = load_tokenizer(resolve_model(config.model_name_or_path, log=lambda _line: None))
    rows = load_rows(config.dataset, seed=config.seed)
    some = replace(rows, train=rows.train.select(range(_NUM_ROWS)), eval=rows.eval.select(range(8)))
    tokenized = tokenize_rows(some, tokenizer, max_seq_length=config.max_seq_length)
    full = [row for row in tokenized.train if len(row["input_ids"]) == config.max_seq_length]
    chosen = sorted(full, key=num_row_targets)[len(full) // 2]
    return replace(tokenized, train=Dataset.from_list([chosen] * config.per_device_train_batch_size))


def num_row_targets(row: Mapping[str, Sequence[Any]]) -> int:
    """Predictions of a row that count; its first token is none."""
    return sum(label != IGNORED for label in row["labels"][1:])
