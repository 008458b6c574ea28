from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lsp_ray.config import GaloreConfig
from lsp_ray.device.judge import Judge
from lsp_ray.device.unit import Unit
from lsp_ray.errors import NonFiniteGradientError, NonFiniteLossError
from lsp_ray.methods.units import full_units
from lsp_ray.models.layers import find_layers
from lsp_ray.report.run_folder import read_run
from lsp_ray.runtime.actors.decided import SetupReport
from lsp_ray.runtime.actors.thread_workers import ThreadWorkers
from lsp_ray.runtime.prepare.job import Job, resumed
from tests.loopback import Loopback
from tests.test_worker import LEARNING_RATES, batch, distance, square_llama
from tests.tiny_jobs import Recorder, run_job, run_on_threads, saved_weights, tiny_job

REFITS: dict[str, Any] = {"check_every": 6, "max_bias": 0.0, "calibration_batches": 2}
BAD_STEPS = (2, 9)  # counted from 0; under REFITS new projectors take over in step 9


class Poison:
    """Lets the gradient, or the forward, of a block hold NaN in some steps."""

    def __init__(self, block: nn.Module, *, in_forward: bool = False) -> None:
        self.is_on = False
        if in_forward:
            block.register_forward_hook(lambda _module, _inputs, output: self._poisoned(output))
        else:
            block.register_full_backward_hook(lambda _module, gradients, _: tuple(map(self._poisoned, gradients)))

    def _poisoned(self, tensor: Any) -> Any:
        return tensor * math.nan if self.is_on and torch.is_tensor(tensor) else tensor


class PoisonedWorkers(ThreadWorkers):
    """Workers on whose device some steps are not finite."""

    in_forward = False

    def setup(self, on_progress: Callable[[str], None]) -> SetupReport:
        report = super().setup(on_progress)
        poison = Poison(self.side.worker.model.get_submodule("model.layers.1"), in_forward=self.in_forward)
        run_step = self.side.run_step

        class Side:  # what the compute thread calls, with the poison switched on in time
            def __getattr__(self, name: str) -> Any:
                return getattr(side, name)

            def run_step(self, step: int, host_slots: Any) -> Any:
                poison.is_on = step in BAD_STEPS
                return run_step(step, host_slots)

        side = self.side
        self.side = Side()  # type: ignore[assignment]
        return report


class WorkersWithLostLosses(PoisonedWorkers):
    in_forward = True


def run_poisoned(job: Job, folder: Path, workers_class: type[ThreadWorkers] = PoisonedWorkers) -> Recorder:
    workers = workers_class(job)
    try:
        return run_job(job, workers, folder)[1]
    finally:
        workers.close()


def weights(folder: Path, name: str, workers: type[ThreadWorkers], **changes: Any) -> dict[str, torch.Tensor]:
    job = tiny_job(folder, on_nonfinite="skip", max_steps=12, weight_decay=0.1, **changes)
    listener = run_poisoned(job, folder / name, workers)
    expected = [step for step in BAD_STEPS if workers is not ThreadWorkers]
    assert [metrics.step - 1 for metrics in listener.steps if metrics.grad_scale == 0.0] == expected
    assert json.loads((folder / name / "summary.json").read_text())["num_skipped"] == len(expected)
    assert_strict_json(folder / name)
    said = [note for note in listener.notes if " is skipped: " in note]
    assert said == [f"step {step + 1} is skipped: its loss or gradient is not finite" for step in expected]
    return saved_weights(job, folder / name)


