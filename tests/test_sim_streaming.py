"""Weights that come up, simulated: against waits that can be counted by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lsp_ray.errors import ConfigError
from lsp_ray.schedule.policy import POLICIES
from lsp_ray.sim.costs import LayerCosts, StepCosts
from lsp_ray.sim.forecast import forecast
from lsp_ray.sim.hardware_profile import load_hardware
from lsp_ray.sim.memory import device_memory, host_memory
from lsp_ray.sim.model_shape import LayerShape, LinearShape, ModelShape
from lsp_ray.sim.simulation import Simulation
from lsp_ray.sim.simulator import Simulator
from lsp_ray.sim.workload import Workload
from lsp_ray.trace import WorkStream

times = st.integers(0, 8).map(float)


def costs_of(num_blocks: int, num_micro_batches: int = 1, num_buffers: int = 2, **seconds: float) -> StepCosts:
    return StepCosts(
        layers=(LayerCosts(**seconds),) * num_blocks, num_buffers=num_buffers, num_micro_batches=num_micro_batches
    )


def run(costs: StepCosts, policy: str | None = None) -> Simulation:
    owners = [0] * len(costs.layers)
    return Simulator(costs, None if policy is None else POLICIES[policy](owners), owners).run()


@given(st.integers(2, 7), st.integers(1, 3), times, times, st.integers(1, 8).map(float))
def test_a_block_waits_for_what_its_weights_take_longer_than_the_block_before(
    num_blocks: int, num_micro_batches: int, forward_s: float, backward_s: float, weights_s: float
) -> None:
    """Of two buffers one is free when a block begins; the two at either end are there when the way turns."""
    costs = costs_of(num_blocks, num_micro_batches, forward_s=forward_s, backward_s=backward_s, weights_s=weights_s)
    step = run(costs).typical
    late_s = max(0.0, weights_s - forward_s) + max(0.0, weights_s - backward_s)
    assert step.exposed.weights_s == pytest.approx(num_micro_batches * (num_blocks - 2) * late_s)
    assert step.exposed.total_s == step.exposed.weights_s
    assert step.step_s == pytest.approx(costs.compute_s + step.exposed.weights_s)


@given(st.integers(2, 7), st.integers(1, 4), times, times, times, st.integers(1, 8).map(float), times)
def test_pieces_of_the_output_embedding_come_up_between_forward_and_backward(
    num_blocks: int,
    num_pieces: int,
    forward_s: float,
    backward_s: float,
    loss_s: float,
    weights_s: float,
    piece_s: float,
) -> None:
    """Each while what is before it computes; the last block stays in one of two buffers if there is only one piece.

    Where a step ends, the first two blocks stay.
    """
    costs = replace(
        costs_of(num_blocks, 2, forward_s=forward_s, backward_s=backward_s, weights_s=weights_s),
        loss_s=num_pieces * loss_s,
        pieces_s=(piece_s,) * num_pieces,
    )
    late = [
        (num_blocks - 2, weights_s - forward_s),
        (1, piece_s - forward_s),
        (num_pieces - 1, piece_s - loss_s),
        (num_pieces > 1, weights_s - loss_s),
        (num_blocks - 1, weights_s - backward_s),
    ]
    step = run(costs).typical
    assert step.exposed.weights_s == pytest.approx(2 * sum(count * max(0.0, late_s) for count, late_s in late))
    assert step.step_s == pytest.approx(costs.compute_s + step.exposed.weights_s)


@given(st.sampled_from(sorted(POLICIES)), times, times, st.integers(1, 4).map(float))
def test_weights_that_fit_the_buffers_change_nothing(policy: str, cpu_s: float, h2d_s: float, weights_s: float) -> None:
    costs = costs_of(4, num_buffers=4, forward_s=1.0, backward_s=2.0, cpu_s=cpu_s, h2d_s=h2d_s, weights_s=weights_s)
    ours, theirs = run(costs, policy), run(replace(costs, num_buffers=0), policy)
    assert ours.typical == theirs.typical


@given(st.sampled_from(sorted(POLICIES)), times, times, times, st.integers(1, 8).map(float))
def test_no_step_is_shorter_than_its_weights_take_and_every_delta_arrives(
    policy: str, forward_s: float, cpu_s: float, h2d_s: float, weights_s: float
) -> None:
    costs = costs_of(5, forward_s=forward_s, backward_s=2.0, d2h_s=1.0, cpu_s=cpu_s, h2d_s=h2d_s, weights_s=weights_s)
    simulation = run(costs, policy)
    step = simulation.typical
    assert step.step_s >= 2 * (5 - 2) * weights_s - 1e-9
    assert step.busy_s[WorkStream.H2D] <= step.step_s + 1e-9
    assert step.step_s == pytest.approx(costs.compute_s + step.exposed.total_s)


def test_a_delta_that_is_due_first_comes_up_first() -> None:
    """All gradients are there at the end of the backward: deltas are due at the first forwards, weights later."""
    costs = costs_of(6, forward_s=1.0, backward_s=3.0, d2h_s=0.0, cpu_s=0.0, h2d_s=0.5, weights_s=0.5)
    assert run(costs, "sequential").typical.exposed.total_s == pytest.approx(0.5, abs=1e-6)


MODEL = ModelShape(
    layers=tuple(
        LayerShape(
            linears=tuple(LinearShape(rows=8192, columns=8192, input=0) for _ in range(12)),
            raw_numel=16384,
            is_block=True,
        )
        for _ in range(80)
    ),
    num_parameters=80 * 12 * 8192**2 + 2 * 32000 * 8192,
    hidden_size=8192,
    attention_width=8192,
    repeated_width=0,
    num_logits=32000,
)
WORK = Workload(
    method="lsp", batch_size=1, seq_length=512, bits=4, weights="host", gradient_checkpointing=True, subspace_dim=512
)


def test_two_blocks_take_the_place_of_all_and_the_host_holds_them() -> None:
    resident = replace(WORK, weights="device")
    here, there = device_memory(MODEL, resident, 0.0), device_memory(MODEL, WORK, 0.0)
    block = here.quantized / 80
    assert there.quantized == 0
    assert there.weight_buffers == pytest.approx(2 * block)
    assert here.peak_bytes - there.peak_bytes == pytest.approx(78 * block)
    assert host_memory(MODEL, WORK, on_gpu=True).weights == pytest.approx(80 * block)
    assert host_memory(MODEL, resident, on_gpu=True).weights == 0
    dense, dense_there = (device_memory(MODEL, replace(work, bits=None, apart=True), 0.0) for work in (resident, WORK))
    assert dense.weights - dense_there.weights == pytest.approx(80 * 12 * 8192**2 * 2)


def test_tables_of_embeddings_stay_on_the_host_and_a_piece_of_the_outputs_takes_a_blocks_place() -> None:
    tables = 2 * 32000 * 8192
    model = replace(MODEL, num_held=tables, head_comes=True)
    assert model.head_pieces == [16000, 16000]
    there, before = device_memory(model, WORK, 0.0), device_memory(MODEL, WORK, 0.0)
    assert before.weights - there.weights == 2 * tables
    assert there.weight_buffers == before.weight_buffers
    hosts = [host_memory(each, WORK, on_gpu=True).weights for each in (model, MODEL)]
    assert hosts[0] - hosts[1] == 2 * tables
    resident = replace(WORK, weights="device")
    assert device_memory(model, resident, 0.0).weights == device_memory(MODEL, resident, 0.0).weights


def test_more_tokens_hide_weights_and_a_slower_link_shows_them() -> None:
    machine = load_hardware("rtx4090")
    exposed = {
        (tokens, rate): forecast(
            MODEL, replace(WORK, seq_length=tokens), replace(machine, h2d_bytes_per_s=rate), "layerwise"
        ).exposed.weights_s
        for tokens, rate in ((512, 13e9), (4096, 13e9), (512, 3e9))
    }
    assert exposed[4096, 13e9] < exposed[512, 13e9] < exposed[512, 3e9]


@pytest.mark.parametrize("changes", [{"gradient_checkpointing": False}, {"bits": None}, {"method": "lora"}])
def test_weights_come_up_for_lsp_apart_and_checkpointed_alone(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"^workload\.weights must be device but for lsp"):
        replace(WORK, **changes)
