"""What is done with a model after training: export it, look at its answers."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lsp_ray import export, generate
from lsp_ray.models.load import load_model, load_tokenizer, save_model
from tests.tiny import assert_same_weights, write_tiny_model
from tests.tiny_jobs import run_on_threads, tiny_job


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    job = tiny_job(folder, max_steps=3)
    run_on_threads(job, folder / "out")
    config = {"method": "lsp", "model_name_or_path": "someone/base", "max_steps": 3, "lsp": {"subspace_dim": 16}}
    (folder / "out" / "config.yaml").write_text(yaml.safe_dump(config))
    return folder / "out"


def test_in_the_same_dtype_an_export_has_the_same_weights_and_logits(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export.main([str(run_dir), str(tmp_path / "exported")]) == 0
    assert "float32; logits equal the trained model's" in capsys.readouterr().out
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (run_dir, tmp_path / "exported")]
    assert_same_weights(*models)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_dtype_is_checked_to_its_accuracy_and_loads(run_dir: Path, tmp_path: Path, dtype: str) -> None:
    exported = export.export(run_dir, tmp_path / "exported", dtype)
    assert 0 < exported.relative_error < export.MAX_ERROR_IN_EPS * torch.finfo(getattr(torch, dtype)).eps
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype="auto")
    assert model.dtype == getattr(torch, dtype)


def test_a_model_card_holds_the_runs_facts(run_dir: Path, tmp_path: Path) -> None:
    export.export(run_dir, tmp_path / "exported")
    card = (tmp_path / "exported" / "README.md").read_text()
    _, header, body = card.split("---\n", 2)
    assert yaml.safe_load(header) == {
        "library_name": "transformers",
        "tags": ["lsp_ray"],
        "base_model": "someone/base",
    }
    for fact in ("| Method | lsp |", "| Subspace d | 16 |", "| Steps | 3 |", "| Weights | float32 |"):
        assert fact in body
    assert re.search(r"\| Held-out loss after \| \d+\.\d{4} \|", body)


def test_a_classifier_is_exported_with_its_labels(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, "bert", max_steps=2)
    run_on_threads(job, tmp_path / "run")
    assert export.export(tmp_path / "run", tmp_path / "exported").relative_error == 0
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "exported")
    assert tuple(model.config.id2label.values()) == job.label_names


def test_a_model_that_a_dtype_cannot_hold_fails_the_check(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load_model(run_dir, dtype=torch.float32, task="causal_lm")
    with torch.no_grad():
        model.get_submodule("model.layers.0.mlp.down_proj").get_parameter("weight").mul_(1e6)
    save_model(model, load_tokenizer(run_dir), tmp_path / "run")
    (tmp_path / "run" / "summary.json").write_text("{}")
    assert export.main([str(tmp_path / "run"), str(tmp_path / "exported"), "--dtype", "float16"]) == 1
    said = capsys.readouterr().err
    assert re.fullmatch(r"failed: logits in float16 differ by \S+ of the trained model's \(at most 0\.0098\)\n", said)
    assert not (tmp_path / "exported").exists()


def test_export_refuses_in_one_line(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.yaml").write_text("method: lsp\n")
    for source, target, message in (
        (run_dir, run_dir, r"output_dir must be a new or empty folder, got .*"),
        (tmp_path / "nowhere", tmp_path / "new", r"run_dir must be the output folder of a run, .*"),
        (unfinished, tmp_path / "new", r"model must be the folder of a finished run or of an export, got .*"),
    ):
        assert export.main([str(source), str(target)]) == 2
        assert re.fullmatch(f"error: {message}\n", capsys.readouterr().err)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("raw", [False, True])
def test_a_trained_model_answers_and_its_prompt_is_not_repeated(
    run_dir: Path, capsys: pytest.CaptureFixture[str], raw: bool
) -> None:
    options = ["--model", str(run_dir), "--prompt", "w3 : w4 ?", "--max_new_tokens", "5", *(["--raw"] if raw else [])]
    assert generate.main(options) == 0
    shown = capsys.readouterr().out
    assert 1 <= len(shown.split()) <= 5
    assert "w3 : w4 ?" not in shown


def test_generate_refuses_in_one_line(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny_model(tmp_path / "bert", "bert")
    capsys.readouterr()
    for options, message in (
        (["--model", "/nowhere", "--prompt", "w1"], r"model must be the folder of a finished run .*"),
        (["--model", str(tmp_path / "bert"), "--prompt", "w1"], r"model must be a causal language model, got .*"),
        (["--model", str(run_dir), "--prompt", "", "--raw"], r"prompt must have a token, got ''"),
        (["--model", str(run_dir), "--prompt", "w1", "--max_new_tokens", "0"], r"max_new_tokens must be at least 1.*"),
    ):
        assert generate.main(options) == 2
        assert re.fullmatch(f"error: {message}\n", capsys.readouterr().err)


@pytest.mark.parametrize("command", ["export", "generate"])
def test_help_imports_neither_torch_nor_ray(command: str) -> None:
    code = (
        f"import sys\nfrom lsp_ray.{command} import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'ray', 'transformers', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert f"python -m lsp_ray.{command}" in done.stdout
