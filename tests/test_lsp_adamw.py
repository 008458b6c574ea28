"""LSPAdamW against torch's AdamW, against a run, and in the loops of transformers, TRL and Accelerate."""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.lr_scheduler import LinearLR
from transformers import PreTrainedModel
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from lsp_ray import LSPAdamW
from lsp_ray.errors import ConfigError
from lsp_ray.methods.parameter_groups import lsp_config
from lsp_ray.methods.projected_matrix import ProjectedMatrix
from lsp_ray.models.load import load_model
from lsp_ray.models.loss import num_targets, summed_loss
from lsp_ray.projection.projector_file import FILE_NAME, save_projectors
from lsp_ray.runtime.prepare.job import Job
from tests.linears import normal
from tests.tiny import assert_same_weights, tiny_model, tiny_tokenizer
from tests.tiny_jobs import run_on_threads, saved_weights, tiny_job

ARGS = "d=16,r=2"


def loaded(job: Job) -> PreTrainedModel:
    model = load_model(job.model_folder, dtype=job.dtype, task=job.task)
    model.train()
    return model


def train(model: PreTrainedModel, optimizer: LSPAdamW, job: Job, steps: Sequence[int]) -> list[float]:
    losses = []
    for step in steps:
        (batch,) = job.micro_batches.step(step)
        for group in optimizer.param_groups:
            group["lr"] = job.learning_rates[step]
        loss = summed_loss(model, batch) / num_targets(batch)
        torch.autograd.backward([loss])
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def write_projectors(optimizer: LSPAdamW, path: Path) -> None:
    """As a run leaves them: by the name of the linear."""
    save_projectors(
        path,
        {
            name.removesuffix(".weight"): ProjectedMatrix.from_state(optimizer.state[weight]).projector
            for group in optimizer.param_groups
            if group["subspace_dim"] is not None
            for name, weight in zip(group["param_names"], group["params"], strict=True)
        },
    )


@pytest.mark.parametrize("changes", [{}, {"balance": False}], ids=["default", "plain"])
def test_with_the_same_projectors_a_run_ends_with_the_same_weights(tmp_path: Path, changes: dict[str, Any]) -> None:
    job = tiny_job(tmp_path, weight_decay=0.1, lsp={"init_from": None, **changes})
    model = loaded(job)
    args = ",".join([ARGS, *(f"{name}=false" for name in changes)])
    optimizer = LSPAdamW.for_model(model, optim_args=args, weight_decay=0.1)
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer, job, range(job.num_steps))
    write_projectors(optimizer, tmp_path / FILE_NAME)
    again = tiny_job(tmp_path, weight_decay=0.1, lsp={"init_from": str(tmp_path / FILE_NAME), **changes})
    run_on_threads(again, tmp_path / "run")
    theirs = saved_weights(again, tmp_path / "run")
    for name, tensor in model.state_dict().items():
        moved = float((theirs[name] - before[name]).norm())
        # both add up float32 products, in another order; Adam's first steps are ±lr whatever a gradient's size
        assert float((tensor - theirs[name]).norm()) <= 2e-3 * moved, name


def test_parameters_outside_the_targets_take_the_steps_of_torchs_adamw() -> None:
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in ((24, 40), (40,))]
    ours, theirs = ([nn.Parameter(tensor.clone()) for tensor in start] for _ in range(2))
    options: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    optimizers = LSPAdamW(ours, **options), torch.optim.AdamW(theirs, **options)
    for _ in range(20):
        for our, their in zip(ours, theirs, strict=True):
            our.grad = torch.randn(our.shape, generator=generator)
            their.grad = our.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our.data, their.data, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_an_interrupted_training_continues_to_the_bit(tmp_path: Path, bf16: bool) -> None:
    job = tiny_job(tmp_path, bf16=bf16, max_steps=8)
    args = f"{ARGS},check_every=3,max_bias=0.0"  # refits before and after the interruption
    whole, first = loaded(job), loaded(job)
    train(whole, LSPAdamW.for_model(whole, optim_args=args), job, range(8))
    optimizer = LSPAdamW.for_model(first, optim_args=args)
    train(first, optimizer, job, range(4))
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    second = loaded(job)
    second.load_state_dict(saved["model"])
    resumed = LSPAdamW.for_model(second, optim_args=args)
    resumed.load_state_dict(saved["optimizer"])
    train(second, resumed, job, range(4, 8))
    assert_same_weights(second, whole)


def test_a_copied_optimizer_goes_on_like_the_original() -> None:
    weight = nn.Parameter(normal(32, 48))
    optimizer = LSPAdamW([weight], subspace_dim=8, nnz_per_row=2)
    weight.grad = normal(32, 48, seed=1)
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    (twin_weight,) = twin.param_groups[0]["params"]
    twin_weight.grad = weight.grad.clone()
    for one in (optimizer, twin):
        one.step()
    assert torch.equal(weight, twin_weight)


