"""Whole runs whose updates are kept apart from the weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lsp_ray.device.trained_file import trained_digest
from lsp_ray.errors import ConfigError
from lsp_ray.models.load import load_model
from lsp_ray.runtime.checkpoints.checkpoint import STATE, TRAINED, checkpoints
from lsp_ray.runtime.fine_tune import Summary
from lsp_ray.runtime.prepare.job import Job, prepare_job, resumed
from tests.tiny_jobs import assert_same_bits, run_on_threads, saved_weights, tiny_config, tiny_job, weights_after

APART = {"delta": "apart"}
MERGED = {"delta": "merged"}
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


def started(folder: Path, name: str, source: Path, **changes: Any) -> tuple[Summary, list[str], Job]:
    """A run that begins with another one's folder or file, what it was told of that, and its job."""
    notes: list[str] = []
    lsp = APART | changes.pop("lsp", {}) | {"init_from": str(source)}
    job = prepare_job(tiny_config(folder, lsp=lsp, **changes), notes.append)
    summary, _ = run_on_threads(job, folder / name)
    return summary, [note for note in notes if note.startswith("lsp.init_from")], job


@pytest.mark.parametrize(("bf16", "payload_dtype"), [(False, "int8"), (True, "bfloat16")])
def test_a_run_begins_with_all_that_another_one_trained(tmp_path: Path, bf16: bool, payload_dtype: str) -> None:
    """D, norms, and weights that refits changed: to the bit before a step, to what sums are rounded to after none."""
    options: dict[str, Any] = {"bf16": bf16, "runtime": {"payload_dtype": payload_dtype}}
    first, _ = run_on_threads(tiny_job(tmp_path, lsp=APART | REFITS, max_steps=18, **options), tmp_path / "first")
    again, notes, _ = started(tmp_path, "again", tmp_path / "first", max_steps=1, learning_rate=0.0, **options)
    assert first.eval_loss_after < 0.95 * first.eval_loss_before
    assert again.eval_before == first.eval_after
    assert again.sample_before == first.sample_after
    assert again.eval_loss_after == pytest.approx(again.eval_loss_before, rel=5e-3)
    assert notes == [
        f"lsp.init_from: 14 projectors of {tmp_path / 'first'}, with their updates and those of 5 other parameters; "
        "Adam's moments begin anew"
    ]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_it_begins_with_trains_on_as_in_a_merged_run_from_the_others_model(tmp_path: Path, family: Any) -> None:
    options: dict[str, Any] = {"runtime": {"payload_dtype": "float32"}, "family": family}
    first = weights_after(tmp_path, "first", lsp=APART, **options)
    merged = weights_after(
        tmp_path,
        "merged",
        model_name_or_path=str(tmp_path / "first"),
        lsp={"delta": "merged", "init_from": str(tmp_path / "first")},
        **options,
    )
    _, _, job = started(tmp_path, "apart", tmp_path / "first", save_steps=2, **options)
    whole = saved_weights(job, tmp_path / "apart")
    assert farness(whole, merged, first) < 1e-3
    adapter = load_file(tmp_path / "apart" / "adapter" / "adapter_model.safetensors")
    name = next(key for key in adapter if key.endswith("lora_A.weight"))
    up_ME, down_EN = adapter[name.replace("lora_A", "lora_B")], adapter[name]
    weight = name.removeprefix("base_model.model.").replace("lora_A.", "")
    start = load_model(job.model_folder, dtype=job.dtype, task=job.task).state_dict()[weight]
    added = up_ME @ down_EN
    torch.testing.assert_close(start + (added.t() if family == "gpt2" else added), whole[weight], rtol=1e-5, atol=1e-6)
    shutil.rmtree(tmp_path / "first")  # a checkpoint has all of it
    run_on_threads(resumed(job, tmp_path / "apart" / "checkpoint-4"), tmp_path / "on")
    assert_same_bits(whole, saved_weights(job, tmp_path / "on"))


def test_projectors_alone_are_said_to_be_that(tmp_path: Path) -> None:
    file = tmp_path / "apart" / "internals" / "lsp_projectors.safetensors"
    merged, apart = (run_on_threads(tiny_job(tmp_path, lsp=lsp), tmp_path / lsp["delta"])[0] for lsp in (MERGED, APART))
    why = {
        tmp_path / "merged": "as it is a run's folder without updates kept apart",
        file: "as it is a file of projectors alone",
    }
    for at, (source, reason) in enumerate(why.items()):
        again, notes, _ = started(tmp_path, f"again {at}", source, max_steps=1)
        assert again.eval_before == apart.eval_before == merged.eval_before
        assert notes == [f"lsp.init_from: 14 projectors of {source}, and no updates, {reason}"]
    again, notes, job = started(tmp_path, "as merged", tmp_path / "apart", lsp=MERGED)
    assert notes == [f"lsp.init_from: 14 projectors of {tmp_path / 'apart'}, and no updates, as lsp.delta is merged"]
    assert_same_bits(saved_weights(job, tmp_path / "as merged"), saved_weights(job, tmp_path / "merged"))


def test_what_a_run_cannot_begin_with_is_one_line_before_any_actor(tmp_path: Path) -> None:
    run_on_threads(tiny_job(tmp_path, lsp=APART | REFITS, max_steps=18), tmp_path / "first")
    path = tmp_path / "first" / "internals" / "lsp_trained.safetensors"
    content, tensors, digest = path.read_bytes(), load_file(path), trained_digest(path)
    assert path.stat().st_mode == (path.parent / "lsp_projectors.safetensors").stat().st_mode

    def refuses(line: str, **changes: Any) -> None:
        start = APART | changes.pop("lsp", {}) | {"init_from": str(tmp_path / "first")}
        with pytest.raises(ConfigError, match=rf"^lsp\.init_from must {line}, got '.*first'$"):
            tiny_job(tmp_path, lsp=start, **changes)

    def refuses_with(changes: dict[str, torch.Tensor | None], line: str) -> None:
        changed = {name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}
        save_file(changed, path, {"base": str(digest)})
        refuses(rf"hold intact updates of the same sizes \({line}\)")

    [merged, *_] = [name for name in tensors if name.startswith("base.")]
    refuses_with({"0.0": torch.full_like(tensors["0.0"], torch.nan)}, r"0\.0 is no finite tensor")
    refuses_with({merged: torch.full_like(tensors[merged], torch.inf)}, rf"{merged} is no finite tensor")
    refuses_with({"0.0": tensors["0.0"].long()}, r"0\.0 is no finite tensor")
    refuses_with({"0.0": tensors["0.0"][1:].clone()}, r"0\.0 has \d+ values, not \d+")
    refuses_with({"0.0": None}, "it holds what another run trained")
    refuses_with({"base.9.9": tensors["0.0"].clone()}, "it holds what another run trained")
    for cut in (content[:100], content[:-1], b""):
        path.write_bytes(cut)
        refuses(r"hold intact updates of the same sizes \(.+\)")
    path.write_bytes(content)
    refuses(r"hold .* with r = 2 that sends 8 × 8; there it sends 16 × 16", lsp={"subspace_dim": 8})
    refuses(
        r"be a run on the same base, to whose weights its updates belong", model_name_or_path=str(tmp_path / "first")
    )
