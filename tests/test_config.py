"""Values that cannot work are refused with the field, the bound and the value; errors cross processes."""

from __future__ import annotations

import math
import pickle
from dataclasses import FrozenInstanceError
from typing import Any, get_args

import pytest

from lsp_ray.config import GaloreConfig, LoraConfig, LspConfig, Method, PolicyName, RunConfig, RuntimeConfig
from lsp_ray.errors import (
    ConfigError,
    DeadlineError,
    LspRayError,
    NonFiniteLossError,
    StaleSlotError,
    WorkerLostError,
)
from lsp_ray.hardware import MACHINES, EmulatedMachine
from lsp_ray.schedule.policy import POLICIES

BAD_LSP: list[tuple[dict[str, Any], str, str, object]] = [
    ({"subspace_dim": 0}, "lsp.subspace_dim", "be at least 1", 0),
    ({"nnz_per_row": 0}, "lsp.nnz_per_row", "be at least 1", 0),
    ({"calibration_batches": 0}, "lsp.calibration_batches", "be at least 1", 0),
    ({"subspace_dim": 8, "nnz_per_row": 9}, "lsp.nnz_per_row", "be at most lsp.subspace_dim (8)", 9),
]
BAD_RUNTIME: list[tuple[dict[str, Any], str, str, object]] = [
    ({"num_shards": 0}, "runtime.num_shards", "be at least 1", 0),
    ({"device_threads": -2}, "runtime.device_threads", "be at least 1", -2),
    ({"shard_threads": 0}, "runtime.shard_threads", "be at least 1", 0),
    ({"link_gbps": 0.0}, "runtime.link_gbps", "be above 0", 0.0),
    ({"link_gbps": math.inf}, "runtime.link_gbps", "be above 0", math.inf),
    (
        {"link_gbps": 8.0, "emulate": "a1000-laptop"},
        "runtime.link_gbps",
        "be left out where a1000-laptop is emulated",
        8.0,
    ),
]
BAD_RUN: list[tuple[dict[str, Any], str, str, object]] = [
    ({"per_device_train_batch_size": 0}, "per_device_train_batch_size", "be at least 1", 0),
    ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps", "be at least 1", 0),
    ({"max_eval_samples": 0}, "max_eval_samples", "be at least 1", 0),
    ({"max_seq_length": 7}, "max_seq_length", "be at least 8", 7),
    ({"learning_rate": -1e-4}, "learning_rate", "be at least 0", -1e-4),
    ({"weight_decay": -0.1}, "weight_decay", "be at least 0", -0.1),
    ({"warmup_steps": -1}, "warmup_steps", "be at least 0", -1),
    ({"seed": -1}, "seed", "be at least 0", -1),
    ({"max_steps": 0}, "max_steps", "be at least 1, or -1 to train num_train_epochs", 0),
    ({"max_steps": -2}, "max_steps", "be at least 1, or -1 to train num_train_epochs", -2),
    ({"num_train_epochs": 0.0}, "num_train_epochs", "be above 0", 0.0),
    ({"output_dir": ""}, "output_dir", "name one", ""),
]


def assert_names_field_bound_and_value(error: ConfigError, field: str, bound: str, value: object) -> None:
    assert (error.field, error.bound, error.value) == (field, bound, value)
    assert str(error) == f"{field} must {bound}, got {value!r}"


