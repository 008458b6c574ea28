from __future__ import annotations

import gc
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Literal

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lsp_ray.config import LspConfig
from lsp_ray.device.unit import RawTarget, Unit
from lsp_ray.errors import NonFiniteLossError
from lsp_ray.methods.lsp import lsp_units
from lsp_ray.methods.units import full_units
from lsp_ray.models.layers import find_layers
from lsp_ray.models.loss import Batch, num_targets, summed_loss
from lsp_ray.projection.block_factor import BlockFactor
from lsp_ray.projection.sparse_projector import SparseProjector
from tests.loopback import Loopback

SIZE, NNZ = 32, 2
VOCAB = 128
LSP = LspConfig(subspace_dim=16, nnz_per_row=NNZ, fit="random")
STEPS = 20
LEARNING_RATES = [1e-3 * (1 - step / STEPS) for step in range(STEPS)]


def square_llama() -> PreTrainedModel:
    """A Llama all of whose linears are (SIZE, SIZE), so that every one of them has an identity projector."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=SIZE, intermediate_size=SIZE, num_hidden_layers=2, num_attention_heads=4
    )
    model: PreTrainedModel = LlamaForCausalLM(config)
    model.train()
    return model


def batch(seed: int, rows: int = 4, length: int = 12) -> Batch:
    ids = torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, : 2 + seed % 3] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def identity_units(model: PreTrainedModel) -> list[Unit]:
    units, linears = lsp_units(find_layers(model), LSP, seed=0)
    for _, module in linears:
        factor = BlockFactor(torch.eye(NNZ).repeat(SIZE // NNZ, 1), SIZE // NNZ)
        module.set_projector(SparseProjector(factor, factor))
    return units


def trained_by_torch(steps: int, weight_decay: float, *, staleness: int = 0) -> PreTrainedModel:
    """torch's own AdamW on autograd's own gradients of the same loss; norms without decay, as here.

    A stale run keeps `staleness` gradients back and gives AdamW the oldest, with the learning rate of its step.
    """
    model = square_llama()
    find_layers(model)  # freezes what is not trained
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, fused=True)
    kept_back: deque[list[torch.Tensor | None]] = deque()
    for step in range(steps + staleness):
        if step < steps:
            optimizer.zero_grad()
            (summed_loss(model, batch(step)) / num_targets(batch(step))).backward()
            kept_back.append([parameter.grad for parameter in trained])
        if step >= staleness:
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATES[step - staleness]
            for parameter, gradient in zip(trained, kept_back.popleft(), strict=True):
                parameter.grad = gradient
            optimizer.step()
    return model


def distance(model: nn.Module, reference: nn.Module) -> float:
    """The largest relative distance of any parameter from the reference's."""
    ours = model.state_dict()
    return max(
        float((ours[name].double() - tensor.double()).norm() / tensor.double().norm())
        for name, tensor in reference.state_dict().items()
    )


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("method", ["identity", "zero_offload", "native"])
def test_twenty_steps_equal_torchs_adamw(
    method: Literal["identity", "zero_offload", "native"], weight_decay: float
) -> None:
    model = square_llama()
    units = identity_units(model) if method == "identity" else full_units(find_layers(model))
    run = Loopback(model, units, learning_rates=LEARNING_RATES, weight_decay=weight_decay, native=method == "native")
    for step in range(STEPS):
        run.step(step, [batch(step)])
    run.worker.flush()
    reference = trained_by_torch(STEPS, weight_decay)
    assert distance(square_llama(), reference) > 1e-2  # there was something to learn
    assert distance(model, reference) <= 1e-6


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_twenty_stale_steps_equal_torchs_adamw_on_the_gradients_of_the_step_before(weight_decay: float) -> None:
    model = square_llama()
    units = full_units(find_layers(model))
    run = Loopback(model, units, learning_rates=LEARNING_RATES, weight_decay=weight_decay, staleness=1)
    for step in range(STEPS):
        run.step(step, [batch(step)])
    run.worker.flush()
    in_time, stale = (trained_by_torch(STEPS, weight_decay, staleness=staleness) for staleness in (0, 1))
    assert distance(in_time, stale) > 1e-3
    assert distance(model, stale) <= 1e-6


def trained(micro_batches: Sequence[Sequence[Batch]], *, checkpointing: bool = False) -> PreTrainedModel:
    model = square_llama()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    units, _ = lsp_units(find_layers(model), LSP, seed=0)
    run = Loopback(model, units, learning_rates=LEARNING_RATES)
    for step, batches in enumerate(micro_batches):
        run.step(step, batches)
    run.worker.flush()
    return model


