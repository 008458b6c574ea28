"""The device's side of training never depends on how fast a stream is: a proof by happens-before, and its proof.

Each planted fault leaves out one of the seam's operations, see `faulty_backends`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
import torch
from transformers import PreTrainedModel

from lsp_ray.config import LspConfig, PayloadDtype
from lsp_ray.device.fits import ClosedFormFit
from lsp_ray.device.host_activations import HostActivations
from lsp_ray.device.refit import Refitter
from lsp_ray.device.streamed_weights import StreamedWeights
from lsp_ray.device.trained_digest import trained_digest
from lsp_ray.device.unit import Unit
from lsp_ray.methods.lsp import lsp_units
from lsp_ray.methods.streaming import stream_weights
from lsp_ray.methods.units import full_units
from lsp_ray.models.layers import find_layers
from lsp_ray.models.loss import Batch
from lsp_ray.optim.codec import Codec
from lsp_ray.schedule.delta_room import DeltaRoom
from lsp_ray.schedule.policy import POLICIES, Delayed, Policy
from lsp_ray.trace import WorkStream
from tests.checking_backend import CheckingBackend
from tests.faulty_backends import Careless, Early, Hasty, Keeping, Unordered
from tests.happens_before import HappensBefore, RaceError
from tests.host_thread import SteppedCondition
from tests.interleaved import InterleavedRun
from tests.loopback import Loopback
from tests.tiny import HIDDEN_SIZE, VOCAB_SIZE, assert_same_weights, deep_model, tiny_model

LSP = LspConfig(subspace_dim=16, nnz_per_row=2, fit="random")
CHECK_EVERY = 6
NUM_ROWS = 20_000  # which come up in two pieces, each larger than any block
STEPS_TO_TAKEOVER = CHECK_EVERY + CHECK_EVERY // 2 + 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    policy: type[Policy]
    method: Literal["lsp", "zero_offload"] = "lsp"
    num_steps: int = 4
    num_micro_batches: int = 1
    recomputes: bool = False
    refits: bool = False
    is_bounded: bool = False
    payload_dtype: PayloadDtype = "float32"
    num_buffers: int = 0  # for weights that come up; 0: they are on the device
    parks_inputs: bool = False

    @property
    def lsp(self) -> LspConfig:
        return replace(LSP, delta="apart") if self.num_buffers else LSP


SETTINGS = {
    **{f"{name}, lsp": Setting(policy=policy) for name, policy in POLICIES.items()},
    **{f"{name}, zero_offload": Setting(policy=policy, method="zero_offload") for name, policy in POLICIES.items()},
    **{f"{name}, bounded": Setting(policy=policy, is_bounded=True) for name, policy in POLICIES.items()},
    "encoded as int8": Setting(policy=POLICIES["layerwise"], method="zero_offload", payload_dtype="int8"),
    "encoded as bfloat16": Setting(policy=Delayed, payload_dtype="bfloat16"),
    "accumulated": Setting(policy=POLICIES["layerwise"], num_micro_batches=3),
    "recomputed": Setting(policy=POLICIES["earliest_deadline"], recomputes=True),
    "layerwise, weights come up": Setting(policy=POLICIES["layerwise"], num_buffers=2, num_steps=3),
    "delayed, weights come up": Setting(policy=Delayed, num_buffers=2, num_steps=3),
    "weights come up, accumulated, to three buffers": Setting(
        policy=POLICIES["layerwise"], num_micro_batches=2, num_buffers=3, num_steps=3
    ),
    "layerwise, activations wait in main memory": Setting(
        policy=POLICIES["layerwise"], method="zero_offload", parks_inputs=True, num_steps=3
    ),
    "delayed, activations wait in main memory, accumulated": Setting(
        policy=Delayed, parks_inputs=True, num_micro_batches=2, num_steps=3
    ),
    "weights and activations wait in main memory": Setting(
        policy=POLICIES["layerwise"], parks_inputs=True, num_buffers=2, num_micro_batches=2, num_steps=3
    ),
    "refitted": Setting(policy=POLICIES["layerwise"], num_steps=STEPS_TO_TAKEOVER, refits=True),
    "refitted, delayed": Setting(policy=Delayed, num_steps=STEPS_TO_TAKEOVER, refits=True),
}


def batch(seed: int) -> Batch:
    ids = torch.randint(3, VOCAB_SIZE, (2, 8), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def batches_of(setting: Setting) -> list[list[Batch]]:
    count = setting.num_micro_batches
    return [[batch(step * count + index) for index in range(count)] for step in range(setting.num_steps)]


def room_of(units: Sequence[Unit]) -> DeltaRoom:
    sizes = tuple(4 * unit.numel for unit in units)
    return DeltaRoom(sizes=sizes, num_bytes=2 * max(sizes))


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    model: PreTrainedModel
    units: list[Unit]
    refitter: Refitter | None
    weights: StreamedWeights | None
    activations: HostActivations | None


def prepared(
    setting: Setting, backend: CheckingBackend | None = None, changed: SteppedCondition | None = None
) -> Prepared:
    """Without a backend, weights and activations are on the device."""
    is_moved = setting.num_buffers > 0 or setting.parks_inputs
    num_blocks, num_rows = 6 if setting.parks_inputs else 4, NUM_ROWS if setting.num_buffers else VOCAB_SIZE
    model = deep_model("llama", num_blocks, num_rows) if is_moved else tiny_model("llama")
    model.train()
    if setting.recomputes or (is_moved and backend is not None):
        model.activation_checkpointing_enable({"use_reentrant": False})
    layers, weights, activations, refitter = find_layers(model), None, None, None
    if setting.num_buffers and backend is not None:
        weights = stream_weights(
            model, layers, setting.lsp, backend, quantized=False, num_buffers=setting.num_buffers, changed=changed
        )
    if setting.parks_inputs and backend is not None:
        blocks = [(unit, layer.block) for unit, layer in enumerate(layers) if layer.block is not None]
        up = weights.link if weights is not None else None
        num_pieces = weights.num_pieces if weights is not None else 0
        size = 2 * 8 * HIDDEN_SIZE * 4
        activations = HostActivations(blocks, backend, size, up=up, changed=changed, num_pieces=num_pieces)
    units = lsp_units(layers, setting.lsp, seed=0)[0] if setting.method == "lsp" else full_units(layers)
    if setting.refits:
        options: dict[str, Any] = {"check_every": CHECK_EVERY, "num_sketched": 1, "seed": 0}
        refitter = Refitter(units, ClosedFormFit(balanced=False), max_bias=0.0, **options)
    return Prepared(model=model, units=units, refitter=refitter, weights=weights, activations=activations)


def interleaved(setting: Setting, backend: CheckingBackend, *, seed: int) -> tuple[PreTrainedModel, InterleavedRun]:
    changed = SteppedCondition()
    parts = prepared(setting, backend, changed)
    shards = [unit.index % 2 for unit in parts.units]
    run = InterleavedRun(
        parts.model,
        parts.units,
        setting.policy(shards, room=room_of(parts.units) if setting.is_bounded else None),
        backend,
        learning_rates=[1e-3] * setting.num_steps,
        seed=seed,
        shard_of_unit=shards,
        refitter=parts.refitter,
        codec=Codec(setting.payload_dtype),
        weights=parts.weights,
        activations=parts.activations,
        changed=changed,
    )
    run.train(batches_of(setting))
    return parts.model, run


def in_program_order(setting: Setting) -> tuple[PreTrainedModel, int]:
    """The model, and a digest of all that was trained."""
    parts = prepared(setting)
    run = Loopback(
        parts.model,
        parts.units,
        learning_rates=[1e-3] * setting.num_steps,
        staleness=setting.policy.staleness,
        refitter=parts.refitter,
        codec=Codec(setting.payload_dtype),
    )
    for step, batches in enumerate(batches_of(setting)):
        run.step(step, batches)
    run.worker.flush()
    return parts.model, trained_digest(parts.units)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_access_is_ordered_and_no_bit_depends_on_when_things_happen(name: str) -> None:
    reference, digest = in_program_order(SETTINGS[name])
    for seed in range(2):
        backend = CheckingBackend()
        model, run = interleaved(SETTINGS[name], backend, seed=seed)
        assert_same_weights(model, reference)
        assert trained_digest(run.worker.units) == digest
        assert backend.order.num_checked > 100
        assert (run.num_taken_over > 0) == SETTINGS[name].refits


LAYERWISE, DELAYED = SETTINGS["layerwise, lsp"], SETTINGS["delayed, lsp"]
FAULTS: dict[str, tuple[Setting, Callable[[], CheckingBackend], str]] = {
    "no wait before a delta is added": (
        LAYERWISE,
        lambda: Unordered(WorkStream.GPU),
        "a read by the gpu stream is not ordered after a write by the h2d stream",
    ),
    "no fence between the backward and the copy of a payload": (
        LAYERWISE,
        lambda: Unordered(WorkStream.D2H),
        "a read by the d2h stream is not ordered after a write by the gpu stream",
    ),
    "a payload is published before its copy is done": (
        LAYERWISE,
        lambda: Hasty(WorkStream.D2H),
        r"publishing slot down \d by the d2h thread is not ordered after a write by the d2h stream",
    ),
    "a slot is written again before its copy is done": (
        replace(DELAYED, num_steps=8),
        lambda: Hasty(WorkStream.H2D),
        r"taking slot up \d to write by the cpu thread \d is not ordered after a read by the h2d stream",
    ),
    "a slot is written again before the update or the copy that reads it": (
        replace(DELAYED, policy=Careless, num_steps=8),
        CheckingBackend,
        r"taking slot \w+ \d to (read|write) by the .* is not ordered after ",
    ),
    "a buffer for weights is written again while the compute reads it": (
        SETTINGS["layerwise, weights come up"],
        lambda: Hasty(WorkStream.GPU),
        "a write by the h2d stream is not ordered after a read by the gpu stream",
    ),
    "a buffer for a piece of the output embedding is written again while the compute reads it": (
        SETTINGS["layerwise, weights come up"],
        lambda: Early(NUM_ROWS * HIDDEN_SIZE),
        "a write by the h2d stream is not ordered after a read by the gpu stream",
    ),
    "no wait before weights are read": (
        SETTINGS["layerwise, weights come up"],
        lambda: Unordered(WorkStream.GPU),
        "a read by the gpu stream is not ordered after a write by the h2d stream",
    ),
    "a buffer for activations is written again while the compute reads it": (
        SETTINGS["layerwise, activations wait in main memory"],
        lambda: Hasty(WorkStream.GPU),
        "a write by the h2d stream is not ordered after a (read|write) by the gpu stream",
    ),
    "a buffer for activations is filled again before its copy is down": (
        SETTINGS["layerwise, activations wait in main memory"],
        lambda: Unordered(WorkStream.GPU),
        "a write by the gpu stream is not ordered after a read by the d2h stream",
    ),
    "activations go down before they are there": (
        SETTINGS["layerwise, activations wait in main memory"],
        lambda: Unordered(WorkStream.D2H),
        "a read by the d2h stream is not ordered after a write by the gpu stream",
    ),
    "a delta's memory is not handed over": (
        LAYERWISE,
        Keeping,
        "a buffer is let go while a read by the gpu stream may not be over",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_whatever_the_seed_and_in_the_same_place_each_time(name: str) -> None:
    setting, backend_of, message = FAULTS[name]
    for seed in range(2):
        verdicts = set()
        for _ in range(2):
            with pytest.raises(RaceError, match=message) as raised:
                interleaved(setting, backend_of(), seed=seed)
            verdicts.add(str(raised.value))
        assert len(verdicts) == 1


def test_a_seed_determines_what_happens_when() -> None:
    runs = [interleaved(LAYERWISE, CheckingBackend(), seed=seed)[1].happened for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    assert {"the d2h stream", "the h2d stream"} <= {who for run in runs for who in run}  # copies lagged behind


def test_a_copy_is_not_there_before_its_fence_is_passed() -> None:
    backend = CheckingBackend()
    source = torch.ones(3)
    copy = backend.empty(WorkStream.H2D, 3, torch.float32)
    backend.copy_async(WorkStream.H2D, copy, source)
    assert copy.isnan().all()
    backend.record(WorkStream.H2D).synchronize()
    assert torch.equal(copy, source)


def test_reads_need_no_order_among_themselves_and_a_message_orders_a_write_after_a_read() -> None:
    order, buffer = HappensBefore(), torch.zeros(2)
    order.access("one", buffer, "a read", is_write=False)
    order.access("two", buffer, "a read", is_write=False)
    order.learn("two", order.tell("one"))
    order.access("two", buffer[1:], "a write", is_write=True)
    with pytest.raises(RaceError, match="a read by one is not ordered after a write by two"):
        order.access("one", buffer, "a read", is_write=False)


def test_what_an_agent_does_after_it_told_is_not_known() -> None:
    order, buffer = HappensBefore(), torch.zeros(2)
    told = order.tell("one")
    order.access("one", buffer, "a write", is_write=True)
    order.learn("two", told)
    with pytest.raises(RaceError):
        order.access("two", buffer, "a read", is_write=False)