def test_a_state_with_projectors_of_an_older_form_is_refused_and_nothing_changes() -> None:
    weight = nn.Parameter(normal(32, 48))
    optimizer = LSPAdamW([weight], subspace_dim=8, nnz_per_row=2)
    weight.grad = normal(32, 48, seed=1)
    optimizer.step()
    older = copy.deepcopy(optimizer.state_dict())
    older["state"][0] |= {"left_index": torch.zeros(32, 2).short(), "step": torch.tensor(9.0)}
    with pytest.raises(ConfigError, match=r"^state_dict must hold projectors of orthonormal blocks; .*older versions"):
        optimizer.load_state_dict(older)
    assert optimizer.state[weight]["step"] == 1


def test_the_state_of_a_matrix_is_small_and_tensors_alone(tmp_path: Path) -> None:
    job = tiny_job(tmp_path)
    model = loaded(job)
    optimizer = LSPAdamW.for_model(model, optim_args=ARGS)
    train(model, optimizer, job, range(1))
    weight = model.get_submodule("model.layers.0.mlp.up_proj").get_parameter("weight")
    state = optimizer.state[weight]
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    assert state["exp_avg"].shape == state["exp_avg_sq"].shape == (16, 16)
    rows, columns = weight.shape
    moments, non_zeros, scales = 2 * 16 * 16, 2 * (rows + columns), rows + columns
    assert sum(value.numel() for value in state.values()) == 1 + moments + non_zeros + scales


def test_a_drifting_gradient_brings_new_projectors_and_a_steady_one_keeps_them() -> None:
    generator = torch.Generator().manual_seed(0)

    def low_rank() -> torch.Tensor:
        return torch.randn(48, 3, generator=generator) @ torch.randn(3, 64, generator=generator)

    steady, drifting = (nn.Parameter(torch.zeros(48, 64)) for _ in range(2))
    optimizer = LSPAdamW([steady, drifting], subspace_dim=16, nnz_per_row=4, check_every=2, max_bias=0.9, balance=False)
    steady.grad, drifting.grad = low_rank(), low_rank()
    optimizer.step()
    before = [optimizer.state[weight]["left_value"].clone() for weight in (steady, drifting)]
    drifting.grad = low_rank()
    for _ in range(2):
        optimizer.step()
    changed = [
        not torch.equal(old, optimizer.state[weight]["left_value"])
        for old, weight in zip(before, (steady, drifting), strict=True)
    ]
    assert changed == [False, True]


def test_a_matrix_waits_for_a_gradient_that_it_can_learn_from() -> None:
    weight = nn.Parameter(torch.ones(16, 16))
    optimizer = LSPAdamW([weight], subspace_dim=4, nnz_per_row=2)
    for grad in (torch.zeros(16, 16), torch.full((16, 16), torch.nan)):
        weight.grad = grad
        optimizer.step()
        assert torch.equal(weight.detach(), torch.ones(16, 16))
    weight.grad = normal(16, 16)
    optimizer.step()
    assert not torch.equal(weight.detach(), torch.ones(16, 16))


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(8, 40), columns=st.integers(8, 40), dim=st.integers(3, 64), seed=st.integers(0, 99))
def test_a_step_goes_downhill_at_any_shape(rows: int, columns: int, dim: int, seed: int) -> None:
    weight = nn.Parameter(torch.zeros(rows, columns))
    optimizer = LSPAdamW([weight], lr=1e-3, subspace_dim=dim, nnz_per_row=3, balance=False)
    grad = normal(rows, columns, seed=seed)
    weight.grad = grad
    optimizer.step()
    assert float((weight.detach() * grad).sum()) < 0


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", 14),
        (["q_proj", "v_proj"], 4),
        (["layers.0.mlp.up_proj"], 1),
        (r".*\.1\.mlp\..*", 3),
    ],
)
def test_target_modules_are_all_linears_ends_of_names_or_a_pattern(targets: str | list[str], expected: int) -> None:
    model = tiny_model("llama")
    optimizer = LSPAdamW.for_model(model, target_modules=targets, optim_args=ARGS, weight_decay=0.1)
    projected, *plain = optimizer.param_groups
    assert len(projected["params"]) == expected
    names = {name for group in optimizer.param_groups for name in group["param_names"]}
    assert names == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any("embed_tokens" in name or "lm_head" in name for name in names)
    assert [group["weight_decay"] for group in plain] == [0.1, 0.0][2 - len(plain) :]