def test_accumulated_micro_batches_equal_one_large_batch() -> None:
    large = [batch(step) for step in range(5)]
    small = [[{name: tensor[:1] for name, tensor in b.items()}, {n: t[1:] for n, t in b.items()}] for b in large]
    assert distance(trained(small), trained([[b] for b in large])) <= 1e-6


def test_gradient_checkpointing_changes_no_bit() -> None:
    batches = [[batch(step)] for step in range(5)]
    plain, recomputed = trained(batches), trained(batches, checkpointing=True)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, recomputed.state_dict()[name]), name


def test_the_same_run_twice_gives_the_same_bits() -> None:
    batches = [[batch(step)] for step in range(3)]
    assert distance(trained(batches), trained(batches)) == 0.0


def test_payloads_are_announced_once_and_deepest_first() -> None:
    model = square_llama()
    units, _ = lsp_units(find_layers(model), LSP, seed=0)
    run = Loopback(model, units, learning_rates=LEARNING_RATES)
    run.step(0, [batch(0), batch(1)])
    assert [ready.layer for ready in run.announced] == [unit.index for unit in reversed(units)]


def test_a_payload_holds_the_compressed_gradient_of_autograds_own() -> None:
    model = square_llama()
    units, linears = lsp_units(find_layers(model), LSP, seed=0)
    run = Loopback(model, units, learning_rates=LEARNING_RATES)
    run.step(0, [batch(0)])
    reference = square_llama()
    (summed_loss(reference, batch(0)) / num_targets(batch(0))).backward()
    name, module = linears[0]
    gradient_MN = reference.get_submodule(name).get_parameter("weight").grad
    assert gradient_MN is not None
    sent_DD = run.gradients[0][: LSP.dim**2].view(LSP.dim, LSP.dim)
    torch.testing.assert_close(sent_DD, module.projector.compress(gradient_MN), rtol=1e-4, atol=1e-7)


def test_a_layer_that_the_forward_does_not_use_sends_zeros_and_stays_as_it_is() -> None:
    model = square_llama()
    units = full_units(find_layers(model))
    unused = nn.Linear(8, 8)
    target = RawTarget(unused.get_parameter("weight"), unused)
    lonely = Unit(index=len(units), name="unused", targets=[target], readers=[unused], first_key=10_000)
    before = unused.weight.detach().clone()
    run = Loopback(model, [*units, lonely], learning_rates=LEARNING_RATES)
    run.step(0, [batch(0)])
    run.worker.flush()
    assert not run.gradients[lonely.index].any()
    assert torch.equal(unused.weight, before)


def test_a_loss_that_is_not_finite_stops_the_run_and_no_number_of_its_gradients_can_be_used() -> None:
    model = square_llama()
    run = Loopback(model, full_units(find_layers(model)), learning_rates=LEARNING_RATES)
    with torch.no_grad():
        model.get_output_embeddings().get_parameter("weight").fill_(float("nan"))
    with pytest.raises(NonFiniteLossError, match=r"loss of step 0 is nan; learning_rate was 0\.001 there"):
        run.step(0, [batch(0)])
    assert run.announced
    for ready in run.announced:
        slot = torch.zeros(run.worker.units[ready.layer].numel)
        run.worker.send(0, ready.layer, slot)
        assert slot.isnan().all()


def test_the_peak_of_live_memory_is_measured_in_its_step_alone_and_covers_weights_and_activations() -> None:
    model = square_llama()
    run = Loopback(model, full_units(find_layers(model)), learning_rates=LEARNING_RATES)
    reports = [run.step(step, [batch(step)]) for step in range(3)]
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert [report.peak_device_bytes is None for report in reports] == [True, False, True]
    assert reports[1].peak_device_bytes is not None
    assert reports[1].peak_device_bytes > weights


def test_a_unit_that_one_step_does_not_use_still_gets_the_delta_of_the_step_before() -> None:
    runs = []
    for flushes in (False, True):
        model = square_llama()
        run = Loopback(model, full_units(find_layers(model)), learning_rates=LEARNING_RATES)
        run.step(0, [batch(0)])
        if flushes:
            run.worker.flush()
        blocks = model.get_submodule("model.layers")
        assert isinstance(blocks, nn.ModuleList)
        skipped, blocks[1] = blocks[1], _Skip()
        run.step(1, [batch(1)])
        blocks[1] = skipped
        run.worker.flush()
        runs.append(model)
    assert distance(*runs) == 0.0


class _Skip(nn.Module):
    def forward(self, hidden: torch.Tensor, *_args: object, **_kwargs: object) -> torch.Tensor:
        return hidden


def test_a_closed_worker_lets_its_model_go() -> None:
    model = square_llama()
    run = Loopback(model, identity_units(model), learning_rates=LEARNING_RATES)
    run.step(0, [batch(0)])
    run.worker.close()
    held = weakref.ref(model)
    del model, run
    gc.collect()
    assert held() is None
