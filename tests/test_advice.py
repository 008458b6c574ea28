"""Advice fits, keeps what was given, and can be typed."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, LlamaConfig, PreTrainedConfig, Qwen2Config

from lsp_ray.config import Method
from lsp_ray.errors import ConfigError
from lsp_ray.plan.command import command_of
from lsp_ray.plan.options import PlanConfig, PlanLspConfig, PlanRuntimeConfig
from lsp_ray.plan.plan import Plan, choices_of, make_plan, workload_of
from lsp_ray.plan.skeleton import shape_of
from lsp_ray.plan.table import recommendation
from lsp_ray.run import parse
from lsp_ray.sim.advice import Choices, advise
from lsp_ray.sim.hardware_profile import RESERVE_BYTES, HardwareProfile, hardware_names, load_hardware
from lsp_ray.sim.memory import device_memory, host_memory
from lsp_ray.sim.model_shape import ModelShape
from lsp_ray.sim.workload import Workload

CONFIGS: dict[str, PreTrainedConfig] = {  # few layers, so that a plan is quick, but of large models' widths
    "gpt2": GPT2Config(n_layer=3),  # 61 M parameters
    "llama": LlamaConfig(hidden_size=2048, intermediate_size=8192, num_hidden_layers=3, vocab_size=128256),  # 0.7 G
    "qwen": Qwen2Config(  # 5 G
        hidden_size=8192,
        intermediate_size=29568,
        num_hidden_layers=3,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=152064,
    ),
    "giant": LlamaConfig(  # 11 G
        hidden_size=16384, intermediate_size=53248, num_hidden_layers=3, num_attention_heads=128, num_key_value_heads=8
    ),
}


@cache
def shape(name: str) -> ModelShape:
    with TemporaryDirectory() as folder:
        CONFIGS[name].save_pretrained(folder)
        return shape_of(Path(folder))


RESIDENT = PlanRuntimeConfig(weights="device")


def plan(model: str, config: PlanConfig) -> Plan:
    machine = config.machine
    assert machine is not None
    work = workload_of(
        config,
        num_units=len(shape(model).layers),
        cores=machine.num_cores,
        on_gpu=machine.on_gpu,
        bf16=machine.bf16_pays if config.bf16 is None else config.bf16,
    )
    return make_plan(shape(model), work, machine, choices_of(config))


def holds(machine: HardwareProfile, model: ModelShape, work: Workload, payload_buffers: float) -> bool:
    """Counted anew, from the parts of memory."""
    host = host_memory(model, work, on_gpu=True)
    return (
        device_memory(model, work.full, payload_buffers).peak_bytes + RESERVE_BYTES <= machine.device_memory_bytes
        and host.total_bytes + RESERVE_BYTES <= machine.host_memory_bytes
        and host.object_store <= machine.host_memory_bytes / 2
    )


@pytest.mark.parametrize("model", CONFIGS)
@pytest.mark.parametrize("name", hardware_names())
def test_the_advice_fits_or_the_reason_says_why_nothing_does(name: str, model: str) -> None:
    machine, wanted = load_hardware(name), shape(model)
    for length in (128, 1024):
        found = plan(model, PlanConfig(hardware=name, max_seq_length=length))
        best = found.advice.recommended
        assert (best is None) == (found.reason is not None)
        for row in found.advice.rows:
            work = row.workload
            examples = work.batch_size * work.num_micro_batches
            assert (work.seq_length, 4) == (length, min(4, examples) if work.streams else examples)
            assert holds(machine, wanted, work, row.device.payload_buffers) == (not row.misfits)
            if row.misfits:  # not even the least of the choices
                assert (work.batch_size, work.gradient_checkpointing) == (1, True)
                assert work.bits == (4 if work.method in ("lsp", "lora") else None)
            if work.bits is not None:  # only what does not fit otherwise
                asked = PlanConfig(hardware=name, max_seq_length=length, load_in_4bit=False, runtime=RESIDENT)
                dense = plan(model, asked)
                assert all(other.misfits for other in dense.advice.rows if other.workload.method == work.method)
            if work.streams and not row.misfits:
                resident = plan(model, PlanConfig(hardware=name, max_seq_length=length, runtime=RESIDENT))
                assert all(other.misfits for other in resident.advice.rows if other.workload.method == "lsp")
        if best is not None:
            assert best in found.advice.rows
            assert best.misfits == ()
            plain = [row for row in found.advice.rows if not row.misfits and row.workload.bits is None]
            assert best.workload.bits is None or not plain
        else:
            assert all(row.misfits for row in found.advice.rows)
            assert (found.reason or "").startswith("nothing fits ")


GIVEN: dict[str, Any] = {
    "method": st.sampled_from(get_args(Method)),
    "max_seq_length": st.integers(8, 512),
    "per_device_train_batch_size": st.integers(1, 8),
    "gradient_accumulation_steps": st.integers(1, 3),
    "gradient_checkpointing": st.booleans(),
    "bf16": st.booleans(),
    "load_in_4bit": st.booleans(),
    "max_grad_norm": st.sampled_from([0.0, 1.0]),
    "on_nonfinite": st.sampled_from(["stop", "skip"]),
    "dataset": st.sampled_from(["my notes.jsonl"]),
    "lsp": st.builds(PlanLspConfig, subspace_dim=st.sampled_from([64, 128]), nnz_per_row=st.sampled_from([4, 8])),
}


@given(
    name=st.sampled_from(["a1000-laptop", "rtx3060", "rtx4090"]),
    options=st.fixed_dictionaries({}, optional=GIVEN),
    model=st.sampled_from(["gpt2", "llama"]),
)
@settings(max_examples=12, deadline=None)
def test_what_is_given_is_kept_and_the_command_is_a_run_of_a_row(
    name: str, options: dict[str, Any], model: str
) -> None:
    if options.get("load_in_4bit") and options.get("method", "lsp") not in ("lsp", "lora"):
        with pytest.raises(ConfigError, match=r"^method must be lsp or lora with load_in_4bit"):
            PlanConfig(hardware=name, **options)
        return
    config = PlanConfig(model_name_or_path="my models/it's", hardware=name, **options)
    found = plan(model, config)
    best = found.advice.recommended
    for row in [] if best is None else found.advice.rows:
        words = shlex.split(command_of(config, row))
        run, work = parse(words[3:]), row.workload
        assert words[:3] == ["python", "-m", "lsp_ray.run"]
        assert run.model_name_or_path == "my models/it's"
        assert run.bits == work.bits
        expected = {"method": work.method, **{key: value for key, value in options.items() if key != "lsp"}}
        assert {key: getattr(run, key) for key in expected} == expected
        assert (run.max_seq_length, run.per_device_train_batch_size) == (work.seq_length, work.batch_size)
        assert run.gradient_accumulation_steps == work.num_micro_batches
        assert run.gradient_checkpointing == work.gradient_checkpointing
        assert row.policy in (None, run.policy)
        if work.method == "lsp":
            assert (run.lsp.subspace_dim, run.lsp.nnz_per_row) == (work.subspace_dim, work.nnz_per_row)
            assert "lsp" not in options or run.lsp.subspace_dim == options["lsp"].subspace_dim


@given(sizes_gb=st.lists(st.floats(1, 100), min_size=2, max_size=2))
@settings(max_examples=10, deadline=None)
def test_what_fits_a_small_card_fits_a_larger_one_without_saving_more(sizes_gb: list[float]) -> None:
    small, large = (
        plan("qwen", PlanConfig(hardware="a100", gpu_memory_gb=size_gb, lsp=PlanLspConfig(subspace_dim=256)))
        for size_gb in sorted(sizes_gb)
    )
    for less, more in zip(small.advice.rows, large.advice.rows, strict=True):
        if not less.misfits:
            assert not more.misfits
            saving = [(row.workload.gradient_checkpointing, -row.workload.batch_size) for row in (less, more)]
            assert saving == sorted(saving, reverse=True)


def first(model: str, machine: HardwareProfile, **changes: Any) -> list[Workload]:
    """LSP's choice on a machine whose memory is just short of what each choice before it needs."""
    choices = Choices(
        methods=("lsp",),
        bases=(None,),
        batches=((2, 1), (1, 2)),
        checkpointing=(False, True),
        lengths=(64, 32),
        auto_dim=False,
    )
    work = replace(Workload(method="lsp", batch_size=2, seq_length=64, subspace_dim=64), **changes)
    taken = []
    for _ in range(8):
        found = advise(shape(model), work, machine, choices).recommended
        if found is None:
            break
        taken.append(found.workload)
        machine = replace(machine, device_memory_bytes=found.longest_bytes + RESERVE_BYTES - 1)
    return taken


