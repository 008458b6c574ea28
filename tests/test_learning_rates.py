from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import SchedulerType as TransformersSchedulerType
from transformers import get_scheduler

from lsp_ray.config import RunConfig, SchedulerType
from lsp_ray.errors import ConfigError
from lsp_ray.runtime.prepare.job import resumed
from lsp_ray.runtime.prepare.learning_rates import learning_rates
from tests.test_resume import lines
from tests.tiny_jobs import run_on_threads, tiny_job

NUM_STEPS, ACCUMULATION, RESUMED_AT = 17, 3, 7
LOOK_AT_LOSSES = {"reduce_lr_on_plateau", "greedy"}
KWARGS: dict[str, tuple[dict[str, Any] | None, ...]] = {
    "cosine": (None, {"num_cycles": 1.5}),
    "cosine_with_restarts": (None, {"num_cycles": 3}),
    "polynomial": (None, {"power": 2.0, "lr_end": 1e-5}),
    "inverse_sqrt": (None, {"timescale": 5}),
    "cosine_with_min_lr": ({"min_lr_rate": 0.1}, {"min_lr": 1e-5, "num_cycles": 0.75}),
    "cosine_warmup_with_min_lr": ({"min_lr_rate": 0.1, "warmup_lr_rate": 0.05},),
    "warmup_stable_decay": (
        {"num_decay_steps": 6},
        {"num_decay_steps": 4, "decay_type": "1-sqrt", "min_lr_ratio": 0.1},
    ),
}


def reference(name: str, warmup_steps: int, kwargs: dict[str, Any] | None) -> list[float]:
    """The rates of a training loop of micro-batches that is broken off once and goes on from what it saved."""

    def new() -> tuple[torch.optim.Optimizer, Any]:
        optimizer = torch.optim.AdamW([weight], lr=3e-3)
        return optimizer, get_scheduler(name, optimizer, warmup_steps, NUM_STEPS, kwargs)

    weight = torch.nn.Parameter(torch.ones(3))
    optimizer, scheduler = new()
    rates = []
    for micro_batch in range(NUM_STEPS * ACCUMULATION):
        (weight.sum() / ACCUMULATION).backward()
        if (micro_batch + 1) % ACCUMULATION == 0:
            rates.append(float(optimizer.param_groups[0]["lr"]))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            if len(rates) == RESUMED_AT:
                saved = optimizer.state_dict(), scheduler.state_dict()
                optimizer, scheduler = new()
                optimizer.load_state_dict(saved[0])
                scheduler.load_state_dict(saved[1])
    return rates


@pytest.mark.parametrize("warmup_steps", [0, 4])
@pytest.mark.parametrize("name", get_args(SchedulerType))
def test_every_schedule_is_transformers_own_to_the_bit(name: SchedulerType, warmup_steps: int) -> None:
    for kwargs in KWARGS.get(name, (None,)):
        config = RunConfig(
            learning_rate=3e-3, lr_scheduler_type=name, warmup_steps=warmup_steps, lr_scheduler_kwargs=kwargs
        )
        assert list(learning_rates(config, NUM_STEPS)) == reference(name, warmup_steps, kwargs)


def test_every_name_of_transformers_that_follows_from_the_step_is_taken() -> None:
    assert {kind.value for kind in TransformersSchedulerType} - LOOK_AT_LOSSES == set(get_args(SchedulerType))


def test_a_run_and_its_continuation_follow_the_schedule(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "method": "native",
        "gradient_accumulation_steps": 2,
        "warmup_steps": 2,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1, "num_cycles": 0.75},
    }
    job = tiny_job(tmp_path, save_steps=3, **changes)
    run_on_threads(job, tmp_path / "out")
    assert [line["learning_rate"] for line in lines(tmp_path / "out")] == list(job.learning_rates)
    run_on_threads(resumed(job, tmp_path / "out" / "checkpoint-3"), tmp_path / "again")
    assert [line["learning_rate"] for line in lines(tmp_path / "again")] == list(job.learning_rates)
    for kwargs in (None, {"min_lr_rate": 0.1}):
        other = tiny_job(tmp_path, **{**changes, "lr_scheduler_kwargs": kwargs or {"min_lr": 1e-4}})
        with pytest.raises(ConfigError, match=r"^lr_scheduler_kwargs must be \{.*'num_cycles': 0\.75\} as it was at"):
            resumed(other, tmp_path / "out" / "checkpoint-3")


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("constant", {"num_cycles": 2}, r"be left out where lr_scheduler_type is constant, got \{'num_cycles': 2\}"),
        ("linear", {"num_cycles": 2}, r"be what transformers' linear takes \(.*unexpected keyword .*'num_cycles'"),
        ("cosine_with_min_lr", None, r"be what .* takes \(One of min_lr or min_lr_rate should be set .*, got None"),
        ("warmup_stable_decay", None, r"be what .* takes \(.*'num_decay_steps'\), got None"),
        ("inverse_sqrt", {"timescale": 0}, r"be what .* takes \(.*zero\), got"),
        ("cosine", {"num_cycles": "two"}, r"be what .* takes \(.*\), got \{'num_cycles': 'two'\}"),
        ("cosine", {"last_epoch": 3}, r"be what .* takes \(.*initial_lr.*\), got"),
        ("polynomial", {"lr_end": -1.0}, r"be what .* takes \(step \d+ has the learning rate -.*\), got"),
        ("polynomial", {"power": float("nan")}, r"be what .* takes \(step 2 has the learning rate nan\), got"),
    ],
)
def test_arguments_that_no_schedule_takes_are_one_line(
    name: SchedulerType, kwargs: dict[str, Any] | None, message: str
) -> None:
    config = RunConfig(lr_scheduler_type=name, lr_scheduler_kwargs=kwargs)
    with pytest.raises(ConfigError, match=rf"^lr_scheduler_kwargs must {message}") as caught:
        learning_rates(config, NUM_STEPS)
    assert "\n" not in str(caught.value)
