from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lsp_ray.config import Delta, LspConfig
from lsp_ray.device import projected_linear
from lsp_ray.device.block_graphs import BlockGraphs
from lsp_ray.device.fits import ClosedFormFit
from lsp_ray.device.judge import Judge
from lsp_ray.device.projected_linear import ProjectedLinear
from lsp_ray.device.refit import Refitter
from lsp_ray.device.unit import Unit
from lsp_ray.errors import ConfigError
from lsp_ray.methods.lsp import lsp_payload_parts, lsp_units, merged_state
from lsp_ray.methods.units import full_units
from lsp_ray.models.layers import find_layers
from lsp_ray.models.loss import Batch
from lsp_ray.models.shared_inputs import shared_inputs
from lsp_ray.optim.codec import Codec
from lsp_ray.projection.block_factor import BlockFactor
from lsp_ray.projection.sparse_projector import SparseProjector
from tests.loopback import Loopback
from tests.recording_backend import RecordingBackend

NUM_BLOCKS, NUM_STEPS = 3, 9
GRAPHED = NUM_BLOCKS + 1  # the norm before the head is a unit of one module as well
LENGTHS = (24, 16, 16)  # of a batch, by step


class Run:
    """Trains a tiny Llama; `backend` is None where nothing is recorded."""

    def __init__(
        self,
        *,
        recorded: bool,
        method: str = "lsp",
        dtype: torch.dtype = torch.float32,
        checkpointed: bool = False,
        renews: bool = False,
        attention_dropout: float = 0.0,
        delta: Delta = "merged",
        **options: Any,
    ) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=NUM_BLOCKS,
            num_attention_heads=4,
            num_key_value_heads=2,
            attention_dropout=attention_dropout,
        )
        self.model: PreTrainedModel = LlamaForCausalLM(config).to(dtype)  # type: ignore[arg-type]
        self.model.train()
        self.before = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.layers = layers = find_layers(self.model)
        if checkpointed:
            self.model.activation_checkpointing_enable({"use_reentrant": False})
        if method == "lsp":
            lsp = LspConfig(subspace_dim=16, nnz_per_row=2, fit="random", delta=delta)
            if lsp.is_apart:
                options["sums"] = dict(enumerate(lsp_payload_parts(layers, lsp)))
            units = lsp_units(layers, lsp, seed=0, shared=shared_inputs(self.model))[0]
        else:
            units = full_units(layers)
        self.notes: list[str] = []
        self.backend = RecordingBackend() if recorded else None
        refitter = Refitter(units, ClosedFormFit(balanced=False), check_every=4, max_bias=0.0, num_sketched=1, seed=0)
        self.loop = Loopback(
            self.model,
            units,
            learning_rates=[1e-2] * NUM_STEPS,
            weight_decay=0.1,
            native=method == "native",
            refitter=refitter if renews else None,
            judge=Judge(units, max_grad_norm=0.1),
            backend=self.backend,
            **options,
        )

    def train(self, accumulation: int = 1, steps: int = NUM_STEPS, first: int = 0) -> list[tuple[float, float]]:
        found = []
        for step in range(first, first + steps):
            micro_batches = [batch(10 * step + part, LENGTHS[step % len(LENGTHS)]) for part in range(accumulation)]
            report = self.loop.step(step, micro_batches)
            self.notes += report.notes
            found.append((report.loss, report.grad_norm))
        return found

    def weights(self) -> dict[str, torch.Tensor]:
        self.loop.worker.flush()
        return merged_state(self.model)