def test_batches_get_smaller_first_then_activations_are_recomputed_and_only_then_examples_are_cut() -> None:
    taken = [
        (work.seq_length, work.gradient_checkpointing, work.batch_size) for work in first("gpt2", load_hardware("a100"))
    ]
    order = list(product((64, 32), (False, True), (2, 1)))
    assert taken == [choice for choice in order if choice in taken]  # one may need no less than the one before
    assert {(64, False, 2), (64, False, 1), (64, True, 1), (32, True, 1)} <= set(taken)


def test_d_is_halved_where_the_largest_hidden_one_does_not_fit_the_host() -> None:
    config = PlanConfig(hardware="a100", method="lsp", max_seq_length=1024)
    roomy = plan("qwen", config).advice.recommended
    assert roomy is not None
    too_little_gb = (roomy.host.total_bytes + RESERVE_BYTES - 1) / 1e9
    tight = plan("qwen", replace(config, host_memory_gb=too_little_gb)).advice.recommended
    assert tight is not None
    assert tight.workload.subspace_dim == roomy.workload.subspace_dim // 2 // 32 * 32


def test_d_has_room_for_the_non_zeros_that_were_given() -> None:
    config = PlanConfig(hardware="rtx3060", method="lsp", lsp=PlanLspConfig(nnz_per_row=48), link_gbps=0.001)
    best = plan("gpt2", config).advice.recommended
    assert best is not None
    assert best.workload.subspace_dim == 64


