"""Costs and memory against numbers worked out by hand, and how they move."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lsp_ray.config import Bits, Method, PayloadDtype, PolicyName
from lsp_ray.errors import ConfigError
from lsp_ray.projection.sparse_projector import ProjectorSizes
from lsp_ray.sim.activations import activation_bytes
from lsp_ray.sim.advice import DIM_STEP, largest_hidden_dim
from lsp_ray.sim.cost_model import CostModel
from lsp_ray.sim.costs import StepCosts
from lsp_ray.sim.forecast import HIDDEN, forecast, simulate
from lsp_ray.sim.hardware_profile import RESERVE_BYTES, HardwareProfile, load_hardware
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
    block_flops=1e30,
    device_bytes_per_s=1e30,
    activation_bytes_per_s=1e30,
    d2h_bytes_per_s=2.0,
    h2d_bytes_per_s=4.0,
    pageable_fraction=0.5,
    shared_link_rate=1.0,
    host_memory_bytes=1e12,
    host_bytes_per_s=28.0,
    core_bytes_per_s=7.0,
    num_cores=4,
    hop_s=0.0,
)
LINEAR = LinearShape(rows=64, columns=32, input=0)
MODEL = ModelShape(
    layers=(LayerShape(linears=(LINEAR,), raw_numel=10, is_block=True),) * 2,
    num_parameters=5000,
    hidden_size=32,
    attention_width=16,
    repeated_width=0,
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


@pytest.mark.parametrize(("dim", "sent"), [(8, 8 * 8), (20, 20 * 16)])
def test_a_compressed_weight_gradient_takes_two_operations_a_token_and_entry_of_the_payload(
    dim: int, sent: int
) -> None:
    native_s, lsp_s = (costs(asked).layers[0].backward_s for asked in (work("native"), replace(LSP, subspace_dim=dim)))
    assert native_s - lsp_s == pytest.approx(2 * 6 * (LINEAR.numel - sent))


def test_a_product_with_a_factor_takes_two_operations_an_element_that_it_reads_and_non_zero_of_a_row() -> None:
    only_blocks = {"device_bf16_flops": 1e30, "block_flops": 1.0}
    small, large = (costs(replace(LSP, subspace_dim=dim), **only_blocks).layers[0] for dim in (8, 16))
    assert small.forward_s == large.forward_s == pytest.approx(2 * 6 * 32 * 2)
    assert small.backward_s == large.backward_s == pytest.approx(2 * 6 * 64 * 2)


def test_a_product_with_a_factor_reads_its_table_and_writes_and_orders_what_comes_out() -> None:
    only_bytes = {"device_bf16_flops": 1e30, "device_bytes_per_s": 1.0}
    layer = costs(LSP, **only_bytes).layers[0]
    assert layer.forward_s == pytest.approx(2 * 6 * (32 + 3 * 8))
    # and 64 entries of the gradient: read, made float32, and that bfloat16
    assert layer.backward_s == pytest.approx(2 * 6 * (64 + 3 * 8) + (2 + 4 + 4 + 2) * 8 * 8)


def test_linears_that_read_the_same_input_project_and_keep_it_once() -> None:
    other = replace(LINEAR, input=1)
    shared, apart = (
        replace(MODEL, layers=(LayerShape(linears=linears, raw_numel=10, is_block=True),) * 2)
        for linears in ((LINEAR, LINEAR), (LINEAR, other))
    )
    machine = replace(UNIT, device_bf16_flops=1e30, block_flops=1.0)
    once, twice = (CostModel(model=model, workload=LSP, hardware=machine).step().layers[0] for model in (shared, apart))
    assert twice.forward_s - once.forward_s == pytest.approx(2 * 6 * 32 * 2)
    assert twice.backward_s == once.backward_s
    kept = [activation_bytes(model, LSP, model.layers[0]) for model in (shared, apart)]
    assert kept[1] - kept[0] == 2 * 8
    parts = [forecast(model, LSP, UNIT, "layerwise").device.projectors for model in (shared, apart)]
    assert parts == [2 * 2 * (2 * 64 + 32) * 2, 2 * 2 * (2 * 64 + 2 * 32) * 2]


def test_the_papers_full_gradient_saves_no_operation() -> None:
    paper = replace(LSP, full_gradient=True)
    assert costs(paper).layers[0].backward_s == costs(work("native")).layers[0].backward_s
    blocks = costs(paper, device_bf16_flops=1e30, block_flops=1.0).layers[0]
    assert (blocks.forward_s, blocks.backward_s) == pytest.approx((0, 2 * 2 * (64 * 32 + 64 * 8)))


@pytest.mark.parametrize(("bf16", "weight_bytes"), [(True, 6), (False, 8)])
def test_a_delta_is_added_in_one_pass_over_the_weight(bf16: bool, weight_bytes: int) -> None:
    asked = replace(LSP, bf16=bf16)
    layer = costs(asked, device_bytes_per_s=1.0).layers[0]
    # δ read once; what is no projected linear's made float32 and read
    assert layer.apply_s == pytest.approx(weight_bytes * (LINEAR.numel + 10) + 2 * 8 * 8 + (2 + 8) * 10)
    assert costs(asked, block_flops=1.0).layers[0].apply_s == pytest.approx(2 * 2 * (LINEAR.numel + 8 * 32))
    raw, exact = (
        costs(work("zero_offload", bf16=bf16, payload_dtype=dtype), device_bytes_per_s=1.0).layers[0]
        for dtype in ("bfloat16", "float32")
    )
    assert raw.apply_s == pytest.approx((weight_bytes + 2 + 8) * (LINEAR.numel + 10))
    assert exact.apply_s == pytest.approx((weight_bytes + 4) * (LINEAR.numel + 10))


def test_a_full_gradient_goes_into_its_payload_in_one_pass() -> None:
    zero, native = (costs(work(method), device_bytes_per_s=1.0).layers[0] for method in ("zero_offload", "native"))
    assert zero.backward_s - native.backward_s == pytest.approx((2 + 2) * LINEAR.numel)


def test_checkpointing_adds_a_forward_to_the_backward() -> None:
    plain, again = (costs(replace(LSP, gradient_checkpointing=flag)).layers[0] for flag in (False, True))
    assert again.backward_s == pytest.approx(plain.backward_s + plain.forward_s)
    assert again.forward_s == plain.forward_s


def test_native_sends_nothing_and_updates_on_the_device() -> None:
    layer = costs(work("native"), device_bytes_per_s=1.0).layers[0]
    assert (layer.d2h_s, layer.cpu_s, layer.h2d_s, layer.apply_s) == (0.0, 0.0, 0.0, 0.0)
    # AdamW, the gradient put into a float32 payload, the delta added with noise of 2 bytes
    assert layer.update_s == (28 + 6 + 10) * (LINEAR.numel + 10)
    exact = costs(work("native", bf16=False), device_bytes_per_s=1.0).layers[0]
    assert exact.update_s == (28 + 8 + 12) * (LINEAR.numel + 10)


def test_lora_makes_no_weight_gradient_and_updates_its_adapters_alone() -> None:
    layer, native = (costs(replace(work(method), lora_rank=2)).layers[0] for method in ("lora", "native"))
    adapters = 2 * (LINEAR.rows + LINEAR.columns)
    assert layer.forward_s - native.forward_s == pytest.approx(2 * 6 * adapters)
    assert native.backward_s - layer.backward_s == pytest.approx(2 * 6 * (LINEAR.numel - 2 * adapters))
    slow = costs(replace(work("lora"), lora_rank=2), device_bytes_per_s=1.0).layers[0]
    assert slow.update_s == (28 + 16 + 12) * adapters
    assert (slow.d2h_s, slow.cpu_s, slow.h2d_s, slow.apply_s) == (0.0, 0.0, 0.0, 0.0)


def test_updates_kept_apart_add_two_products_with_d_and_bring_them_to_both_sides() -> None:
    apart, merged = (costs(replace(LSP, apart=is_apart)).layers[0] for is_apart in (True, False))
    for more_s in (apart.forward_s - merged.forward_s, apart.backward_s - merged.backward_s):
        assert more_s == pytest.approx(2 * 6 * 8 * 8)
    blocks = {"device_bf16_flops": 1e30, "block_flops": 1.0}
    apart, merged = (costs(replace(LSP, apart=is_apart), **blocks).layers[0] for is_apart in (True, False))
    assert apart.forward_s - merged.forward_s == pytest.approx(2 * 6 * 64 * 2)
    assert apart.backward_s - merged.backward_s == pytest.approx(2 * 6 * 32 * 2)


def test_an_update_kept_apart_is_put_in_the_old_ones_place_and_no_weight_is_passed() -> None:
    layer = costs(replace(LSP, apart=True), device_bytes_per_s=1.0, block_flops=1.0).layers[0]
    # D and ten other elements arrive in bfloat16 and are written so; the ten from what they began with
    assert layer.apply_s == pytest.approx((2 + 2) * (8 * 8 + 10) + 2 * 10)


def test_a_shard_that_keeps_the_sum_copies_reads_and_writes_it_as_well_and_has_a_third_of_the_state() -> None:
    apart, merged = (forecast(MODEL, replace(LSP, apart=is_apart), UNIT, "layerwise") for is_apart in (True, False))
    assert replace(LSP, apart=True).update_bytes - LSP.update_bytes == 8 + 8 + 4
    wide = replace(LSP, subspace_dim=256)
    stores = [host_memory(llama(), replace(wide, apart=kept), on_gpu=True).object_store for kept in (True, False)]
    numels = [wide.payload_numel(layer) for layer in llama().layers]
    assert stores[0] - stores[1] == pytest.approx(4 * (sum(numels) + max(numels)), rel=0.01)  # in whole pages
    assert apart.bytes_each_way == merged.bytes_each_way
    assert (apart.device.deltas, merged.device.deltas) == (2 * 2 * (8 * 8 + 10), 0)
    assert apart.device.weights == merged.device.weights


@pytest.mark.parametrize(
    ("bits", "weight_bytes"), [(4, 64 * 32 * (0.5 + 1 / 64 + 1 / 4096) + 1092), (8, 64 * (32 + 4))]
)
@pytest.mark.parametrize("method", ["lsp", "lora"])
def test_a_quantised_weight_is_kept_in_its_bits_and_dequantised_for_each_product(
    method: Method, bits: Bits, weight_bytes: float
) -> None:
    asked = work(method, bits=bits)
    parts = forecast(MODEL, asked, UNIT, "layerwise" if method == "lsp" else None).device
    dense = forecast(MODEL, work(method, apart=True), UNIT, "layerwise" if method == "lsp" else None).device
    assert parts.quantized == pytest.approx(2 * weight_bytes)
    assert dense.weights - parts.weights == 2 * 2 * LINEAR.numel
    assert parts.dequantized == 2 * LINEAR.numel
    slow = {"device_bf16_flops": 1e30, "activation_bytes_per_s": 1.0}
    quantized, plain = (costs(given, **slow).layers[0] for given in (asked, work(method, apart=True)))
    once = weight_bytes + 2 * LINEAR.numel
    assert quantized.forward_s - plain.forward_s == pytest.approx(once)
    assert quantized.backward_s - plain.backward_s == pytest.approx(once)


def test_a_quantised_linear_without_projector_is_neither_trained_nor_sent() -> None:
    narrow = LayerShape(linears=(LINEAR, LinearShape(rows=4, columns=32, input=0)), raw_numel=10, is_block=True)
    head = replace(narrow, is_block=False)
    assert [LSP.payload_numel(layer) for layer in (narrow, head)] == [64 + 4 * 32 + 10] * 2
    assert [replace(LSP, bits=4).payload_numel(layer) for layer in (narrow, head)] == [64 + 10, 64 + 4 * 32 + 10]


@pytest.mark.parametrize("method", ["native", "galore", "zero_offload"])
def test_methods_that_change_weights_have_no_forecast_on_a_quantised_base(method: Method) -> None:
    with pytest.raises(ConfigError, match=rf"^workload\.bits must be None for {method}, which changes the weights"):
        work(method, bits=4)


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
    native, zero, lsp = (costs(work(method), **slow).layers[0] for method in ("native", "zero_offload", "lsp"))
    assert native == replace(zero, apply_s=0, d2h_s=0, cpu_s=0, h2d_s=0, update_s=native.update_s)
    assert native.forward_s == lsp.forward_s > 0
    # the backward reads X Q of 8 columns in the place of 2 · 32 + 16 + 64, and all gradients as before
    assert native.backward_s - lsp.backward_s == pytest.approx(2 * 6 * 2 * (144 - 8))


@pytest.mark.parametrize(("method", "numel"), [("lsp", 8 * 8 + 10), ("zero_offload", 64 * 32 + 10)])
def test_a_payload_takes_its_bytes_over_the_rate_of_its_direction(method: Method, numel: int) -> None:
    layer = costs(work(method)).layers[0]
    assert (layer.d2h_s, layer.h2d_s) == (2 * numel / 2.0, 2 * numel / 4.0)
    pageable = costs(work(method, pinned=False)).layers[0]
    assert (pageable.d2h_s, pageable.h2d_s) == (2 * numel, 2 * numel / 2.0)


@pytest.mark.parametrize(("dtype", "num_bytes"), [("bfloat16", 2 * 2048), ("float32", 4 * 2048), ("int8", 66 * 32)])
def test_a_payload_is_as_long_as_its_type_says(dtype: PayloadDtype, num_bytes: int) -> None:
    layer = LayerShape(linears=(LINEAR,), raw_numel=0, is_block=True)
    assert work("zero_offload", payload_dtype=dtype).payload_bytes(layer) == num_bytes


@pytest.mark.parametrize(
    ("rows", "columns", "dims"),
    [(100, 7, None), (7, 100, None), (100, 8, (8, 4)), (100, 11, (8, 4)), (14, 100, (6, 8)), (100, 100, (8, 8))],
)
def test_each_side_has_its_own_multiple_of_r_and_half_of_it_at_most(
    rows: int, columns: int, dims: tuple[int, int] | None
) -> None:
    assert LSP.dims_of(LinearShape(rows=rows, columns=columns, input=0)) == dims


@given(rows=st.integers(16, 200), columns=st.integers(16, 200), dim=st.integers(1, 64), nnz=st.integers(1, 4))
def test_a_payload_has_the_columns_of_the_factors(rows: int, columns: int, dim: int, nnz: int) -> None:
    asked = replace(LSP, subspace_dim=dim, nnz_per_row=nnz)
    sizes = ProjectorSizes.of((rows, columns), dim, nnz)
    assert asked.dims_of(LinearShape(rows=rows, columns=columns, input=0)) == sizes.dims


@pytest.mark.parametrize(
    ("dtype", "element_bytes"),
    # the moments' copy, and AdamW: bfloat16 reads the gradient twice and writes the delta, 2 each, beside the moments
    [("float32", 16 + 28), ("bfloat16", 16 + 16 + 6), ("int8", 16 + 28 + 66)],
)
def test_an_update_is_bound_by_memory(dtype: PayloadDtype, element_bytes: int) -> None:
    asked = replace(LSP, payload_dtype=dtype)
    assert costs(asked).layers[0].cpu_s == pytest.approx(element_bytes * 74 / 7.0)
    assert costs(replace(asked, shard_threads=100)).layers[0].cpu_s == pytest.approx(element_bytes * 74 / 28.0)


def test_slices_share_a_layer_where_whole_layers_share_the_memory() -> None:
    one_shard = replace(LSP, shard_threads=4)
    shares = (one_shard, replace(one_shard, num_shards=2), replace(one_shard, num_shards=2, shard_by="slice"))
    alone, layers, slices = (costs(share).layers[0].cpu_s for share in shares)
    assert alone == slices == pytest.approx(38 * 74 / 28.0)  # memory is full with four threads
    assert layers == pytest.approx(2 * alone)


def test_moments_are_on_the_device_for_native_and_on_the_host_for_the_others() -> None:
    native, zero = (forecast(MODEL, work(method), UNIT, "sequential") for method in ("native", "zero_offload"))
    assert (native.device.optimizer_state, zero.device.optimizer_state) == (8 * MODEL.num_trained, 0)
    assert zero.bytes_each_way == 2 * MODEL.num_trained


def test_projectors_take_a_value_for_each_non_zero_whatever_the_subspace() -> None:
    small, large = (forecast(MODEL, replace(LSP, subspace_dim=dim), UNIT, "layerwise").device for dim in (8, 16))
    assert small.projectors == large.projectors == 2 * (64 + 32) * 2 * 2


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
    long = replace(LSP, batch_size=4, seq_length=1024, gradient_checkpointing=True, shard_threads=12)
    zero = forecast(model, replace(long, method="zero_offload"), machine, policy)
    # two layers of deltas, and payloads that wait for their way down, which the policy does not bound
    assert zero.device.payload_buffers < 8 * 4 * model.layers[0].numel
    lsp = forecast(model, replace(long, subspace_dim=1024), machine, policy)
    assert lsp.exposed.total_s < 0.5 * zero.exposed.total_s


def test_what_does_not_fit_is_said_with_both_sizes() -> None:
    small = replace(UNIT, device_memory_bytes=1e9 + 9e3, host_memory_bytes=1.5e9)
    misfits = forecast(MODEL, LSP, small, "layerwise").misfits
    assert list(map(str, misfits)) == [
        "device memory: 0.0 GB needed, 0.0 GB there",
        "host memory: 1.3 GB needed, 0.5 GB there",
    ]
    assert forecast(MODEL, LSP, UNIT, "layerwise").misfits == ()


@pytest.mark.parametrize("where", ["device", "host", "shared"])
def test_a_step_fits_into_exactly_what_it_needs_and_the_reserve_and_not_into_a_byte_less(where: str) -> None:
    found = forecast(MODEL, LSP, UNIT, "layerwise")
    needed = {need.where: need.needed_bytes for need in found.needs}[where]
    assert needed == {
        "device": found.longest_bytes,
        "host": found.host.object_store + found.host.processes + 2 * MODEL.num_parameters,  # loaded, then on the device
        "shared": found.host.object_store,
    }.pop(where)
    parts: dict[str, tuple[str, float]] = {
        "device": ("device_memory_bytes", needed + RESERVE_BYTES),
        "host": ("host_memory_bytes", needed + RESERVE_BYTES),
        "shared": ("host_memory_bytes", 2 * needed),
    }
    name, there = parts[where]

    def misfits(there: float) -> set[str]:
        tight: dict[str, Any] = {name: there}
        return {need.where for need in forecast(MODEL, LSP, replace(UNIT, **tight), "layerwise").misfits}

    assert where not in misfits(there)
    assert where in misfits(there - 1)


def test_without_a_gpu_device_and_host_share_one_memory() -> None:
    found = forecast(MODEL, LSP, replace(UNIT, on_gpu=False), "layerwise")
    needed = found.host.total_bytes + found.longest_bytes + RESERVE_BYTES
    tight = replace(UNIT, on_gpu=False, host_memory_bytes=needed - 1)
    assert [need.where for need in forecast(MODEL, LSP, tight, "layerwise").misfits] == ["host"]
    assert forecast(MODEL, LSP, replace(tight, host_memory_bytes=needed), "layerwise").misfits == ()


@pytest.mark.parametrize("name", ["num_shards", "seq_length", "nnz_per_row"])
def test_counts_below_one_are_named(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^workload.{name} must be at least 1, got 0$"):
        work("lsp", **{name: 0})


def llama(num_layers: int = 4, hidden: int = 1024) -> ModelShape:
    sides = [(1, 1, 0)] * 3 + [(1, 1, 1), (3, 1, 2), (3, 1, 2), (1, 3, 3)]
    linears = tuple(LinearShape(rows=out * hidden, columns=into * hidden, input=read) for out, into, read in sides)
    layer = LayerShape(linears=linears, raw_numel=2 * hidden, is_block=True)
    return ModelShape(
        layers=(layer,) * num_layers,
        num_parameters=num_layers * layer.numel,
        hidden_size=hidden,
        attention_width=hidden,
        repeated_width=0,
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
    asked = Workload(method="lsp", batch_size=1, seq_length=1024, shard_threads=30)
    slow = replace(machine, d2h_bytes_per_s=1e9, h2d_bytes_per_s=1e9)
    assert largest_hidden_dim(llama(), asked, slow) < largest_hidden_dim(llama(), asked, machine)


def test_a_model_without_room_for_a_subspace_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^lsp.subspace_dim must be a number where no linear has 64 rows .*'auto'$"):
        largest_hidden_dim(MODEL, LSP, UNIT)
