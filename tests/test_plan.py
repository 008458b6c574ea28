from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from lsp_ray.config import LoraConfig, LspConfig, Method, PayloadDtype
from lsp_ray.device.memory import peak_of
from lsp_ray.methods.lora import add_adapters
from lsp_ray.methods.lsp import lsp_payload_sizes, lsp_units
from lsp_ray.methods.units import full_payload_sizes
from lsp_ray.models.layers import find_layers
from lsp_ray.models.load import load_skeleton, load_tokenizer
from lsp_ray.models.loss import IGNORED, summed_loss, target_positions
from lsp_ray.models.shared_inputs import shared_inputs
from lsp_ray.plan.__main__ import main
from lsp_ray.plan.measure import measure
from lsp_ray.plan.skeleton import shape_of
from lsp_ray.plan.typical_batch import typical_batch
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


def test_a_plan_shows_every_method_and_policy_and_what_it_recommends(
    llama_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model_name_or_path", str(llama_folder / "config.json"), "--hardware", "rtx3060"]) == 0
    shown = capsys.readouterr().out
    for expected in ("native", "zero_offload", "earliest_deadline", "delayed", "recommended: --method lsp", "rtx3060"):
        assert expected in shown


def test_a_plan_as_json_has_bytes_and_seconds_for_every_method_and_policy(
    llama_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--hardware", "a1000-laptop", "--json", "--lsp.subspace_dim", "64", "--runtime.shard_by", "slice"]
    assert main(["--model_name_or_path", str(llama_folder), *options]) == 0
    content = json.loads(capsys.readouterr().out)
    assert [(entry["method"], entry["policy"]) for entry in content["forecasts"]][:4] == [
        ("native", None),
        ("galore", None),
        ("lora", None),
        ("zero_offload", "sequential"),
    ]
    assert len(content["forecasts"]) == 13
    assert {entry["subspace_dim"] for entry in content["forecasts"]} == {None, 64}
    assert all(entry["step_s"] > 0 and entry["device_bytes"]["peak"] > 0 for entry in content["forecasts"])
    assert content["advice"]["lsp.subspace_dim"] % 32 == 0


def test_a_model_that_is_too_large_is_said_not_to_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    LlamaConfig(vocab_size=32000).save_pretrained(tmp_path)  # transformers' default is the 7B model's shape
    options = ["--hardware", "a1000-laptop", "--lsp.subspace_dim", "512"]
    assert main(["--model_name_or_path", str(tmp_path), *options]) == 0
    assert "does not fit: native: device memory: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--hardware", "gtx970"], "error: hardware must be one of a1000-laptop, h100-pcie, "),
        ([], "error: hardware must be one of a1000-laptop, "),
        (["--hardware", "rtx3060", "--measure"], "error: hardware must be one of a1000-laptop, "),
        (["--hardware", "rtx3060", "--max_seq_length", "0"], "error: max_seq_length must be at least 1, got 0"),
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
        sent[dtype] = json.loads(capsys.readouterr().out)["forecasts"][-1]["bytes_each_way"]
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
    forecast = replace(parts, weights=0, projectors=0, optimizer_state=0, payload_buffers=0).peak_bytes
    assert live.peak_bytes - before == pytest.approx(forecast, rel=0.1)


def test_a_data_set_makes_the_forecast_that_of_its_own_batches_and_the_longest_stays_in_view(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_tiny_model(tmp_path / "model", "llama")
    data = write_tiny_jsonl(tmp_path / "data.jsonl", "prompt_completion", 100)
    options = ["--model_name_or_path", str(folder), "--hardware", "rtx3060", "--lsp.subspace_dim", "16", "--json"]
    entries = []
    for more in ([], ["--dataset", str(data)]):
        assert main([*options, *more]) == 0
        entries.append(json.loads(capsys.readouterr().out)["forecasts"][-1])
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