@pytest.mark.parametrize(
    ("options", "method"),
    [
        ({"gpu_memory_gb": 6}, "native"),
        ({"gpu_memory_gb": 5, "max_seq_length": 1024}, "zero_offload"),  # it hides behind so many tokens
        ({"gpu_memory_gb": 5}, "lsp"),
        ({"gpu_memory_gb": 4, "host_memory_gb": 3.7}, "galore"),  # no room for slots
        ({"gpu_memory_gb": 3.7, "host_memory_gb": 3.7}, "lora"),
        ({"gpu_memory_gb": 6, "method": "lora"}, "lora"),
    ],
)
def test_full_fine_tuning_is_recommended_where_it_costs_little_and_adapters_only_where_nothing_else_fits(
    options: dict[str, Any], method: Method
) -> None:
    config = PlanConfig(**{"hardware": "rtx4060", "max_seq_length": 128, **options})
    best = plan("llama", config).advice.recommended
    assert best is not None
    assert best.workload.method == method


def test_a_base_in_4_bits_is_advised_only_where_nothing_fits_in_bfloat16_and_others_that_fit_so_are_named() -> None:
    dense, low = (
        plan("qwen", PlanConfig(hardware="rtx3060", gpu_memory_gb=size_gb, max_seq_length=128)).advice
        for size_gb in (24, 10)
    )
    assert dense.recommended is not None
    assert dense.recommended.workload.bits is None
    assert low.recommended is not None
    assert (low.recommended.workload.method, low.recommended.workload.bits) == ("lsp", 4)
    head, qlora = recommendation(low.rows, low.recommended)
    assert head.startswith("recommended: lsp in 4 bits, updates of rank d beside all matrices, weights rounded to 4 ")
    assert re.match(
        r"  --method lora --load_in_4bit true: .* adapters only \(QLoRA\), weights rounded to 4 bits", qlora
    )
    assert recommendation(low.rows, low.recommended, found_bits=4)[1].startswith("  --method lora: ")


def test_the_others_that_fit_are_compared_in_words() -> None:
    found = plan("llama", PlanConfig(hardware="rtx4090", max_seq_length=128))
    assert found.advice.recommended is not None
    head, *others = recommendation(found.advice.rows, found.advice.recommended)
    assert head == "recommended: native, full fine-tuning, all on the device"
    assert [line.split()[1] for line in others] == ["zero_offload:", "lsp:", "galore:", "lora:"]
    assert re.fullmatch(r"  --method lora: ([\d.]+ × (faster|slower)|as fast) here, adapters only", others[-1])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"gpu_memory_gb": 0.5, "load_in_4bit": None, "runtime": RESIDENT},
            r"nothing fits 0\.5 GB: the weights alone are 1\.2 GB in 4 bits",
        ),
        (
            {"gpu_memory_gb": 1.1, "load_in_4bit": None},
            r"nothing fits 1\.1 GB of GPU memory, .*: the least is 0\.2 GB, .* lsp in 4 bits, weights in main memory",
        ),
        ({"gpu_memory_gb": 1.4, "runtime": RESIDENT}, r"nothing fits 1\.4 GB: the weights alone are 1\.5 GB"),
        (
            {"gpu_memory_gb": 1.2},
            r"nothing fits 1\.2 GB of GPU memory, .*: the least is 0\.\d GB, with method lsp, weights in main memory",
        ),
        (
            {"gpu_memory_gb": 2, "runtime": RESIDENT},
            r"nothing fits 2 GB of GPU memory, 1 GB of it kept free: the least is 1\.\d GB, with .*",
        ),
        (
            {"host_memory_gb": 3},
            r"nothing fits 3 GB of main memory, 1 GB of it kept free: the least is 2\.\d GB, with .*",
        ),
        (
            {"host_memory_gb": 8.2, "method": "zero_offload", "max_grad_norm": 1.0},
            r"nothing fits 8\.2 GB of main memory, half of it shared: the least is \d+\.\d GB, with .* zero_offload",
        ),
    ],
)
def test_the_reason_names_the_memory_and_the_least_that_is_needed_of_it(options: dict[str, Any], reason: str) -> None:
    found = plan(
        "llama", PlanConfig(**{"hardware": "rtx4090", "max_seq_length": 512, "load_in_4bit": False, **options})
    )
    assert re.fullmatch(reason, found.reason or "")