def assert_strict_json(folder: Path) -> None:
    """Every line and file that others may read; a step that was skipped for its loss has none."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    lines = [json.loads(line, parse_constant=refuse) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] - 1 for line in lines if line["loss"] is None] in ([], list(BAD_STEPS))
    for file in (folder / "summary.json", *folder.glob("checkpoint-*/*.json"), *folder.glob("checkpoint-*/*/*.json")):
        json.loads(file.read_text(), parse_constant=refuse)
    steps = read_run(folder).steps
    assert [metrics.step for metrics in steps] == [line["step"] for line in lines if line["loss"] is not None]


def assert_same_bits(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert all(torch.isfinite(tensor).all() and torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def poisoned_run(native: bool, judge: Callable[[list[Unit]], Judge]) -> tuple[nn.Module, Loopback, Poison]:
    model = square_llama()
    units = full_units(find_layers(model))
    run = Loopback(
        model, units, learning_rates=LEARNING_RATES, weight_decay=0.1, native=native, judge=judge(list(units))
    )
    return model, run, Poison(model.get_submodule("model.layers.1"))


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("in_forward", [True, False])
def test_a_skipped_step_leaves_everything_as_if_it_had_not_been(native: bool, in_forward: bool) -> None:
    trained = []
    for runs_bad_step in (True, False):
        model, run, _ = poisoned_run(native, lambda units: Judge(units, skips=True))
        poison = Poison(model.get_submodule("model.layers.1"), in_forward=in_forward)
        for step in range(5):
            poison.is_on = step == 2
            if runs_bad_step or not poison.is_on:
                report = run.step(step, [batch(step), batch(step + 50)])
                assert (report.grad_scale == 0.0) == poison.is_on
        run.worker.flush()
        trained.append(model)
    assert distance(*trained) == 0.0


@pytest.mark.parametrize("native", [True, False])
def test_a_gradient_that_is_not_finite_stops_with_step_and_the_first_layers_name(native: bool) -> None:
    _, run, poison = poisoned_run(native, Judge)
    run.step(0, [batch(0)])
    poison.is_on = True  # what comes out of block 1 is bad: block 0 sees it first
    with pytest.raises(NonFiniteGradientError, match=r"^the gradient of layer \S*layers\.0 in step 1 is not finite"):
        run.step(1, [batch(1)])


@pytest.mark.parametrize("method", ["lsp", "zero_offload", "native", "lora", "galore"])
def test_a_run_stops_with_the_same_line_and_nothing_saved(tmp_path: Path, method: str) -> None:
    job = tiny_job(tmp_path, method=method, galore=GaloreConfig(rank=8))
    with pytest.raises(NonFiniteGradientError, match=r"^the gradient of layer \S+ in step 2 is not finite"):
        run_poisoned(job, tmp_path / "gradient")
    with pytest.raises(NonFiniteLossError, match=r"^loss of step 2 is nan"):
        run_poisoned(job, tmp_path / "loss", WorkersWithLostLosses)


@pytest.mark.parametrize("workers", [PoisonedWorkers, WorkersWithLostLosses])
def test_updates_that_are_taken_back_end_with_the_bits_of_native(tmp_path: Path, workers: type[ThreadWorkers]) -> None:
    native = weights(tmp_path, "native", workers, method="native")
    for shards, policy in ((2, "layerwise"), (1, "sequential")):
        runtime = {"num_shards": shards, "policy": policy, "payload_dtype": "float32"}
        assert_same_bits(weights(tmp_path, policy, workers, method="zero_offload", runtime=runtime), native)


@pytest.mark.parametrize(
    ("policies", "payload_dtype"),
    [(("layerwise", "earliest_deadline"), "bfloat16"), (("delayed", "delayed"), "int8")],
)
def test_a_skipped_step_amid_takeovers_depends_neither_on_shards_nor_on_the_policy(
    tmp_path: Path, policies: tuple[str, str], payload_dtype: str
) -> None:
    found = []
    for shards, policy in zip((1, 3), policies, strict=True):
        runtime = {"policy": policy, "num_shards": shards, "payload_dtype": payload_dtype}
        found.append(weights(tmp_path, str(shards), PoisonedWorkers, lsp=REFITS, runtime=runtime))
    assert_same_bits(*found)


def test_skipping_changes_no_bit_where_nothing_is_skipped(tmp_path: Path) -> None:
    skips = weights(tmp_path, "skips", ThreadWorkers)
    job = tiny_job(tmp_path, max_steps=12, weight_decay=0.1)
    run_on_threads(job, tmp_path / "stops")
    assert_same_bits(skips, saved_weights(job, tmp_path / "stops"))


@pytest.mark.parametrize("policy", ["layerwise", "delayed"])
def test_a_run_that_skipped_goes_on_bit_for_bit_and_may_begin_to_skip(tmp_path: Path, policy: str) -> None:
    changes: dict[str, Any] = {"max_steps": 5, "weight_decay": 0.1, "runtime": {"policy": policy}}
    job = tiny_job(tmp_path, on_nonfinite="skip", save_steps=1, save_total_limit=None, **changes)
    run_poisoned(job, tmp_path / "whole")
    again = resumed(tiny_job(tmp_path, **changes), tmp_path / "whole" / "checkpoint-3")
    run_on_threads(again, tmp_path / "again")
    for folder in ("whole", "again"):
        assert_strict_json(tmp_path / folder)
    assert (tmp_path / "again" / "metrics.jsonl").read_text().count("\n") == 5
    assert_same_bits(saved_weights(again, tmp_path / "again"), saved_weights(job, tmp_path / "whole"))
