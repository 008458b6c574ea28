"""Whole runs whose updates are kept apart from the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lsp_ray.errors import ConfigError
from lsp_ray.runtime.checkpoint import STATE, TRAINED, checkpoints
from lsp_ray.runtime.job import resumed
from tests.tiny_jobs import assert_same_bits, run_on_threads, saved_weights, tiny_job, weights_after

APART = {"delta": "apart"}
REFITS: dict[str, Any] = {"check_every": 10, "max_bias": 0.0}
EVERYTHING: dict[str, Any] = {"weight_decay": 0.1, "max_grad_norm": 0.5, "gradient_accumulation_steps": 2}


def farness(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], start: dict[str, torch.Tensor]) -> float:
    """‖ours − theirs‖ / ‖theirs − start‖ over all weights."""
    apart = sum(float((ours[name].double() - theirs[name].double()).square().sum()) for name in ours)
    moved = sum(float((theirs[name].double() - start[name].double()).square().sum()) for name in ours)
    return float((apart / moved) ** 0.5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_run_trains_what_a_merged_one_does(tmp_path: Path, family: Any) -> None:
    """To float32's rounding, of products and of sums that are not in the weights, which Adam's first steps enlarge."""
    options: dict[str, Any] = {"runtime": {"payload_dtype": "float32"}, "max_steps": 6}
    start = weights_after(tmp_path, "start", family=family, **{**options, "max_steps": 1, "learning_rate": 0.0})
    merged = weights_after(tmp_path, "merged", family=family, **options)
    apart = weights_after(tmp_path, "apart", family=family, lsp=APART, **options)
    assert farness(apart, merged, start) < 1e-3


@pytest.mark.parametrize(("bf16", "payload_dtype"), [(False, "bfloat16"), (True, "int8")])
def test_neither_shards_nor_policy_nor_refits_change_a_bit(tmp_path: Path, bf16: bool, payload_dtype: str) -> None:
    runtime: dict[str, Any] = {"policy": "layerwise", "payload_dtype": payload_dtype}
    changes: dict[str, Any] = {"bf16": bf16, "lsp": APART | REFITS, "max_steps": 18, **EVERYTHING}
    base = weights_after(tmp_path, "one", runtime=runtime, **changes)
    for shards, policy in ((1, "sequential"), (2, "layerwise"), (2, "earliest_deadline")):
        runtime |= {"num_shards": shards, "policy": policy}
        assert_same_bits(base, weights_after(tmp_path, f"{shards}-{policy}", runtime=runtime, **changes))
    assert_same_bits(
        base, weights_after(tmp_path, "checkpointed", runtime=runtime, gradient_checkpointing=True, **changes)
    )


@pytest.mark.parametrize(("policy", "payload_dtype"), [("layerwise", "bfloat16"), ("delayed", "int8")])
def test_a_run_goes_on_bit_for_bit_from_checkpoints_without_a_model(
    tmp_path: Path, policy: str, payload_dtype: str
) -> None:
    job = tiny_job(
        tmp_path,
        max_steps=18,
        save_steps=4,
        save_total_limit=None,
        lsp=APART | REFITS,
        runtime={"policy": policy, "payload_dtype": payload_dtype},
        **EVERYTHING,
    )
    run_on_threads(job, tmp_path / "whole")
    whole = saved_weights(job, tmp_path / "whole")
    for step, checkpoint in checkpoints(tmp_path / "whole").items():
        assert not list(checkpoint.glob("*.safetensors"))
        names = load_file(checkpoint / TRAINED).keys()
        assert any(name.startswith("base.") for name in names) == (step > 15), "what refits merged is kept, and no more"
        run_on_threads(resumed(job, checkpoint), tmp_path / f"from {step}")
        assert_same_bits(whole, saved_weights(job, tmp_path / f"from {step}"))
    assert (checkpoint / STATE / "lsp_projectors.safetensors").is_file()


def test_a_run_ends_with_the_weights_of_its_best_step(tmp_path: Path) -> None:
    """At a learning rate that learns the few examples by heart; a refit merges what is then taken back."""
    options: dict[str, Any] = {"max_steps": 16, "learning_rate": 0.01, "eval_steps": 1, "save_steps": 1}
    job = tiny_job(
        tmp_path,
        lsp=APART | REFITS,
        load_best_model_at_end=True,
        save_total_limit=1,
        lr_scheduler_type="constant",
        **options,
    )
    summary, listener = run_on_threads(job, tmp_path / "out")
    assert summary.best_step is not None
    assert summary.best_step < 12, "before the refit"
    best = min(metrics.eval_loss for metrics in listener.steps if metrics.eval_loss is not None)
    assert summary.eval_loss_after == pytest.approx(best, rel=1e-5)


def test_projectors_of_another_balance_are_refused(tmp_path: Path) -> None:
    run_on_threads(tiny_job(tmp_path, max_steps=1, lsp={"balance": False}), tmp_path / "plain")
    start = {"delta": "apart", "init_from": str(tmp_path / "plain")}
    with pytest.raises(ConfigError, match=r"^lsp\.init_from must hold projectors of the same lsp\.balance"):
        tiny_job(tmp_path, lsp=start)
    run_on_threads(tiny_job(tmp_path, max_steps=2, lsp={**start, "balance": False}), tmp_path / "apart")
