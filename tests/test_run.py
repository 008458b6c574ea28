from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

from lsp_ray.run import main
from tests.tiny import write_tiny_jsonl, write_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_model(folder / "model", "llama")
    write_tiny_jsonl(folder / "data.jsonl", "prompt_completion", 100)
    return folder


def arguments(tiny: Path, output_dir: Path) -> list[str]:
    return [
        *("--model_name_or_path", str(tiny / "model"), "--dataset", str(tiny / "data.jsonl")),
        *("--output_dir", str(output_dir), "--max_steps", "3", "--lsp.subspace_dim", "16", "--lsp.nnz_per_row", "2"),
    ]


def test_help_needs_neither_torch_nor_ray() -> None:
    code = (
        "import sys\n"
        "from lsp_ray.run import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'ray', 'transformers', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "--lsp.subspace_dim" in done.stdout
    assert "Non-zeros r in every row" in done.stdout


@pytest.mark.usefixtures("cluster")
def test_a_run_goes_from_options_to_a_checkpoint(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = ("--gradient_checkpointing", "--runtime.emulate", "a1000-laptop", "--lsp.subspace_dim", "auto")
    assert main([*arguments(tiny, out), *options]) == 0
    shown = capsys.readouterr().out
    for expected in (
        "bf16: products take",
        "lsp.subspace_dim auto: 32, ",
        "plan: lsp on cpu",
        "emulating a1000-laptop",
        "eval loss before",
        "sample before",
        "step 3/3",
        "eval loss after",
    ):
        assert expected in shown
    assert re.search(r"step 3/3  epoch 0\.13  loss \S+  lr 3\.33e-05  .*  cpu \d+ %  down \d+ %  shards", shown)
    last = shown.splitlines()[-5:]
    assert re.fullmatch(
        rf"done in \d+:\d\d: eval loss .* s a step, .*, peak device memory \S+ GB, everything is in {out}", last[0]
    )
    assert last[1] == "next:"
    assert re.findall(rf"(chat|report|export) {out}", "\n".join(last[2:])) == ["chat", "report", "export"]
    page = (out / "report.html").read_text()
    assert str(tiny / "model") in page
    assert "(90 examples, 10 held out)" in page
    AutoModelForCausalLM.from_pretrained(out)
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["gradient_checkpointing"] is True
    assert config["lsp"]["subspace_dim"] == 32
    assert config["runtime"]["num_shards"] == json.loads((out / "summary.json").read_text())["num_shards"]
    assert config["runtime"].pop("link_gbps") is None  # emulation decides it
    assert config["runtime"].pop("address") is config["runtime"].pop("network_gbps") is None  # one machine
    assert config["runtime"].pop("device_memory_gb") is None  # all there is
    assert config.pop("report_port") is None
    assert config.pop("lr_scheduler_kwargs") is config.pop("early_stopping_patience") is None
    assert None not in (*config.values(), *config["runtime"].values())
    assert "output_dir" not in config


@pytest.mark.usefixtures("cluster")
def test_a_runs_config_repeats_it_and_later_options_win(tiny: Path, tmp_path: Path) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    assert main(arguments(tiny, first)) == 0
    assert main(["--config", str(first / "config.yaml"), "--output_dir", str(again), "--seed", "43"]) == 0
    ours, theirs = (yaml.safe_load((folder / "config.yaml").read_text()) for folder in (again, first))
    assert ours == {**theirs, "seed": 43}


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("method", ["native", "zero_offload", "lora", "galore"])
def test_the_baselines_run_from_the_command_line(tiny: Path, tmp_path: Path, method: str) -> None:
    assert main([*arguments(tiny, tmp_path / "out"), "--method", method, "--galore.rank", "8"]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["method"], summary["policy"]) == (method, "sequential" if method == "zero_offload" else None)


@pytest.mark.usefixtures("cluster")
def test_sigterm_ends_a_run_after_its_step_with_a_checkpoint_and_leaves_no_handler(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    metrics = tmp_path / "out" / "metrics.jsonl"

    def terminate_once_training() -> None:
        deadline_s = time.monotonic() + 60
        while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline_s:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=terminate_once_training)
    thread.start()
    code = main([*arguments(tiny, tmp_path / "out"), "--max_steps", "100000"])
    thread.join()
    assert code == 143
    said = capsys.readouterr().err
    assert re.search(
        r"^stopped after \d+ of 100000 steps; the last checkpoint is .*out/checkpoint-\d+; to go on: ", said
    )
    assert signal.getsignal(signal.SIGTERM) is before
    command = shlex.split(said.split("to go on: ")[1])
    assert main([*command[3:], "--max_steps", "5"]) == 2  # the command is understood, the other option refused
    assert "max_steps must be 100000 as it was at checkpoint-" in capsys.readouterr().err


def test_a_run_that_cannot_start_leaves_no_folder(tiny: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(tiny / "model", tmp_path / "damaged")
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert main([*arguments(tiny, tmp_path / "out"), "--model_name_or_path", str(damaged)]) == 2
    assert not (tmp_path / "out").exists()


BAD = [
    (
        ["--lsp.subspace_dim", "500"],
        r"lsp\.subspace_dim must be at most 64, a side of .* \(.* × .*\), got 500; half a side",
    ),
    (["--lsp.subspace_dim", "0"], r"lsp\.subspace_dim must be at least 1, got 0"),
    (["--lsp.subspace_dim", "many"], r"lsp\.subspace_dim must be a whole number or auto, got 'many'"),
    (
        ["--lsp.subspace_dim", "auto", "--lsp.init_from", "/nowhere"],
        r"lsp\.subspace_dim must be the number of the run that lsp\.init_from names, got 'auto'",
    ),
    (
        ["--lsp.subspace_dim", "auto", "--lsp.nnz_per_row", "33"],
        r"lsp\.nnz_per_row must be at most lsp\.subspace_dim \(32\), got 33",
    ),
    (["--lsp.nnz_per_row", "17"], r"lsp\.nnz_per_row must be at most lsp\.subspace_dim \(16\), got 17"),
    (["--learning_rate", "fast"], r"learning_rate must be a number, got 'fast'"),
    (["--method", "magic"], r"method must be one of lsp, zero_offload, native, lora, galore, got 'magic'"),
    (["--lr_scheduler_type", "greedy"], r"lr_scheduler_type must be one of linear, cosine, .*, got 'greedy'"),
    (["--lr_scheduler_kwargs", "3"], r"lr_scheduler_kwargs must be a table, such as \{\"name\": 0\.1\}, got '3'"),
    (
        ["--lr_scheduler_type", "warmup_stable_decay"],
        r"lr_scheduler_kwargs must be what .*'num_decay_steps'\), got None",
    ),
    (["--bf16", "maybe"], r"bf16 must be true or false, got 'maybe'"),
    (
        ["--runtime.policy", "foo"],
        r"runtime\.policy must be one of sequential, delayed, layerwise_fcfs, layerwise, earliest_deadline, got 'foo'",
    ),
    (["--runtime.num_shards", "1.5"], r"runtime\.num_shards must be a whole number, got '1\.5'"),
    (["--seed", ""], r"seed must be a whole number, got ''"),
    (["--max_steps", "-5"], r"max_steps must be at least 1, or -1 to train num_train_epochs, got -5"),
    (["--per_device_train_batch_size", "500"], r"per_device_train_batch_size must make.* at most the 90 .*, got 500"),
    (["--warmup_steps", "3"], r"warmup_steps must be below the 3 steps of this run, got 3"),
    (["--model_name_or_path", ""], r"model_name_or_path must name one, got ''"),
    (["--max_step", "3"], r"options must be those that --help lists, .*--max_step"),
    (["--dataset", "/nowhere/rows.jsonl"], r"dataset must .*got '/nowhere/rows\.jsonl'"),
    (["--model_name_or_path", "/nowhere/model"], r"model_name_or_path must .*got '/nowhere/model'"),
    (["--config", "/nowhere/run.yaml"], r"config must be a readable YAML file .*, got '/nowhere/run\.yaml'"),
    (["--max_seq_length", "4096"], r"max_seq_length must be at most \d+, the positions of this model, got 4096"),
    (["--runtime.device", "cuda"], r"runtime\.device must be cpu or auto where torch finds no GPU, got 'cuda'"),
    (["--lsp.init_from", "/nowhere"], r"lsp\.init_from must be a file of projectors .*got '/nowhere'"),
    (["--report_to", "mlflow"], r"report_to must be one of none, tensorboard, wandb, got 'mlflow'"),
    (["--load_best_model_at_end"], r"eval_steps must be at least 1 with load_best_model_at_end, .*, got 0"),
    (["--early_stopping_patience", "2"], r"eval_steps must be at least 1 with early_stopping_patience, .*, got 0"),
    (["--early_stopping_patience", "0", "--eval_steps", "1"], r"early_stopping_patience must be at least 1, got 0"),
    (["--logging_steps", "0"], r"logging_steps must be at least 1, got 0"),
    (["--report_port", "65536"], r"report_port must be at most 65535, got 65536"),
    (["--report_port", "-1"], r"report_port must be at least 0, got -1"),
    (["--output_dir", "/proc/out"], r"output_dir must be writable.* got '/proc/out'"),
]


@pytest.mark.parametrize(("bad", "message"), BAD, ids=[" ".join(bad) for bad, _ in BAD])
def test_a_bad_option_ends_in_one_line_with_code_2_before_anything_is_written(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: Sequence[str], message: str
) -> None:
    out = tmp_path / "out"
    assert main([*arguments(tiny, out), *bad]) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(rf"error: {message}.*\n", said), said
    assert not out.exists()


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_ends_in_one_line_that_says_how_to_get_it(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tracker: str
) -> None:
    monkeypatch.setitem(sys.modules, tracker, None)
    assert main([*arguments(tiny, tmp_path / "out"), "--report_to", tracker]) == 2
    expected = (
        f"error: report_to must be none where {tracker} is not installed, got '{tracker}'; pip install {tracker}\n"
    )
    assert capsys.readouterr().err == expected
    assert not (tmp_path / "out").exists()


def test_a_report_port_that_is_taken_ends_in_one_line_before_anything_is_written(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main([*arguments(tiny, tmp_path / "out"), "--report_port", str(port)]) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(rf"error: report_port must be a free port of 127\.0\.0\.1 \(.*\), got {port}\n", said)
    assert not (tmp_path / "out").exists()


def test_a_dataset_without_known_columns_names_those_that_would_do(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "odd.jsonl"
    data.write_text('{"colour": "red"}\n{"colour": "blue"}\n')
    assert main([*arguments(tiny, tmp_path / "out"), "--dataset", str(data)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert all(word in said for word in ("dataset", "prompt", "messages", "colour"))


def test_a_folder_with_content_is_never_written_to(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.safetensors").write_text("precious")
    assert main(arguments(tiny, tmp_path)) == 2
    assert "output_dir must be a new or empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.usefixtures("cluster")
def test_without_an_output_folder_runs_are_numbered(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lsp_output").mkdir()
    (tmp_path / "lsp_output" / "kept").touch()
    options = arguments(tiny, tmp_path)
    del options[options.index("--output_dir") : options.index("--output_dir") + 2]
    assert main(options) == 0
    for name in ("summary.json", "model.safetensors", "internals/lsp_projectors.safetensors", "report.html"):
        assert (tmp_path / "lsp_output-2" / name).exists()
    assert [path.name for path in (tmp_path / "lsp_output").iterdir()] == ["kept"]
