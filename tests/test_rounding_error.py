"""Updates that begin with what they can give back of a base's rounding to 4 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lsp_ray.device.delta_linear import DeltaLinear
from lsp_ray.device.rounding_error import DAMPING, give_back_
from lsp_ray.models.load import load_model
from lsp_ray.models.quantized import dense_weight
from lsp_ray.projection.sparse_projector import ProjectorSizes, SparseProjector
from lsp_ray.runtime.actors.device_side import DeviceSide
from lsp_ray.runtime.checkpoints.checkpoint import TRAINED
from lsp_ray.runtime.prepare.job import Job, prepare_job
from tests.tiny_jobs import Recorder, run_on_threads, tiny_config, tiny_job

QUANTISED: dict[str, Any] = {"load_in_4bit": True, "bf16": True}


def set_up(job: Job) -> DeviceSide:
    side = DeviceSide(job, lambda _news: None)
    side.setup()
    return side


def deltas(side: DeviceSide) -> dict[str, DeltaLinear]:
    return {name: linear for name, linear in side._linears if isinstance(linear, DeltaLinear)}


@given(
    rows=st.integers(8, 40),
    columns=st.integers(8, 40),
    dim=st.integers(4, 16),
    seed=st.integers(0, 99),
    scaled=st.booleans(),
)
def test_both_factors_solve_for_the_least_squares(rows: int, columns: int, dim: int, seed: int, scaled: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    projector = SparseProjector.random(ProjectorSizes.of((rows, columns), dim, 2), generator)
    if scaled:
        for factor in (projector.left, projector.right):
            factor.value_FR *= 0.1 + torch.rand(factor.num_rows, 1, generator=generator)
    error_MN = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    left, right = (factor.dense().double() for factor in (projector.left, projector.right))
    expected = torch.linalg.lstsq(torch.kron(left, right), error_MN.reshape(-1, 1)).solution
    found = projector.right.solve(projector.left.solve(error_MN).t()).t()
    torch.testing.assert_close(found.reshape(-1, 1), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_updates_begin_with_what_is_nearest_in_what_it_does_to_inputs(tmp_path: Path, family: Any) -> None:
    """Against torch's own least squares, with all inputs at hand: of the error's outputs, and of the error, damped."""
    job = prepare_job(tiny_config(tmp_path, family, **QUANTISED), lambda _line: None)
    side = set_up(job)
    whole = load_model(job.model_folder, dtype=torch.float32, task="causal_lm")
    own = deltas(side)
    name, linear = next(iter(own.items()))
    seen: list[torch.Tensor] = []
    hook = linear.register_forward_pre_hook(lambda _module, args: seen.append(args[0].detach()))
    batches = job.micro_batches.calibration(job.config.lsp.calibration_batches)
    with torch.no_grad():
        for batch in batches:
            side._model(**{key: batch[key] for key in ("input_ids", "attention_mask")})
    hook.remove()
    mask_T = torch.cat([batch["attention_mask"].flatten() != 0 for batch in batches])
    input_TN = torch.cat([each.flatten(0, 1) for each in seen]).double()[mask_T]  # the first block's: no D before it
    weight_MN = dict(whole.named_modules())[name].get_parameter("weight").detach().double()
    error_MN = (weight_MN.t() if family == "gpt2" else weight_MN) - dense_weight(linear.base, torch.bfloat16).double()
    left, right = (factor.dense().double() for factor in (linear.projector.left, linear.projector.right))
    damping = (DAMPING * input_TN.square().sum() / input_TN.shape[1]).sqrt()
    looked_at = torch.cat([input_TN, damping * torch.eye(input_TN.shape[1], dtype=torch.float64)])
    half_NM = torch.linalg.lstsq(looked_at @ right, looked_at @ error_MN.t()).solution
    expected = torch.linalg.lstsq(left, half_NM.t()).solution
    assert (linear.delta_DE.double() - expected).norm() < 0.01 * expected.norm()
    assert all(bool(each.delta_DE.any()) for each in own.values())
    side.close()


def test_a_run_begins_nearer_to_the_model_before_rounding(tmp_path: Path) -> None:
    lines = Recorder()
    job = tiny_job(tmp_path, max_steps=1, lsp={"subspace_dim": 32, "nnz_per_row": 8}, **QUANTISED)
    side = set_up(job)
    linears = deltas(side)
    whole = load_model(job.model_folder, dtype=torch.bfloat16, task="causal_lm")
    batch = {name: job.micro_batches.step(0)[0][name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = whole(**batch).logits.float()
        begun = (side._model(**batch).logits.float() - expected).norm()
        for linear in linears.values():
            linear.delta_DE.zero_()
        rounded = (side._model(**batch).logits.float() - expected).norm()
    side.close()
    assert begun < 0.9 * rounded
    run_on_threads(job, tmp_path / "out", lines)
    assert sum("give back of the rounding" in line for line in lines.notes) == 1


def test_shards_go_on_from_there(tmp_path: Path) -> None:
    """After a step of rate 0 what the shards answer is what the updates began with."""
    job = tiny_job(tmp_path, max_steps=2, learning_rate=0.0, save_steps=1, **QUANTISED)
    side = set_up(job)
    begun = {name: linear.delta_DE.clone() for name, linear in deltas(side).items()}
    side.close()
    run_on_threads(job, tmp_path / "out")
    saved = load_file(tmp_path / "out" / "checkpoint-2" / TRAINED)
    found = [
        tensor for name, tensor in sorted(saved.items()) if tensor.shape in {each.shape for each in begun.values()}
    ]
    assert found
    for tensor in begun.values():
        assert any(
            tensor.shape == each.shape and (each.float() - tensor.float()).norm() <= 0.01 * tensor.float().norm()
            for each in found
        )


def test_a_folder_that_names_its_weights_otherwise(tmp_path: Path) -> None:
    """Without the prefix of a head they are found; another model's are not taken, and named."""
    job = tiny_job(tmp_path, max_steps=1, **QUANTISED)
    sides = [set_up(job)]
    path = job.model_folder / "model.safetensors"
    tensors = load_file(path)
    save_file({name.removeprefix("model."): tensor for name, tensor in tensors.items()}, path, {"format": "pt"})
    sides.append(set_up(job))
    begun, again = map(deltas, sides)
    assert all(torch.equal(begun[name].delta_DE, again[name].delta_DE) for name in begun)
    save_file({name: -tensor for name, tensor in tensors.items()}, path, {"format": "pt"})
    for linear in again.values():
        linear.delta_DE.zero_()
    batches = job.micro_batches.calibration(1)
    assert give_back_(sides[1]._model, list(again.items()), batches, job.model_folder) == list(again)
    assert not any(linear.delta_DE.any() for linear in again.values())
    for side in sides:
        side.close()
