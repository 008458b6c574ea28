from __future__ import annotations

import gc
import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import QuantState
from transformers import AutoModelForCausalLM, LlamaConfig

from lsp_ray.config import Bits, LoraConfig, LspConfig, Method, PayloadDtype
from lsp_ray.device.delta_linear import DeltaLinear
from lsp_ray.device.memory import peak_of
from lsp_ray.methods.lora import add_adapters
from lsp_ray.methods.lsp import lsp_payload_sizes, lsp_units
from lsp_ray.methods.units import full_payload_sizes
from lsp_ray.models.layers import find_layers
from lsp_ray.models.load import load_model, load_skeleton, load_tokenizer
from lsp_ray.models.loss import IGNORED, summed_loss, target_positions
from lsp_ray.models.quantized import is_quantized_linear
from lsp_ray.models.shared_inputs import shared_inputs
from lsp_ray.plan.__main__ import main
from lsp_ray.plan.measure import measure
from lsp_ray.plan.skeleton import shape_of
from lsp_ray.plan.typical_batch import typical_batch
from lsp_ray.run import parse
from lsp_ray.sim.forecast import forecast
from lsp_ray.sim.hardware_profile import load_hardware
from lsp_ray.sim.memory import device_memory
from lsp_ray.sim.workload import Workload
from tests.tiny import FAMILIES, Family, task_of, write_tiny_jsonl, write_tiny_model


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration without weights."""
    folder = tmp_path_factory.mktemp("llama")
    LlamaConfig(
        hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4, vocab_size=512
    ).save_pretrained(folder)
    return folder


def test_help_needs_neither_torch_nor_ray() -> None:
    code = (
        "import sys\n"
        "from lsp_ray.plan.__main__ import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'ray', 'transformers', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "--hardware" in done.stdout


def test_a_plan_has_a_row_for_every_method_in_80_columns(
    llama_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model_name_or_path", str(llama_folder / "config.json"), "--hardware", "rtx3060"]
    assert main(options) == 0
    short = capsys.readouterr().out
    assert main([*options, "--verbose"]) == 0
    long = capsys.readouterr().out
    rows = [line.split() for line in short.splitlines()]
    for method in ("native", "zero_offload", "lsp", "galore", "lora"):
        assert [row[-1] for row in rows if row[:1] == [method]] == ["yes"]
    for detail in ("delayed", "projectors"):
        assert (detail in long, detail in short) == (True, False)
    tables = [line for line in long.splitlines() if not line.startswith("python -m")]
    assert max(map(len, tables)) <= 80
    assert "…" not in long


def test_a_row_has_room_for_what_does_not_fit_and_for_what_fits_in_4_bits(
    wide_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model_name_or_path", str(wide_folder), "--gradient_accumulation_steps", "64"]
    assert main([*model, "--hardware", "rtx3060", "--max_seq_length", "1024"]) == 0
    said = capsys.readouterr().out
    assert "no: both" in said
    assert " 4-bit d " in said
    assert "…" not in said


def test_a_length_that_the_model_has_no_positions_for_is_refused(
    wide_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model_name_or_path", str(wide_folder), "--hardware", "rtx4090", "--max_seq_length", "9999"]) == 2
    assert "max_seq_length must be at most 2048, the positions of this model, got 9999" in capsys.readouterr().err


def test_a_plan_as_json_has_bytes_and_seconds_for_every_method_and_policy(
    llama_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--hardware", "a1000-laptop", "--json", "--lsp.subspace_dim", "64", "--runtime.shard_by", "slice"]
    assert main(["--model_name_or_path", str(llama_folder), *options]) == 0
    content = json.loads(capsys.readouterr().out)
    methods = ["native", "zero_offload", "lsp", "galore", "lora"]
    assert (content["fits"], content["reason"]) == (True, None)
    assert [entry["method"] for entry in content["methods"]] == methods
    assert [entry["subspace_dim"] for entry in content["methods"]] == [None, None, 64, None, None]
    assert len(content["by_policy"]) == 13
    assert all(entry["step_s"] > 0 and entry["device_bytes"]["peak"] > 0 for entry in content["by_policy"])
    assert content["recommended"] in content["methods"]
    assert f"--method {content['recommended']['method']}" in content["command"]


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration of 7 billion parameters in few layers."""
    folder = tmp_path_factory.mktemp("wide")
    LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=8, num_attention_heads=64, vocab_size=32000
    ).save_pretrained(folder)
    return folder


