"""Where weights come up: the examples that are said to hide the link do, and fewer do not."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from lsp_ray.plan.__main__ import main
from lsp_ray.run import parse
from lsp_ray.sim.forecast import forecast
from lsp_ray.sim.hardware_profile import load_hardware
from lsp_ray.sim.hiding import WAITS, hiding_batch, link_advice
from lsp_ray.sim.model_shape import LayerShape, LinearShape, ModelShape
from lsp_ray.sim.workload import Workload
from scripts.hardware_guide import largest_streamed, streamed_config

NARROW = replace(load_hardware("rtx4090"), device_memory_bytes=1e9)  # never more than two blocks


def shape(width: int, num_blocks: int = 8) -> ModelShape:
    linears = (LinearShape(rows=width, columns=width, input=0),) * 12
    return ModelShape(
        layers=(LayerShape(linears=linears, raw_numel=2 * width, is_block=True),) * num_blocks,
        num_parameters=num_blocks * 12 * width**2 + 2 * 32000 * width,
        hidden_size=width,
        attention_width=width,
        repeated_width=0,
        num_logits=32000,
    )


MODEL = shape(4096)
WORK = Workload(method="lsp", batch_size=1, seq_length=64, bits=4, weights="host", gradient_checkpointing=True)


def waits(work: Workload, link_gbps: float) -> float:
    row = forecast(MODEL, work, replace(NARROW, h2d_bytes_per_s=1e9 * link_gbps), "layerwise")
    return row.exposed.weights_s / row.step_s


@given(link_gbps=st.floats(0.5, 60), seq_length=st.sampled_from([16, 64, 256]), typical=st.booleans())
@settings(max_examples=12, deadline=None)
def test_the_examples_that_hide_the_link_do_and_one_less_does_not(
    link_gbps: float, seq_length: int, typical: bool
) -> None:
    work = replace(WORK, seq_length=seq_length)
    if typical:
        work = replace(work, typical_length=seq_length - 4, typical_targets=seq_length // 2)
    enough = hiding_batch(MODEL, work, replace(NARROW, h2d_bytes_per_s=1e9 * link_gbps))

    def of(batch_size: int) -> Workload:
        targets = work.typical_targets and batch_size * work.typical_targets
        return replace(work, batch_size=batch_size, typical_targets=targets)

    assert waits(of(enough), link_gbps) <= WAITS
    for fewer in {enough - 1, enough // 2} - {0}:
        assert waits(of(fewer), link_gbps) > WAITS


@given(rates=st.lists(st.floats(0.5, 60), min_size=2, max_size=2))
@settings(max_examples=10, deadline=None)
def test_a_slower_link_takes_no_fewer_examples(rates: list[float]) -> None:
    slow, fast = (hiding_batch(MODEL, WORK, replace(NARROW, h2d_bytes_per_s=1e9 * rate)) for rate in sorted(rates))
    assert fast <= slow


def test_the_same_examples_in_larger_micro_batches_are_named_where_they_wait_less_and_fit() -> None:
    narrow = replace(NARROW, h2d_bytes_per_s=4e9)
    whole_bytes = forecast(MODEL, replace(WORK, batch_size=12), narrow, "layerwise").longest_bytes
    machine = replace(narrow, device_memory_bytes=whole_bytes + 1e9)
    small = forecast(MODEL, replace(WORK, num_micro_batches=12), machine, "layerwise")
    found = link_advice(MODEL, small, machine, lambda work: work)
    assert found.share > WAITS
    assert found.tokens == 64 * found.batch_size
    assert found.divided is not None
    assert (found.divided.workload.batch_size, found.divided.workload.num_micro_batches) == (12, 1)
    assert found.divided.step_s < small.step_s
    four = forecast(MODEL, replace(WORK, batch_size=4, num_micro_batches=3), narrow, "layerwise")
    tight = replace(machine, device_memory_bytes=four.longest_bytes + 1e9)
    less = link_advice(MODEL, small, tight, lambda work: work)
    assert less.divided is not None
    assert (less.divided.workload.batch_size, less.divided.workload.num_micro_batches) == (4, 3)
    assert not less.fits
    whole = link_advice(MODEL, found.divided, machine, lambda work: work)
    assert whole.divided is None


@given(
    sizes_gb=st.lists(st.floats(1.2, 8), min_size=2, max_size=2),
    hosts_gb=st.lists(st.floats(3, 12), min_size=2, max_size=2),
)
@settings(max_examples=10, deadline=None)
def test_more_memory_never_makes_the_largest_model_smaller(sizes_gb: list[float], hosts_gb: list[float]) -> None:
    shapes = {str(width): shape(width, 4) for width in (1024, 2048, 4096, 8192)}
    found = [
        largest_streamed(shapes, streamed_config(size_gb, "rtx4070", host_gb))
        for size_gb, host_gb in zip(sorted(sizes_gb), sorted(hosts_gb), strict=True)
    ]
    small, large = (0 if each is None else int(each[0]) for each in found)
    assert small <= large


def llama(folder: Path, num_blocks: int) -> Path:
    """Llama-2-70B's shape, with 80 blocks."""
    LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=num_blocks,
        num_attention_heads=64,
        num_key_value_heads=8,
        max_position_embeddings=4096,
    ).save_pretrained(folder)
    return folder