def test_what_is_frozen_already_stays_frozen() -> None:
    model = tiny_model("gpt2")
    frozen = model.get_submodule("transformer.h.0").requires_grad_(False)
    before = copy.deepcopy(frozen.state_dict())
    optimizer = LSPAdamW.for_model(model, optim_args=ARGS)
    assert len(optimizer.param_groups[0]["params"]) == 4
    torch.autograd.backward([model(input_ids=torch.arange(20)[None]).logits.square().mean()])
    optimizer.step()
    for name, tensor in frozen.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_any_scheduler_decides_the_learning_rate() -> None:
    weight = nn.Parameter(torch.zeros(16, 16))
    optimizer = LSPAdamW([weight], lr=1e-2, subspace_dim=4, nnz_per_row=2)
    scheduler = LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=2)
    weight.grad = normal(16, 16)
    sizes = []
    for _ in range(3):
        before = weight.detach().clone()
        optimizer.step()
        scheduler.step()
        sizes.append(float((weight.detach() - before).norm()))
    assert sizes[0] == pytest.approx(2 * sizes[1], rel=1e-3)
    assert sizes[2] == 0.0


BAD = [
    ({"subspace_dim": 4, "nnz_per_row": 5}, r"nnz_per_row must be at least 1 and at most .* half a side \(4\), got 5"),
    ({"subspace_dim": 40}, r"nnz_per_row must be at least 1 and at most .* half a side \(7\), got 8"),
    ({"lr": -1.0}, r"lr must be at least 0, got -1\.0"),
    ({"betas": (0.9, 1.0)}, r"betas must be at least 0 and below 1, got \(0\.9, 1\.0\)"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_a_value_that_cannot_work_is_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LSPAdamW([nn.Parameter(torch.zeros(32, 14))], **options)


def test_only_float32_and_bfloat16_matrices_are_projected() -> None:
    with pytest.raises(ConfigError, match=r"params must be float32 or bfloat16, got torch\.float16"):
        LSPAdamW([nn.Parameter(torch.zeros(8, 8, dtype=torch.float16))])
    with pytest.raises(ConfigError, match=r"params must be matrices in a group with a subspace_dim, got \(8,\)"):
        LSPAdamW([nn.Parameter(torch.zeros(8))], subspace_dim=2)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("rank=8", r"optim_args must be of d=…, r=….*, got 'rank=8'"),
        ("d=many", r"optim_args must have a whole number for d, got 'd=many'"),
        ("balance=1", r"optim_args must have true or false for balance, got 'balance=1'"),
        ("d=0", r"lsp\.subspace_dim must be at least 1, got 0"),
    ],
)
def test_optim_args_that_cannot_work_are_refused(args: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lsp_config(args)


def test_optim_args_name_what_they_set() -> None:
    config = lsp_config("d=512, r=8,check_every=200,max_bias=0.8,balance=false")
    assert (config.subspace_dim, config.nnz_per_row, config.check_every) == (512, 8, 200)
    assert (config.max_bias, config.balance) == (0.8, False)


def test_targets_that_match_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"target_modules must be all-linear.*, got \['query'\]"):
        LSPAdamW.for_model(tiny_model("llama"), target_modules=["query"], optim_args=ARGS)


def test_accelerate_prepares_it_like_any_other(tmp_path: Path) -> None:
    job = tiny_job(tmp_path)
    model = loaded(job)
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, LSPAdamW.for_model(model, lr=3e-3, optim_args=ARGS))
    losses = []
    for step in range(job.num_steps):
        (batch,) = job.micro_batches.step(step)
        loss = summed_loss(model, batch) / num_targets(batch)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


@pytest.mark.filterwarnings("default")  # TRL's own
def test_trls_trainer_takes_it(tmp_path: Path) -> None:
    model = tiny_model("llama")
    rows = Dataset.from_list([{"prompt": f"w{index} :", "completion": f" w{index % 8 + 8}"} for index in range(16)])
    options: dict[str, Any] = {"per_device_train_batch_size": 4, "max_steps": 3, "report_to": "none", "use_cpu": True}
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(str(tmp_path), bf16=False, save_strategy="no", **options),
        train_dataset=rows,
        processing_class=tiny_tokenizer(),
        optimizers=(LSPAdamW.for_model(model, lr=1e-3, optim_args=ARGS), None),
    )
    before = copy.deepcopy(model.state_dict())
    trainer.train()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if "embed_tokens" not in name and "lm_head" not in name}


def test_the_first_step_says_in_one_line_that_it_learns_projectors(capsys: pytest.CaptureFixture[str]) -> None:
    weight = torch.nn.Parameter(torch.randn(32, 24, generator=torch.Generator().manual_seed(0)))
    optimizer = LSPAdamW([weight], subspace_dim=8, nnz_per_row=2)
    for _ in range(2):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    expected = "LSPAdamW: learning the projectors of 1 matrices from this first gradient, which takes a while\n"
    assert capsys.readouterr().err == expected
