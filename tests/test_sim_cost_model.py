"""Costs and memory against numbers worked out by hand, and how they move."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lsp_ray.config import Method, PolicyName
from lsp_ray.errors import ConfigError
from lsp_ray.projection import sparse_projector
from lsp_ray.sim.advice import DIM_STEP, HIDDEN, advise, largest_hidden_dim
from lsp_ray.sim.cost_model import CostModel
from lsp_ray.sim.costs import StepCosts
from lsp_ray.sim.device_work import DENSE_DIM
from lsp_ray.sim.forecast import forecast, simulate
from lsp_ray.sim.hardware_profile import HardwareProfile, load_hardware
from lsp_ray.sim.memory import host_memory, peak_payload_bytes
from lsp_ray.sim.model_shape import LayerShape, LinearShape, ModelShape
from lsp_ray.sim.workload import Workload
from lsp_ray.trace import Span, WorkStream

# one unit of each a second, so that seconds are operations and bytes
UNIT = HardwareProfile(
    name="unit",
    on_gpu=True,
    device_memory_bytes=1e12,
    device_bf16_flops=1.0,
    device_float32_flops=1.0,
    device_bytes_per_s=1e30,
    activation_bytes_per_s=1e30,
    gather_bytes_per_s=1e30,
    d2h_bytes_per_s=2.0,
    h2d_bytes_per_s=4.0,
    pageable_fraction=0.5,
    shared_link_rate=1.0,
    host_memory_bytes=1e12,
    host_bytes_per_s=28.0,
    core_bytes_per_s=7.0,
    core_float32_flops=8.0,
    num_cores=4,
    hop_s=0.0,
)
LINEAR = LinearShape(rows=64, columns=32)
MODEL = ModelShape(
    layers=(LayerShape(linears=(LINEAR,), raw_numel=10, is_block=True),) * 2,
    num_parameters=5000,
    hidden_size=32,
    attention_width=16,
    key_value_width=16,
    num_logits=7,
)
LSP = Workload(method="lsp", batch_size=2, seq_length=3, subspace_dim=8, nnz_per_row=2)


def work(method: Method, **changes: Any) -> Workload:
    return replace(LSP, method=method, **changes)


def costs(workload: Workload, **changes: Any) -> StepCosts:
    return CostModel(model=MODEL, workload=workload, hardware=replace(UNIT, **changes)).step()


def test_products_of_plain_training_take_six_operations_a_parameter_and_token() -> None:
    step = costs(work("native"))
    attention = 4 * 6 * 3 * 16
    assert step.layers[0].forward_s == pytest.approx(2 * 6 * LINEAR.numel + attention)
    assert step.layers[0].backward_s == pytest.approx(4 * 6 * LINEAR.numel + 2 * attention)
    assert step.loss_s == pytest.approx(4 * 6 * 32 * 7)


def test_a_compressed_weight_gradient_takes_two_operations_a_token_and_entry_of_the_subspace() -> None:
    native_s, lsp_s = (costs(replace(asked, bf16=False)).layers[0].backward_s for asked in (work("native"), LSP))
    assert native_s - lsp_s == pytest.approx(2 * 6 * (LINEAR.numel - 8 * 8))


def test_up_to_some_dimension_bfloat16_is_projected_by_dense_products() -> None:
    native_s, lsp_s = (costs(asked).layers[0].backward_s for asked in (work("native"), LSP))
    assert native_s - lsp_s == pytest.approx(2 * 6 * (LINEAR.numel - LINEAR.rows * 8 - 8 * 8))
    forward_s = costs(LSP).layers[0].forward_s - costs(work("native")).layers[0].forward_s
    assert forward_s == pytest.approx(2 * 6 * LINEAR.columns * 8)
    assert DENSE_DIM == sparse_projector.DENSE_DIM


def test_the_papers_full_gradient_saves_no_operation() -> None:
    assert costs(replace(LSP, full_gradient=True)).layers[0].backward_s == costs(work("native")).layers[0].backward_s


def test_checkpointing_adds_a_forward_to_the_backward() -> None:
    plain, again = (costs(replace(LSP, gradient_checkpointing=flag)).layers[0] for flag in (False, True))
    assert again.backward_s == pytest.approx(plain.backward_s + plain.forward_s)
    assert again.forward_s == plain.forward_s


def test_native_sends_nothing_and_updates_on_the_device() -> None:
    layer = costs(work("native"), device_bytes_per_s=1.0).layers[0]
    assert (layer.d2h_s, layer.cpu_s, layer.h2d_s, layer.apply_s) == (0.0, 0.0, 0.0, 0.0)
    # AdamW, the gradient made float32 and put into a payload, the delta rounded stochastically: in one pass on CPUs
    assert layer.update_s == (28 + 14 + 44) * (LINEAR.numel + 10)
    on_cpu = costs(work("native"), device_bytes_per_s=1.0, on_gpu=False).layers[0]
    assert on_cpu.update_s == (28 + 14 + 12) * (LINEAR.numel + 10)
    exact = costs(work("native", bf16=False), device_bytes_per_s=1.0).layers[0]
    assert exact.update_s == (28 + 16 + 12) * (LINEAR.numel + 10)


def test_lora_makes_no_weight_gradient_and_updates_its_adapters_alone() -> None:
    layer, native = (costs(replace(work(method), lora_rank=2)).layers[0] for method in ("lora", "native"))
    adapters = 2 * (LINEAR.rows + LINEAR.columns)
    assert layer.forward_s - native.forward_s == pytest.approx(2 * 6 * adapters)
    assert native.backward_s - layer.backward_s == pytest.approx(2 * 6 * (LINEAR.numel - 2 * adapters))
    slow = costs(replace(work("lora"), lora_rank=2), device_bytes_per_s=1.0).layers[0]
    assert slow.update_s == (28 + 16 + 12) * adapters
    assert (slow.d2h_s, slow.cpu_s, slow.h2d_s, slow.apply_s) == (0.0, 0.0, 0.0, 0.0)


def test_galore_keeps_moments_of_its_rank_and_singular_vectors_on_the_device() -> None:
    galore = replace(work("galore"), galore_rank=4)
    parts, native = (forecast(MODEL, asked, UNIT, None).device for asked in (galore, work("native")))
    assert parts.optimizer_state == 2 * 8 * (4 * LINEAR.rows + 10)
    assert parts.projectors == 2 * 4 * 4 * LINEAR.columns
    assert (parts.weights, parts.gradients) == (native.weights, native.gradients)
    whole = forecast(MODEL, replace(galore, galore_rank=LINEAR.columns), UNIT, None).device
    assert (whole.optimizer_state, whole.projectors) == (native.optimizer_state, 0)
    update_s = costs(galore, device_bytes_per_s=1e30).layers[0].update_s
    assert update_s == pytest.approx(4 * 4 * LINEAR.numel)


def test_what_is_saved_of_products_is_counted_at_the_rate_of_products_and_activations_are_the_same_for_all() -> None:
    slow = {"device_bf16_flops": 1e30, "activation_bytes_per_s": 1.0}
    native, zero = (costs(work(method), **slow).layers[0].backward_s for method in ("native", "zero_offload"))
    assert native == zero > 0


@pytest.mark.parametrize(("method", "numel"), [("lsp", 8 * 8 + 10), ("zero_offload", 64 * 32 + 10)])
def test_a_payload_takes_its_bytes_over_the_rate_of_its_direction(method: Method, numel: int) -> None:
    layer = costs(work(method)).layers[0]
    assert (layer.d2h_s, layer.h2d_s) == (4 * numel / 2.0, 4 * numel / 4.0)
    pageable = costs(work(method, pinned=False)).layers[0]
    assert (pageable.d2h_s, pageable.h2d_s) == (4 * numel, 4 * numel / 2.0)


def test_a_matrix_with_a_small_side_is_sent_as_it_is_and_another_uses_half_of_it_at_most() -> None:
    assert LSP.dim_of(LinearShape(rows=100, columns=7)) is None
    assert LSP.dim_of(LinearShape(rows=100, columns=8)) == 4
    assert LSP.dim_of(LinearShape(rows=100, columns=100)) == 8


def test_an_update_is_bound_by_memory_and_whitening_by_arithmetic() -> None:
    adam, both = (costs(replace(LSP, whiten=whiten)).layers[0].cpu_s for whiten in (False, True))
    assert adam == pytest.approx((28 + 16) * 74 / 7.0)  # the moments are copied before, to go back to
    assert both - adam == pytest.approx(8 * 8**3 / 8.0)
    assert costs(replace(LSP, whiten=False, shard_threads=100)).layers[0].cpu_s == pytest.approx(44 * 74 / 28.0)


def test_slices_share_a_layer_where_whole_layers_share_the_memory() -> None:
    one_shard = replace(LSP, shard_threads=4)
    shares = (one_shard, replace(one_shard, num_shards=2), replace(one_shard, num_shards=2, shard_by="slice"))
    alone, layers, slices = (costs(share).layers[0].cpu_s for share in shares)
    adam_s, whitening_s = 44 * 74 / 28.0, 8 * 8**3 / (4 * 8.0)  # memory is full with four threads
    assert alone == pytest.approx(adam_s + whitening_s)
    assert layers == pytest.approx(2 * adam_s + whitening_s)
    assert slices == pytest.approx(adam_s + whitening_s / 2)


def test_moments_are_on_the_device_for_native_and_on_the_host_for_the_others() -> None:
    native, zero = (forecast(MODEL, work(method), UNIT, "sequential") for method in ("native", "zero_offload"))
    assert (native.device.optimizer_state, zero.device.optimizer_state) == (8 * MODEL.num_trained, 0)
    assert zero.bytes_each_way == 4 * MODEL.num_trained


def test_projectors_take_a_value_and_a_row_number_for_each_non_zero_whatever_the_subspace() -> None:
    small, large = (forecast(MODEL, replace(LSP, subspace_dim=dim), UNIT, "layerwise").device for dim in (8, 16))
    assert small.projectors == large.projectors == 2 * (64 + 32) * 2 * (2 + 2)
    assert host_memory(MODEL, LSP).whitening == 2 * 8 * 8 * 8


def test_payload_buffers_hold_what_waits_for_the_link_and_what_waits_for_its_forward() -> None:
    def span(stream: WorkStream, step: int, layer: int, start_s: float, end_s: float) -> Span:
        return Span(stream=stream, step=step, layer=layer, start_s=start_s, end_s=end_s)

    spans = [
        span(WorkStream.GPU, 0, 1, 0.0, 1.0),
        span(WorkStream.GPU, 0, 0, 1.0, 2.0),
        span(WorkStream.D2H, 0, 1, 1.0, 3.0),  # held 1 to 3: 100 bytes
        span(WorkStream.D2H, 0, 0, 3.0, 4.0),  # held 2 to 4: 10 bytes
        span(WorkStream.H2D, 0, 1, 3.5, 4.0),  # held 3.5 to 9: 100 bytes
        span(WorkStream.H2D, 0, 0, 4.0, 5.0),  # held 4 to 6: 10 bytes
        span(WorkStream.GPU, 1, 0, 5.0, 6.0),
        span(WorkStream.GPU, 1, 1, 6.0, 9.0),
    ]
    assert peak_payload_bytes(spans, [10, 100]) == 110
    assert peak_payload_bytes(spans, [1000, 100]) == 1100
    assert peak_payload_bytes([], [10, 100]) == 0


@pytest.mark.parametrize("policy", ["layerwise", "layerwise_fcfs", "earliest_deadline"])
def test_deltas_that_come_up_early_wait_on_the_host_where_they_would_fill_the_device(policy: PolicyName) -> None:
    model, machine = llama(32, 4096), load_hardware("rtx4090-threadripper")
    long = replace(LSP, batch_size=4, seq_length=1024, gradient_checkpointing=True, whiten=False, shard_threads=12)
    zero = forecast(model, replace(long, method="zero_offload"), machine, policy)
    # two layers of deltas, and payloads that wait for their way down, which the policy does not bound
    assert zero.device.payload_buffers < 8 * 4 * model.layers[0].numel
    lsp = forecast(model, replace(long, subspace_dim=1024), machine, policy)
    assert lsp.exposed.total_s < 0.5 * zero.exposed.total_s


def test_what_does_not_fit_is_said_with_both_sizes() -> None:
    small = replace(UNIT, device_memory_bytes=9e3, host_memory_bytes=5e8)
    misfits = forecast(MODEL, LSP, small, "layerwise").misfits
    assert misfits == ("device memory: 0.0 GB needed, 0.0 GB there", "host memory: 1.3 GB needed, 0.5 GB there")
    assert forecast(MODEL, LSP, UNIT, "layerwise").misfits == ()


def test_without_a_gpu_device_and_host_share_one_memory() -> None:
    needed = forecast(MODEL, LSP, UNIT, "layerwise").host.total_bytes
    tight = replace(UNIT, on_gpu=False, host_memory_bytes=needed + 1)
    assert forecast(MODEL, LSP, replace(tight, on_gpu=True), "layerwise").misfits == ()
    assert [line.split(":")[0] for line in forecast(MODEL, LSP, tight, "layerwise").misfits] == ["host memory"]


@pytest.mark.parametrize("name", ["num_shards", "seq_length", "nnz_per_row"])
def test_counts_below_one_are_named(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^workload.{name} must be at least 1, got 0$"):
        work("lsp", **{name: 0})


def llama(num_layers: int = 4, hidden: int = 1024) -> ModelShape:
    square = LinearShape(rows=hidden, columns=hidden)
    wide, narrow = LinearShape(rows=3 * hidden, columns=hidden), LinearShape(rows=hidden, columns=3 * hidden)
    layer = LayerShape(linears=(square,) * 4 + (wide, wide, narrow), raw_numel=2 * hidden, is_block=True)
    return ModelShape(
        layers=(layer,) * num_layers,
        num_parameters=num_layers * layer.numel,
        hidden_size=hidden,
        attention_width=hidden,
        key_value_width=hidden,
        num_logits=1000,
    )


POLICY_NAMES: list[PolicyName] = ["layerwise", "earliest_deadline"]


@pytest.mark.parametrize("policy", POLICY_NAMES)
@given(tokens=st.sampled_from([32, 256, 2048]), threads=st.sampled_from([1, 4, 16]))
@settings(max_examples=9, deadline=None)
def test_the_largest_hidden_subspace_is_hidden_and_the_next_one_is_not(
    policy: PolicyName, tokens: int, threads: int
) -> None:
    machine, model = load_hardware("rtx4090-threadripper"), llama()
    asked = Workload(method="lsp", batch_size=1, seq_length=tokens, shard_threads=threads)
    found = largest_hidden_dim(model, asked, machine, policy)
    least, at, above = (
        simulate(model, replace(asked, subspace_dim=dim), machine, policy).typical
        for dim in (DIM_STEP, found, found + DIM_STEP)
    )
    hidden = [step.exposed.total_s - least.exposed.total_s <= HIDDEN * step.step_s for step in (at, above)]
    assert found % DIM_STEP == 0
    assert hidden[0]
    assert not hidden[1] or found == 512


def test_a_slower_link_hides_a_smaller_subspace() -> None:
    machine = load_hardware("rtx4090-threadripper")
    asked = Workload(method="lsp", batch_size=1, seq_length=1024, whiten=False, shard_threads=30)
    slow = replace(machine, d2h_bytes_per_s=1e9, h2d_bytes_per_s=1e9)
    assert largest_hidden_dim(llama(), asked, slow) < largest_hidden_dim(llama(), asked, machine)


def test_a_model_without_room_for_a_subspace_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^lsp.subspace_dim must be a number where no linear has 64 rows .*'auto'$"):
        largest_hidden_dim(MODEL, LSP, UNIT)


def test_advice_uses_the_machines_cores_and_never_a_stale_policy() -> None:
    machine = load_hardware("rtx4090-threadripper")
    advice = advise(llama(), Workload(method="native", batch_size=4, seq_length=512), machine)
    assert advice.num_shards * advice.shard_threads <= machine.num_cores
    assert advice.policy != "delayed"
    assert (advice.forecast.workload.method, advice.forecast.workload.subspace_dim) == ("lsp", advice.subspace_dim)
    assert advice.nnz_per_row == 4
    assert advise(llama(), LSP, machine).nnz_per_row == LSP.nnz_per_row