def options(model: Path, *more: str, gpu_memory_gb: int = 12) -> list[str]:
    """A card as fast as an RTX 4090, 64 GB of main memory, a link of 13 GB/s."""
    machine = [
        "--hardware",
        "rtx4090",
        "--gpu_memory_gb",
        str(gpu_memory_gb),
        "--host_memory_gb",
        "64",
        "--link_gbps",
        "13",
    ]
    lsp = ["--method", "lsp", "--load_in_4bit", "--lsp.subspace_dim", "512", "--max_seq_length", "1024"]
    return ["--model_name_or_path", str(model), *machine, *lsp, "--runtime.weights", "host", *more]


def test_70_billion_parameters_fit_12_gb_and_4_times_1024_tokens_hide_the_link(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(options(llama(tmp_path, 80), "--per_device_train_batch_size", "4", "--json")) == 0
    content = json.loads(capsys.readouterr().out)
    best = content["recommended"]
    assert content["num_parameters"] == pytest.approx(69e9, rel=0.01)
    assert (best["per_device_train_batch_size"], best["gradient_accumulation_steps"]) == (4, 1)
    assert best["device_bytes"]["longest"] <= 11e9
    assert best["host_bytes"]["total"] <= 63e9
    assert best["exposed_s"]["weights_s"] <= 0.1 * best["step_s"]
    assert content["link_hidden_from"]["tokens"] <= 4 * 1024
    assert content["link_hidden_from"]["fits"]


def test_what_is_given_stays_and_a_line_says_what_would_hide_the_link(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "4"]
    assert main(options(llama(tmp_path, 12), *few, gpu_memory_gb=4)) == 0
    said = capsys.readouterr().out.splitlines()
    [command] = [line for line in said if line.startswith("python -m")]
    [line] = [line for line in said if line.startswith("the link is hidden")]
    run = parse(shlex.split(command)[3:])
    assert (run.per_device_train_batch_size, run.gradient_accumulation_steps) == (1, 4)
    assert re.fullmatch(
        r"the link is hidden from 2048 tokens of a micro-batch, 2 examples; here \d+% of a step waits for weights; "
        r"with --per_device_train_batch_size 2 --gradient_accumulation_steps 2, the same examples, [0-4]%",
        line,
    )


def test_what_is_open_is_chosen_so_that_the_link_is_hidden(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = options(llama(tmp_path, 12), gpu_memory_gb=4)
    assert main([*small, "--max_seq_length", "128", "--lsp.subspace_dim", "1248"]) == 0
    said = capsys.readouterr().out
    assert "…" not in said
    [command] = [line for line in said.splitlines() if line.startswith("python -m")]
    [line] = [line for line in said.splitlines() if line.startswith("the link is hidden")]
    run = parse(shlex.split(command)[3:])
    hidden = re.match(r"the link is hidden from (\d+) tokens of a micro-batch, .* here [0-5]% of a step waits", line)
    assert hidden is not None
    assert 128 * run.per_device_train_batch_size == int(hidden[1]) == 14 * 128
    assert run.gradient_accumulation_steps == 1
