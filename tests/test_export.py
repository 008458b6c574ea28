"""What is done with a model after training: export it, look at its answers."""

from __future__ import annotations

import io
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lsp_ray import export, generate
from lsp_ray.models.load import load_model, load_tokenizer
from lsp_ray.models.save import save_model
from lsp_ray.models.trained import load_trained
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
        "pipeline_tag": "text-generation",
        "tags": ["lsp_ray"],
        "base_model": "someone/base",
    }
    for fact in ("| Method | lsp |", "| Subspace d | 16 |", "| Steps | 3 |", "| Weights | float32 |"):
        assert fact in body
    assert re.search(r"\| Held-out loss after \| \d+\.\d{4} \|", body)


@pytest.mark.parametrize(
    ("named", "noted", "base"),
    [
        ("smollm2-135m", None, "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("/tmp/somewhere/model", None, None),
        ("~/models/llama", None, None),
        ("models/llama.gguf", None, None),
        ("/home/me/.cache/lsp_ray/trainer/0123", "someone/base", "someone/base"),
    ],
)
def test_a_model_card_names_the_base_as_others_know_it_and_no_path(
    run_dir: Path, tmp_path: Path, named: str, noted: str | None, base: str | None
) -> None:
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    config |= {"model_name_or_path": named, "dataset": "/home/me/data/notes.jsonl"}
    run = shutil.copytree(run_dir, tmp_path / "run")
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    if noted is not None:
        (run / "internals" / "base_model").write_text(noted)
    export.export(run, tmp_path / "exported")
    card = (tmp_path / "exported" / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1]).get("base_model") == base
    assert (f"| Base model | {base} |" in card) == (base is not None)
    assert "| Data | notes.jsonl |" in card
    for path in ("/home/", "~/", str(tmp_path), "/tmp/somewhere"):
        assert path not in card


def test_the_usage_in_a_model_card_runs(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    export.export(run_dir, tmp_path / "exported")
    code = (tmp_path / "exported" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path / "exported")
    capsys.readouterr()
    exec(code, {})
    assert capsys.readouterr().out.strip()


def test_a_classifier_is_exported_with_its_labels(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, "bert", max_steps=2)
    run_on_threads(job, tmp_path / "run")
    assert export.export(tmp_path / "run", tmp_path / "exported").relative_error == 0
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "exported")
    assert tuple(model.config.id2label.values()) == job.label_names
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "AutoModelForSequenceClassification.from_pretrained(folder" in card
    assert "pipeline_tag: text-classification" in card


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


def test_a_conversation_keeps_what_was_said_and_the_base_model_answers_beside(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_tiny_model(tmp_path / "base", "llama")
    config = yaml.safe_load((run_dir / "config.yaml").read_text()) | {"model_name_or_path": str(base)}
    trained = shutil.copytree(run_dir, tmp_path / "run")
    (trained / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setattr(sys, "stdin", io.StringIO("w3 : w4 ?\nw5\n\nw6\n"))
    capsys.readouterr()
    assert generate.main([str(trained), "--base", "--max_new_tokens", "4"]) == 0
    shown = capsys.readouterr().out
    assert re.findall(r"^\[(\w+)\]$", shown, flags=re.MULTILINE) == ["base", "trained"] * 2  # two turns, then the end

    def answers(folder: Path) -> list[str]:
        speaker = generate.Speaker("it", load_trained(folder), load_tokenizer(folder))
        sampling = generate.Sampling(max_new_tokens=4)
        return [speaker.answer(prompt, sampling, show=lambda _piece: None) for prompt in ("w3 : w4 ?", "w5")]

    for answer in answers(base) + answers(trained):
        assert answer.strip() in shown
    alone = generate.Speaker("it", load_trained(trained), load_tokenizer(trained))
    assert alone._text("w5") != "".join(alone._text("w5").split())  # a template is there
    assert "w3" not in alone._text("w5")


def test_a_later_turn_is_given_all_that_was_said(run_dir: Path) -> None:
    speaker = generate.Speaker("it", load_trained(run_dir), load_tokenizer(run_dir), system="w9")
    said = speaker.answer("w3 : w4 ?", generate.Sampling(max_new_tokens=3), show=lambda _piece: None)
    turns = [("system", "w9"), ("user", "w3 : w4 ?"), ("assistant", said), ("user", "w5")]
    expected = "".join(f"<|{role}|> {content} <|end|> " for role, content in turns)
    assert speaker._text("w5") == f"{expected}<|assistant|> "


def test_draws_follow_their_seed_and_no_others(run_dir: Path) -> None:
    def said(**options: float) -> str:
        speaker = generate.Speaker("it", load_trained(run_dir), load_tokenizer(run_dir), raw=True)
        return speaker.answer("w3", generate.Sampling(max_new_tokens=12, **options), show=lambda _piece: None)  # type: ignore[arg-type]

    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    drawn = said(temperature=2.0, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert said(temperature=2.0, seed=1) == drawn
    assert said(temperature=2.0, seed=2) != drawn
    assert said(temperature=2.0, seed=1, top_p=1e-6) == said()  # of the likeliest token alone


def test_generate_refuses_in_one_line(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny_model(tmp_path / "bert", "bert")
    capsys.readouterr()
    for options, message in (
        (["--model", "/nowhere", "--prompt", "w1"], r"model must be the folder of a finished run .*"),
        (["--model", str(tmp_path / "bert"), "--prompt", "w1"], r"model must be a causal language model, got .*"),
        (["--model", str(run_dir), "--prompt", "", "--raw"], r"prompt must have a token, got ''"),
        (["--model", str(run_dir), "--prompt", "w1", "--max_new_tokens", "0"], r"max_new_tokens must be at least 1.*"),
        (
            [str(run_dir), "--prompt", "w1", "--temperature", "-1"],
            r"temperature must be a finite number of at least 0.*",
        ),
        ([str(run_dir), "--prompt", "w1", "--top_p", "0"], r"top_p must be above 0 and at most 1, got 0\.0"),
        (
            [str(run_dir), "--prompt", "w1 " * 300],
            r"prompt must be below the 256 tokens that the model takes, got 30\d",
        ),
        ([str(tmp_path / "bert"), "--prompt", "w1", "--base"], r"base must name a model where the folder has no .*"),
        (["--prompt", "w1"], r"model must be the one folder of a finished run or of an export, got None"),
    ):
        assert generate.main(options) == 2
        assert re.fullmatch(f"error: {message}\n", capsys.readouterr().err)