def test_where_nothing_fits_the_least_is_said_and_the_exit_is_1(
    wide_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    device = ["--runtime.weights", "device"]
    options = ["--model_name_or_path", str(wide_folder), "--hardware", "a1000-laptop", *device]
    assert main(options) == 1
    shown = capsys.readouterr()
    assert "recommended" not in shown.out
    reason, other = shown.err.splitlines()
    assert reason == "nothing fits 4 GB: the weights alone are 5.1 GB in 4 bits"
    assert other.startswith("with other options this fits: ")
    assert "--runtime.weights host" in other
    assert main([*options[:-1], "host"]) == 0
    head, command = capsys.readouterr().out.rpartition("\n\n")[-1].splitlines()[:2]
    assert re.match(r"recommended: lsp in 4 bits with weights in main memory, for which \d+% of a step waits, ", head)
    assert parse(shlex.split(command)[3:]).streams
    assert main([*options, "--json"]) == 1
    content = json.loads(capsys.readouterr().out)
    assert not content["fits"]
    assert (content["recommended"], content["command"]) == (None, None)
    assert content["reason"] == reason


def test_what_would_fit_is_said_where_an_option_that_was_given_stands_in_its_way(
    wide_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model_name_or_path", str(wide_folder), "--hardware", "rtx4090"]
    assert main([*options, "--method", "native", "--per_device_train_batch_size", "8"]) == 1
    reason, other = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        r"nothing fits 24 GB of GPU memory, 1 GB of it kept free: the least is .* method native", reason
    )
    command = other.removeprefix("with other options this fits: ")
    run = parse(shlex.split(command)[3:])
    assert run.method == "lsp"
    assert run.per_device_train_batch_size * run.gradient_accumulation_steps == 8


def test_memory_and_link_that_are_given_replace_the_machines_own(
    wide_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        "--model_name_or_path",
        str(wide_folder),
        "--hardware",
        "a1000-laptop",
        "--lsp.subspace_dim",
        "256",
        "--runtime.weights",
        "device",
        "--json",
    ]
    assert main(options) == 1
    small = json.loads(capsys.readouterr().out)
    assert main([*options, "--gpu_memory_gb", "24", "--host_memory_gb", "200", "--link_gbps", "2.5"]) == 0
    large = json.loads(capsys.readouterr().out)
    assert large["hardware"] == small["hardware"] | {
        "device_memory_bytes": 24e9,
        "host_memory_bytes": 200e9,
        "d2h_bytes_per_s": 2.5e9,
        "h2d_bytes_per_s": 2.5e9,
    }


def test_what_fits_only_in_4_bits_is_said_with_its_price_and_not_where_4_bits_are_ruled_out(
    wide_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model_name_or_path", str(wide_folder), "--hardware", "rtx3060", "--lsp.subspace_dim", "256"]
    assert main(options) == 0
    head, command, qlora = capsys.readouterr().out.rpartition("\n\n")[-1].splitlines()
    assert head.startswith("recommended: lsp in 4 bits, ")
    assert head.endswith(", weights rounded to 4 bits, an adapter comes out")
    assert parse(shlex.split(command)[3:]).load_in_4bit
    assert qlora.startswith("  --method lora --load_in_4bit true: ")
    assert main([*options, "--load_in_4bit", "false", "--runtime.weights", "device"]) == 1
    reason, other = capsys.readouterr().err.splitlines()
    assert reason == "nothing fits 12 GB: the weights alone are 16.6 GB"
    assert "--load_in_4bit true" in other


@pytest.mark.parametrize("bits", [4, 8])
def test_methods_that_refuse_a_quantised_base_are_shown_as_such(
    llama_folder: Path, capsys: pytest.CaptureFixture[str], bits: Bits
) -> None:
    options = ["--model_name_or_path", str(llama_folder), "--hardware", "rtx3060", f"--load_in_{bits}bit"]
    assert main(options) == 0
    lines = capsys.readouterr().out.splitlines()
    for method in ("native", "zero_offload", "galore"):
        [line] = [line for line in lines if line.startswith(method)]
        assert line == f"{method}: not forecast, as it changes the weights, which are to be quantised"
    assert [line.split()[:2] for line in lines if line.endswith("yes ")] == [
        ["lsp", f"{bits}-bit"],
        ["lora", f"{bits}-bit"],
    ]
    assert main([*options, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["refused"] == ["native", "zero_offload", "galore"]
    assert [(entry["bits"], entry["delta"]) for entry in content["methods"]] == [(bits, "apart"), (bits, None)]
    assert f"--load_in_{bits}bit true" in content["command"]


def test_a_model_that_is_quantised_already_is_planned_for_as_it_is(
    llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = LlamaConfig.from_pretrained(llama_folder)
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    config.save_pretrained(tmp_path)
    options = ["--model_name_or_path", str(tmp_path), "--hardware", "rtx3060"]
    assert main([*options, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert [entry["bits"] for entry in content["methods"]] == [4, 4]
    assert "load_in" not in content["command"]
    for more, line in (
        (["--load_in_4bit"], "error: load_in_4bit must be left out, as the model is quantised already, got True\n"),
        (
            ["--method", "native"],
            "error: method must be lsp or lora with this model, as quantised weights stay as they ",
        ),
    ):
        assert main([*options, *more]) == 2
        assert capsys.readouterr().err.startswith(line)


def test_a_card_without_bfloat16_is_planned_for_in_float32_unless_it_is_asked_for(
    llama_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model_name_or_path", str(llama_folder), "--hardware", "t4", "--json"]
    types = []
    for more in ([], ["--bf16"]):
        assert main([*options, *more]) == 0
        types.append(json.loads(capsys.readouterr().out)["recommended"]["bf16"])
    assert types == [False, True]


def test_a_wrong_machine_is_told_before_torch_is_imported() -> None:
    code = (
        "import sys\n"
        "from lsp_ray.plan.__main__ import main\n"
        "assert main(['--hardware', 'rtx4900']) == 2\n"
        "heavy = {'torch', 'ray', 'transformers', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("error: hardware must be one of a10, a100, ")
    assert done.stderr.endswith("got 'rtx4900'; did you mean rtx4090?\n")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--hardware", "gtx970"], "error: hardware must be one of a10, a100, a1000-laptop, h100, h100-pcie, "),
        (["--hardware", "nowhere.toml"], "error: hardware must be a readable TOML file, got 'nowhere.toml'; "),
        ([], "error: hardware must be one of a10, "),
        (["--hardware", "rtx3060", "--measure"], "error: hardware must be left out where --measure is given, got "),
        (["--hardware", "rtx3060", "--gpu_memory_gb", "0"], "error: gpu_memory_gb must be a number above 0, got 0"),
        (
            ["--hardware", "rtx3060", "--lsp.subspace_dim", "4"],
            "error: lsp.nnz_per_row must be at most lsp.subspace_dim",
        ),
        (["--hardware", "rtx3060", "--max_seq_length", "0"], "error: max_seq_length must be at least 8, got 0"),
        (
            ["--hardware", "rtx3060", "--load_in_4bit", "--load_in_8bit"],
            "error: load_in_8bit must be left out beside load_in_4bit, got True",
        ),
        (
            ["--hardware", "rtx3060", "--load_in_4bit", "--method", "native"],
            "error: method must be lsp or lora with load_in_4bit, as quantised weights stay as they are, got 'native'",
        ),
        (
            ["--hardware", "rtx3060", "--load_in_8bit", "--lsp.delta", "merged"],
            "error: lsp.delta must be apart with load_in_8bit, as quantised weights stay as they are, got 'merged'",
        ),
        (["--hardware", "rtx3060", "--lora.r", "0"], "error: lora.r must be at least 1, got 0"),
        (["--hardware", "rtx3060", "--lsp.subspace_dim", "0"], "error: lsp.subspace_dim must be at least 1, got 0"),
        (["--hardware", "rtx3060", "--horse_power", "3"], "error: options must be those that --help lists, "),
    ],
)
def test_bad_options_are_answered_with_one_line(
    llama_folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], line: str
) -> None:
    assert main(["--model_name_or_path", str(llama_folder), *options]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(line)
    assert errors.count("\n") == 1


def test_an_unknown_model_is_answered_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model_name_or_path", "./nowhere", "--hardware", "rtx3060"]) == 2
    assert capsys.readouterr().err.startswith("error: model_name_or_path must be ")


@pytest.mark.parametrize("family", FAMILIES)
def test_payloads_are_those_of_a_run(family: Family, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path, family)
    layers = find_layers(load_skeleton(folder, task=task_of(family)))
    model = shape_of(folder)
    lsp = Workload(method="lsp", batch_size=1, seq_length=8, subspace_dim=24, nnz_per_row=2)
    zero = Workload(method="zero_offload", batch_size=1, seq_length=8)
    expected = lsp_payload_sizes(layers, LspConfig(subspace_dim=24, nnz_per_row=2))
    assert [lsp.payload_numel(layer) for layer in model.layers] == expected
    on_4_bits = lsp_payload_sizes(layers, LspConfig(subspace_dim=24, nnz_per_row=2), quantized=True)
    assert [replace(lsp, bits=4).payload_numel(layer) for layer in model.layers] == on_4_bits
    assert [zero.payload_numel(layer) for layer in model.layers] == full_payload_sizes(layers)


def test_linears_that_read_the_same_tensor_have_the_same_input(llama_folder: Path) -> None:
    read = [[linear.input for linear in layer.linears] for layer in shape_of(llama_folder).layers]
    assert read == [[0, 0, 0, 1, 2, 2, 3]] * 4 + [[]]  # q k v, o, gate up, down; the last norm


def test_the_type_of_payloads_decides_how_many_bytes_cross_the_link(
    llama_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model_name_or_path", str(llama_folder), "--hardware", "rtx3060", "--lsp.subspace_dim", "64", "--json"]
    sent = {}
    for dtype in ("bfloat16", "float32", "int8"):
        assert main([*options, "--runtime.payload_dtype", dtype]) == 0
        sent[dtype] = json.loads(capsys.readouterr().out)["by_policy"][-3]["bytes_each_way"]
    numel = 4 * (7 * 64 * 64 + 2 * 256) + 256
    assert sent == {"bfloat16": 2 * numel, "float32": 4 * numel, "int8": numel * 66 / 64}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("num_targets", [4 * 63, 100])
@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("method", ["native", "lsp", "lora"])
def test_activations_are_forecast_within_a_tenth_of_what_a_forward_and_backward_hold(
    llama_folder: Path, tmp_path: Path, method: Method, bf16: bool, num_targets: int, checkpointing: bool
) -> None:
    config = LlamaConfig.from_pretrained(llama_folder)
    is_padded = num_targets < 4 * 63  # such a batch has masked prompts, too, and heads that share keys
    config.num_key_value_heads = 1 if is_padded else 4
    config.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if bf16 else torch.float32)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    layers = find_layers(model)
    model.enable_input_require_grads()  # as when layers before the first block are trained
    if method == "lsp":
        lsp_units(layers, LspConfig(subspace_dim=64), seed=0, shared=shared_inputs(model))
    if method == "lora":
        add_adapters(model, layers, LoraConfig(), task="causal_lm", seed=0)
    ids_BS = torch.zeros(4, 64, dtype=torch.int64)
    labels_BS, mask_BS = ids_BS.clone(), torch.ones_like(ids_BS)
    if is_padded:
        mask_BS[1:, 50:] = 0
        labels_BS[:, 1:] = IGNORED
        labels_BS[:, 10:35] = 0
    batch = {"input_ids": ids_BS, "labels": labels_BS, "attention_mask": mask_BS}
    batch["positions"] = target_positions(labels_BS)
    gc.collect()  # what earlier tests have left would go meanwhile
    with peak_of(torch.device("cpu")) as live:
        before = live.live_bytes
        summed_loss(model, batch).backward()
    work = Workload(
        method=method,
        bf16=bf16,
        batch_size=4,
        seq_length=128,
        typical_length=64,
        typical_targets=num_targets,
        subspace_dim=64,
        gradient_checkpointing=checkpointing,
    )
    parts = device_memory(shape_of(tmp_path), work, 0)
    expected = replace(parts, weights=0, noise=0, projectors=0, optimizer_state=0, payload_buffers=0).peak_bytes
    assert live.peak_bytes - before == pytest.approx(expected, rel=0.1)


@pytest.fixture(scope="module")
def weights_folder(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    config = LlamaConfig.from_pretrained(llama_folder)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("method", "bits", "checkpointing"),
    [("lsp", 4, False), ("lsp", 4, True), ("lsp", 8, True), ("lora", 4, True), ("lora", 8, False), ("lsp", None, True)],
)
def test_a_quantised_base_and_what_is_kept_apart_are_forecast_within_a_twentieth_of_what_is_held(
    weights_folder: Path, method: Method, bits: Bits | None, checkpointing: bool
) -> None:
    model = load_model(weights_folder, dtype=torch.bfloat16, task="causal_lm", bits=bits).train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    layers = find_layers(model)
    model.enable_input_require_grads()
    base, kept_apart, adapters = _base_bytes(model), 0, 0
    if method == "lsp":
        lsp = LspConfig(subspace_dim=64, delta="apart")
        lsp_units(layers, lsp, seed=0, shared=shared_inputs(model), dtype=torch.bfloat16, quantized=bits is not None)
        kept_apart = sum(linear.delta_DE.nbytes for linear in model.modules() if isinstance(linear, DeltaLinear))
        kept_apart += sum(site.parameter.nbytes for layer in layers for site in layer.parameters)
    else:
        _, units = add_adapters(model, layers, LoraConfig(), task="causal_lm", seed=0)
        adapters = 4 * sum(unit.numel for unit in units)
    ids_BS = torch.zeros(4, 64, dtype=torch.int64)
    batch = {"input_ids": ids_BS, "labels": ids_BS, "attention_mask": torch.ones_like(ids_BS)}
    batch["positions"] = target_positions(ids_BS)
    gc.collect()  # else what earlier tests left may be counted before, and be gone at the peak
    gc.collect()  # what earlier tests have left would go meanwhile
    with peak_of(torch.device("cpu")) as live:
        before = live.live_bytes
        summed_loss(model, batch).backward()
    work = Workload(
        method=method,
        batch_size=4,
        seq_length=64,
        typical_targets=4 * 63,
        subspace_dim=64,
        gradient_checkpointing=checkpointing,
        bits=bits,
        apart=method == "lsp",
    )
    parts = device_memory(shape_of(weights_folder), work, 0)
    assert base == pytest.approx((parts.quantized, parts.weights - adapters), rel=0.05)
    assert parts.deltas == (kept_apart if method == "lsp" else 0)
    beside = replace(
        parts, weights=0, quantized=0, noise=0, deltas=0, projectors=0, optimizer_state=0, payload_buffers=0
    )
    steady = parts.weights + parts.quantized + parts.deltas
    assert steady + live.peak_bytes - before == pytest.approx(steady + beside.peak_bytes, rel=0.05)


def _base_bytes(model: torch.nn.Module) -> tuple[int, int]:
    """Of what stands for quantised weights, whatever its quantiser hangs it on, and of all other parameters."""
    quantized: dict[int, int] = {}

    def note(held: object) -> None:
        if isinstance(held, torch.Tensor):
            quantized[held.untyped_storage().data_ptr()] = held.untyped_storage().nbytes()
        for inner in vars(held).values() if hasattr(held, "__dict__") else ():
            if isinstance(inner, torch.Tensor | QuantState):
                note(inner)

    for module in model.modules():
        if is_quantized_linear(module):
            note(module.weight)
            note(getattr(module, "state", None))
    dense = [parameter for parameter in model.parameters() if parameter.untyped_storage().data_ptr() not in quantized]
    return sum(quantized.values()), sum(parameter.nbytes for parameter in dense)


@pytest.mark.parametrize("length", [512, 1024])
def test_llama_7b_trains_on_4_bits_at_d_1024_in_little_more_than_adapters_of_rank_16_take(
    tmp_path: Path, length: int
) -> None:
    LlamaConfig().save_pretrained(tmp_path)
    model, machine = shape_of(tmp_path), load_hardware("rtx4060")
    work = Workload(
        method="lsp",
        batch_size=1,
        seq_length=length,
        bits=4,
        gradient_checkpointing=True,
        subspace_dim=1024,
        lora_rank=16,
    )
    lsp = forecast(model, work, machine, "layerwise")
    lora = forecast(model, replace(work, method="lora"), machine, None)
    assert model.num_parameters == pytest.approx(6.74e9, rel=1e-3)
    assert lsp.longest_bytes <= 7.5e9
    assert lsp.longest_bytes <= 1.15 * lora.longest_bytes
    assert lsp.misfits == ()


def test_a_data_set_makes_the_forecast_that_of_its_own_batches_and_the_longest_stays_in_view(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_tiny_model(tmp_path / "model", "llama")
    data = write_tiny_jsonl(tmp_path / "data.jsonl", "prompt_completion", 100)
    options = ["--model_name_or_path", str(folder), "--hardware", "rtx3060", "--lsp.subspace_dim", "16", "--json"]
    options += ["--method", "lsp"]
    entries = []
    for more in ([], ["--dataset", str(data)]):
        assert main([*options, *more]) == 0
        entries.append(json.loads(capsys.readouterr().out)["recommended"])
    blind, seen = entries
    assert blind["device_bytes"]["peak"] == blind["device_bytes"]["longest"] == seen["device_bytes"]["longest"]
    assert seen["device_bytes"]["peak"] < seen["device_bytes"]["longest"]
    assert seen["busy_s"]["gpu"] < blind["busy_s"]["gpu"]


def test_a_typical_batch_has_the_mean_length_and_the_mean_targets_of_padded_batches(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model", "llama")
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a b", "completion": "c"}\n' * 20)
    tokenizer = load_tokenizer(folder)
    length = len(tokenizer("a b").input_ids) + len(tokenizer("c", add_special_tokens=False).input_ids) + 1
    found = typical_batch(str(data), folder, batch_size=2, max_seq_length=64)
    assert abs(found.padded_length - length) <= 1  # whether a tokenizer begins with a token of its own
    assert 2 <= found.num_targets <= 2 * (length - 1)


@pytest.mark.parametrize(("bf16", "payload_dtype"), [(False, "float32"), (True, "int8")])
def test_a_machine_is_measured(llama_folder: Path, bf16: bool, payload_dtype: PayloadDtype) -> None:
    work = Workload(method="lsp", batch_size=2, seq_length=32, bf16=bf16, payload_dtype=payload_dtype)
    machine = measure(
        llama_folder, shape_of(llama_folder), work, device=torch.device("cpu"), device_threads=1, budget_s=0.01
    )
    assert not machine.on_gpu
    assert 1e7 < machine.core_bytes_per_s <= machine.host_bytes_per_s < 1e13
    assert 1e8 < machine.block_flops < machine.device_float32_flops < 1e16
