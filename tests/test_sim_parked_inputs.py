"""Blocks' inputs that go down and come back, simulated: against waits that can be counted by hand, and a live peak."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig

from lsp_ray.config import LspConfig, Weights
from lsp_ray.device.backend import CpuBackend
from lsp_ray.device.host_activations import HostActivations
from lsp_ray.device.memory import peak_of
from lsp_ray.errors import ConfigError
from lsp_ray.methods.lsp import lsp_units
from lsp_ray.models.layers import find_layers
from lsp_ray.models.loss import summed_loss, target_positions
from lsp_ray.models.shared_inputs import shared_inputs
from lsp_ray.plan.skeleton import shape_of_model
from lsp_ray.schedule.policy import POLICIES
from lsp_ray.sim.costs import LayerCosts, StepCosts
from lsp_ray.sim.forecast import forecast
from lsp_ray.sim.hardware_profile import load_hardware
from lsp_ray.sim.longest import longest
from lsp_ray.sim.memory import device_memory, host_memory
from lsp_ray.sim.model_shape import LayerShape, LinearShape, ModelShape
from lsp_ray.sim.simulation import Simulation
from lsp_ray.sim.simulator import Simulator
from lsp_ray.sim.workload import Workload
from lsp_ray.trace import WorkStream

times = st.integers(1, 8).map(float)


def costs_of(num_blocks: int, num_micro_batches: int = 1, num_buffers: int = 0, **seconds: float) -> StepCosts:
    layers = (LayerCosts(**seconds),) * num_blocks
    return StepCosts(layers=layers, num_buffers=num_buffers, num_micro_batches=num_micro_batches)


def run(costs: StepCosts, policy: str | None = None) -> Simulation:
    owners = [0] * len(costs.layers)
    return Simulator(costs, None if policy is None else POLICIES[policy](owners), owners).run()


@given(st.integers(1, 8), st.integers(1, 3), times, times, times, times)
def test_a_pass_waits_for_what_all_ways_down_and_each_way_up_take_longer_than_the_blocks(
    num_blocks: int, num_micro_batches: int, forward_s: float, backward_s: float, down_s: float, up_s: float
) -> None:
    """Of N blocks N - 3 inputs go: down from the second block's begin, all but two before the last block's; up one by
    one, from the begin of the backward before the last."""
    costs = costs_of(
        num_blocks,
        num_micro_batches,
        forward_s=forward_s,
        backward_s=backward_s,
        input_d2h_s=down_s,
        input_h2d_s=up_s,
    )
    step, num_parked = run(costs).typical, max(0, num_blocks - 3)
    late_s = max(0.0, num_parked * down_s - (num_parked + 1) * forward_s) + num_parked * max(0.0, up_s - backward_s)
    assert step.exposed.activations_s == pytest.approx(num_micro_batches * late_s)
    assert step.exposed.total_s == step.exposed.activations_s
    assert step.step_s == pytest.approx(costs.compute_s + step.exposed.activations_s)
    assert step.busy_s[WorkStream.D2H] == pytest.approx(num_micro_batches * num_parked * down_s)
    assert step.busy_s[WorkStream.H2D] == pytest.approx(num_micro_batches * num_parked * up_s)


@given(st.sampled_from(sorted(POLICIES)), times, times, times, times, st.integers(0, 4).map(float))
def test_with_weights_deltas_and_payloads_on_the_link_everything_arrives(
    policy: str, forward_s: float, cpu_s: float, h2d_s: float, input_s: float, weights_s: float
) -> None:
    costs = costs_of(
        6,
        2,
        num_buffers=2 if weights_s else 0,
        forward_s=forward_s,
        backward_s=2.0,
        d2h_s=1.0,
        cpu_s=cpu_s,
        h2d_s=h2d_s,
        input_d2h_s=input_s,
        input_h2d_s=input_s,
        weights_s=weights_s,
    )
    step = run(costs, policy).typical
    assert step.step_s >= 2 * 3 * 2 * input_s - 1e-9  # one copy at a time, both ways
    assert step.busy_s[WorkStream.D2H] <= step.step_s + 1e-9
    assert step.step_s == pytest.approx(costs.compute_s + step.exposed.total_s)


LAYER = LayerShape(
    linears=tuple(LinearShape(rows=8192, columns=8192, input=0) for _ in range(12)), raw_numel=16384, is_block=True
)
MODEL = ModelShape(
    layers=(LAYER,) * 80,
    num_parameters=80 * 12 * 8192**2 + 2 * 32000 * 8192,
    hidden_size=8192,
    attention_width=8192,
    repeated_width=0,
    num_logits=32000,
)
WORK = Workload(
    method="lsp", batch_size=1, seq_length=4096, bits=4, weights="host", gradient_checkpointing=True, subspace_dim=512
)
HOST = replace(WORK, activations="host")


def test_three_inputs_take_the_place_of_all_and_the_host_holds_the_others() -> None:
    here, there = device_memory(MODEL, WORK, 0.0), device_memory(MODEL, HOST, 0.0)
    assert here.peak_bytes - there.peak_bytes == pytest.approx(77 * 4096 * 8192 * 2)
    assert host_memory(MODEL, HOST, on_gpu=True).inputs == 77 * 4096 * 8192 * 2
    assert host_memory(MODEL, WORK, on_gpu=True).inputs == 0
    with pytest.raises(ConfigError, match=r"^workload\.activations must be device but with gradient checkpointing"):
        Workload(method="lora", batch_size=1, seq_length=8, activations="host")


def test_longer_examples_fit_by_as_much_as_inputs_leave_the_device_and_a_link_shows_when_it_is_slow() -> None:
    machine = replace(load_hardware("rtx4090"), device_memory_bytes=12e9)
    slow = replace(machine, d2h_bytes_per_s=0.2e9, h2d_bytes_per_s=0.2e9)
    row = forecast(MODEL, WORK, machine, "layerwise")
    found, on_slow, bounded = (
        longest(MODEL, row, machine),
        longest(MODEL, row, slow),
        longest(MODEL, row, machine, 4096),
    )
    assert found.host > 2 * found.device > 4096
    assert found.waits < 0.01 < on_slow.waits
    assert (bounded.device, bounded.host) == (4096, 4096)
    for length, home in zip((found.device, found.host), get_args(Weights), strict=True):
        fitting, longer = (
            forecast(MODEL, replace(WORK, seq_length=tokens, activations=home), machine, "layerwise")
            for tokens in (length, length + 512)
        )
        assert (bool(fitting.misfits), bool(longer.misfits)) == (False, True)


@pytest.mark.parametrize("bf16", [True, False])
def test_the_devices_peak_is_forecast_within_a_twentieth(bf16: bool) -> None:
    config = LlamaConfig(
        hidden_size=256, intermediate_size=768, num_hidden_layers=12, num_attention_heads=4, vocab_size=256
    )
    dtype = torch.bfloat16 if bf16 else torch.float32
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    layers, shape = find_layers(model), shape_of_model(model)
    lsp = LspConfig(subspace_dim=16, delta="apart")  # gradients that stay at the leaves here are to be small
    lsp_units(layers, lsp, seed=0, shared=shared_inputs(model), dtype=dtype)
    ids_BS = torch.zeros(4, 256, dtype=torch.int64)
    batch = {"input_ids": ids_BS, "labels": ids_BS, "attention_mask": torch.ones_like(ids_BS)}
    batch["positions"] = target_positions(ids_BS)
    work = Workload(
        method="lsp",
        batch_size=4,
        seq_length=256,
        typical_targets=4 * 255,
        bf16=bf16,
        apart=True,
        subspace_dim=16,
        gradient_checkpointing=True,
        activations="host",
    )
    parts = device_memory(shape, work, 0)
    expected = replace(parts, weights=0, noise=0, deltas=0, projectors=0, payload_buffers=0).peak_bytes
    on_host = host_memory(shape, work, on_gpu=True).inputs
    gc.collect()  # what earlier tests have left would go meanwhile
    with peak_of(torch.device("cpu")) as live:
        before = live.live_bytes
        blocks = [(unit, layer.block) for unit, layer in enumerate(layers) if layer.block is not None]
        activations = HostActivations(blocks, CpuBackend(), 4 * 256 * 256 * dtype.itemsize)
        assert on_host == sum(slot.nbytes for slot in activations.host_bytes)
        activations.start()
        summed_loss(model, batch).backward()
    activations.close()
    assert live.peak_bytes - before - on_host == pytest.approx(expected, rel=0.05)