def batch(seed: int, length: int) -> Batch:
    ids = torch.randint(0, 64, (2, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def assert_same_bits(ours: Run, theirs: Run) -> None:
    found, expected = ours.weights(), theirs.weights()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert any(not torch.equal(found[name], tensor) for name, tensor in ours.before.items())


@pytest.mark.parametrize(
    ("accumulation", "options"),
    [
        (1, {"dtype": torch.bfloat16, "codec": Codec("bfloat16")}),
        (3, {"dtype": torch.bfloat16, "codec": Codec("bfloat16"), "checkpointed": True}),
        (1, {"codec": Codec("int8"), "staleness": 1}),
        (1, {"checkpointed": True, "renews": True}),
        (2, {"delta": "apart", "renews": True, "dtype": torch.bfloat16, "codec": Codec("int8")}),
        (2, {"method": "native", "dtype": torch.bfloat16}),
        (1, {"method": "zero_offload", "checkpointed": True}),
    ],
)
def test_graphs_change_no_bit(accumulation: int, options: dict[str, Any]) -> None:
    recorded, plain = (Run(recorded=is_recorded, **options) for is_recorded in (True, False))
    assert recorded.train(accumulation) == plain.train(accumulation)
    assert_same_bits(recorded, plain)
    assert recorded.backend is not None
    # step 1 is the one whose memory is measured: two steps of 24 tokens and five of 16 remain
    launched = 2 * accumulation * 7 * GRAPHED
    assert recorded.backend.num_recorded == 2 * 2 * GRAPHED
    if "renews" in options:  # blocks that are looked at run without their graphs
        assert 0 < recorded.backend.num_launched < launched
    else:
        assert recorded.backend.num_launched == launched


def test_a_backward_that_cannot_be_recorded_ends_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(recorded=True)
    record = run.backend.record_graph if run.backend is not None else None

    def record_forwards(launched: Any, *, apart: bool) -> Any:
        if launched.__name__ == "_backward":
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        assert record is not None
        return record(launched, apart=apart)

    monkeypatch.setattr(run.backend, "record_graph", record_forwards)
    with pytest.raises(ConfigError, match=r"^runtime\.cuda_graphs must be false .* got True; operation not permitted$"):
        run.train()


def test_closed_a_model_is_as_it_was() -> None:
    run = Run(recorded=True, checkpointed=True)
    run.train()
    run.loop.worker.close()
    blocks = [run.model.get_submodule(f"model.layers.{index}") for index in range(NUM_BLOCKS)]
    assert all("forward" not in vars(block) and block.gradient_checkpointing for block in blocks)


def renew(run: Run) -> None:
    """Give a linear another projector, in memory of its own."""
    module = next(module for module in run.model.modules() if isinstance(module, ProjectedLinear))
    old = module.projector
    left = BlockFactor(old.left.value_FR.flip(0).clone(), old.left.groups, old.left.scale_F)
    module.set_projector(SparseProjector(left, old.right))


@pytest.mark.parametrize("looks", [True, False])
def test_what_has_moved_is_recorded_again(looks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not to look would not go unnoticed."""
    if not looks:
        monkeypatch.setattr("lsp_ray.device.block_graphs._Block.has_moved", lambda _: False)
    recorded, plain = (Run(recorded=is_recorded) for is_recorded in (True, False))
    for run in (recorded, plain):
        run.train(steps=6)
        run.loop.worker.drain()
        renew(run)
    assert (recorded.train(steps=3, first=6) == plain.train(steps=3, first=6)) == looks


@pytest.mark.parametrize("copies", [True, False])
def test_new_projectors_are_copied_to_where_graphs_read_the_old_ones(
    copies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lsp_ray.device.block_graphs._Block.has_moved", lambda _: False)
    if not copies:
        monkeypatch.setattr(projected_linear, "_in_place", lambda _old, new: new)
    recorded, plain = (Run(recorded=is_recorded, renews=True) for is_recorded in (True, False))
    assert (recorded.train() == plain.train()) == copies


def test_a_payload_that_is_taken_too_late_is_another_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks' graphs leave their gradients in one place."""
    late: list[tuple[Unit, torch.Tensor]] = []
    taken: list[torch.Tensor] = []
    run = Run(recorded=True, method="native")
    run.train(steps=6)
    graphs = run.loop.worker._graphs
    assert isinstance(graphs, BlockGraphs)

    def take(unit: Unit, flat: torch.Tensor) -> None:
        taken.append(flat.clone())
        late.append((unit, flat))

    monkeypatch.setattr(graphs._shared, "take_gradients", take)
    run.train(steps=1, first=6)
    blocks = slice(1, None)  # after the norm before the head, which has a size of its own
    same = [torch.equal(early, flat) for early, (_, flat) in zip(taken[blocks], late[blocks], strict=True)]
    assert same == [False] * (NUM_BLOCKS - 1) + [True]


class Gated(nn.Module):
    """A block's MLP that asks the host which tokens to work on, as routed experts do."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        chosen = (hidden.sum(-1) > 0).nonzero(as_tuple=True)
        return torch.zeros_like(hidden).index_put(chosen, self.inside(hidden[chosen]))


def test_blocks_that_no_graph_can_hold_run_as_ever_and_say_why_once() -> None:
    dropping = Run(recorded=True, attention_dropout=0.5)
    dropping.train()
    assert dropping.notes == ["model.layers.0 and 2 more: no CUDA graph, as it draws random numbers"]
    gated, plain = (Run(recorded=is_recorded, method="native") for is_recorded in (True, False))
    for run in (gated, plain):
        block = run.model.get_submodule("model.layers.1")
        block.mlp = Gated(block.get_submodule("mlp"))
    assert gated.train() == plain.train()
    assert gated.notes == ["model.layers.1: no CUDA graph, as the sizes in it depend on the data (nonzero)"]