@pytest.mark.parametrize(("given", "field", "bound", "value"), BAD_LSP)
def test_a_bad_lsp_value_is_refused(given: dict[str, Any], field: str, bound: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        LspConfig(**given)
    assert_names_field_bound_and_value(caught.value, field, bound, value)


@pytest.mark.parametrize(
    ("kind", "given", "field", "bound", "value"),
    [
        (LoraConfig, {"r": 0}, "lora.r", "be at least 1", 0),
        (LoraConfig, {"lora_alpha": 0.0}, "lora.lora_alpha", "be above 0", 0.0),
        (GaloreConfig, {"rank": 0}, "galore.rank", "be at least 1", 0),
        (GaloreConfig, {"update_proj_gap": 0}, "galore.update_proj_gap", "be at least 1", 0),
        (GaloreConfig, {"scale": math.inf}, "galore.scale", "be above 0", math.inf),
    ],
)
def test_a_bad_value_of_a_baseline_is_refused(
    kind: type, given: dict[str, Any], field: str, bound: str, value: object
) -> None:
    with pytest.raises(ConfigError) as caught:
        kind(**given)
    assert_names_field_bound_and_value(caught.value, field, bound, value)


@pytest.mark.parametrize(("given", "field", "bound", "value"), BAD_RUNTIME)
def test_a_bad_runtime_value_is_refused(given: dict[str, Any], field: str, bound: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        RuntimeConfig(**given)
    assert_names_field_bound_and_value(caught.value, field, bound, value)


@pytest.mark.parametrize(("given", "field", "bound", "value"), BAD_RUN)
def test_a_bad_run_value_is_refused(given: dict[str, Any], field: str, bound: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig(**given)
    assert_names_field_bound_and_value(caught.value, field, bound, value)


@pytest.mark.parametrize("field", ["learning_rate", "weight_decay", "num_train_epochs"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_refused(field: str, value: float) -> None:
    given: dict[str, Any] = {field: value}
    with pytest.raises(ConfigError) as caught:
        RunConfig(**given)
    assert caught.value.field == field
    assert str(caught.value).endswith(f"got {value!r}")


def test_the_smallest_permitted_values_are_accepted() -> None:
    lsp = LspConfig(subspace_dim=1, nnz_per_row=1, calibration_batches=1)
    runtime = RuntimeConfig(num_shards=1, device_threads=1, shard_threads=1)
    config = RunConfig(
        per_device_train_batch_size=1,
        max_eval_samples=1,
        max_seq_length=8,
        learning_rate=0.0,
        seed=0,
        max_steps=1,
        lsp=lsp,
        runtime=runtime,
    )
    assert (config.lsp, config.runtime) == (lsp, runtime)


def test_minus_one_step_asks_for_epochs() -> None:
    assert RunConfig(max_steps=-1, num_train_epochs=0.5).max_steps == -1


@pytest.mark.parametrize(
    ("method", "expected"), [("lsp", "layerwise"), ("native", "layerwise"), ("zero_offload", "sequential")]
)
def test_the_method_chooses_its_policy_where_none_is_given(method: Method, expected: PolicyName) -> None:
    assert RunConfig(method=method).policy == expected


@pytest.mark.parametrize("method", ["lsp", "native", "zero_offload"])
@pytest.mark.parametrize("policy", get_args(PolicyName))
def test_a_policy_that_was_given_wins_over_the_methods_own(method: Method, policy: PolicyName) -> None:
    assert RunConfig(method=method, runtime=RuntimeConfig(policy=policy)).policy == policy


def test_every_policy_can_be_asked_for_and_every_machine_emulated() -> None:
    assert set(get_args(PolicyName)) == set(POLICIES)
    assert set(get_args(EmulatedMachine)) == set(MACHINES)


def test_a_config_never_changes() -> None:
    config = RunConfig()
    with pytest.raises(FrozenInstanceError):
        config.max_steps = 3  # type: ignore[misc]


def test_a_hint_follows_the_value() -> None:
    error = ConfigError("dataset", "be a file", "x.jsonl", hint="did you mean y.jsonl?")
    assert str(error) == "dataset must be a file, got 'x.jsonl'; did you mean y.jsonl?"


def test_a_config_error_is_a_value_error_and_survives_pickling() -> None:
    error = ConfigError("lsp.subspace_dim", "be at most 288", 512, hint="use 288")
    copy = pickle.loads(pickle.dumps(error))
    assert isinstance(copy, ConfigError)
    assert isinstance(copy, ValueError)
    assert (copy.field, copy.bound, copy.value, copy.hint) == ("lsp.subspace_dim", "be at most 288", 512, "use 288")
    assert str(copy) == str(error)


@pytest.mark.parametrize("kind", [LspRayError, StaleSlotError, DeadlineError, WorkerLostError, NonFiniteLossError])
def test_every_error_is_an_lsp_ray_error_and_survives_pickling(kind: type[LspRayError]) -> None:
    copy = pickle.loads(pickle.dumps(kind("layer 3 of step 7")))
    assert type(copy) is kind
    assert isinstance(copy, LspRayError)
    assert str(copy) == "layer 3 of step 7"


def test_a_missed_deadline_is_a_timeout() -> None:
    assert issubclass(DeadlineError, TimeoutError)
