"""What a run does where nothing is asked for, and the lines that say so."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from lsp_ray.config import BUILT_IN_DATASET, RunConfig
from lsp_ray.data.dataset import Shape
from lsp_ray.data.tokenize import tokenize_rows
from lsp_ray.errors import ConfigError
from lsp_ray.output_folder import claimed
from lsp_ray.runtime.checkpoints.saved_run import check_same_run, with_saved_choices
from lsp_ray.runtime.prepare.job import Job, prepare_job, resumed
from lsp_ray.runtime.prepare.job_notes import method_notes
from tests.test_data_tokenize import FORGETFUL_TEMPLATE, assistant, rows_of, user
from tests.tiny import tiny_tokenizer, write_tiny_jsonl
from tests.tiny_jobs import run_on_threads, tiny_config


def prepared(folder: Path, **changes: Any) -> tuple[Job, list[str]]:
    notes: list[str] = []
    job = prepare_job(tiny_config(folder, **({"max_steps": None} | changes)), notes.append)
    return job, notes


def test_own_data_are_seen_once_at_their_length_and_a_line_says_so(tmp_path: Path) -> None:
    job, notes = prepared(tmp_path)
    assert (job.num_steps, job.config.seq_length) == (45, 64)
    assert "data: 180 examples, 1 epoch, 45 steps of 4; 64 tokens hold 100 % of them" in notes
    resolved = job.resolved_config
    assert (resolved.max_steps, resolved.num_train_epochs, resolved.max_seq_length) == (-1, 1.0, 64)


def test_thousands_have_commas_and_long_rows_are_counted(tmp_path: Path) -> None:
    folder = tmp_path
    tiny_config(folder)
    write_tiny_jsonl(folder / "llama.jsonl", "prompt_completion", 1200)
    with (folder / "llama.jsonl").open("a", encoding="utf-8") as file:
        for _ in range(100):
            file.write(json.dumps({"prompt": "w1 " * 300, "completion": "w2 " * 100}) + "\n")
            file.write(json.dumps({"prompt": "w1 ", "completion": "w2 " * 300}) + "\n")
    job, notes = prepared(folder, num_train_epochs=2.0)
    assert job.config.seq_length == 256  # all the positions there are
    [line] = [note for note in notes if " steps of 4; 256 tokens hold 85 % of them" in note]
    assert line.startswith("data: 1,1")
    assert ", 2 epochs, " in line
    assert any("100 examples dropped as their prompt alone has 256 tokens" in note for note in notes)


def test_the_built_in_data_set_keeps_its_steps_and_its_length() -> None:
    config = RunConfig()
    assert config.dataset == BUILT_IN_DATASET
    assert (config.steps, config.seq_length) == (40, 128)
    assert replace(config, num_train_epochs=2.0).steps == -1
    own = RunConfig(dataset="rows.jsonl")
    assert (own.steps, own.epochs, own.asked_length) == (-1, 1.0, None)
    with pytest.raises(ConfigError, match="max_seq_length must be a number by now"):
        _ = own.seq_length


def test_epochs_beside_steps_are_said_to_be_of_no_use(tmp_path: Path) -> None:
    _, notes = prepared(tmp_path, max_steps=3, num_train_epochs=2.0)
    assert "num_train_epochs 2 is not used, as max_steps 3 decides" in notes
    assert not any("not used" in note for note in prepared(tmp_path, max_steps=3)[1])


def test_a_batch_of_more_examples_than_there_are_is_put_in_numbers(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"4 × 64 = 256 examples a step, there are 180$"):
        prepared(tmp_path, gradient_accumulation_steps=64)


def test_a_cut_subspace_is_said(tmp_path: Path) -> None:
    _, notes = prepared(tmp_path, lsp={"subspace_dim": 40})
    [line] = [note for note in notes if "is cut" in note]
    assert line.startswith("lsp.subspace_dim 40 is cut to half a side in ")
    assert not any("is cut" in note for note in prepared(tmp_path)[1])


def test_that_compiling_takes_its_time_is_said() -> None:
    assert any("compiles" in note for note in method_notes(RunConfig(torch_compile=True), [], {}))
    assert not any("compiles" in note for note in method_notes(RunConfig(), [], {}))


def test_turns_that_a_template_rewrites_are_counted() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = FORGETFUL_TEMPLATE
    talk = [user("w1"), assistant("w8 - w2"), user("w3"), assistant("w9 - w4")]
    rows = tokenize_rows(rows_of(Shape.MESSAGES, [{"messages": talk}]), tokenizer, max_seq_length=64)
    [line] = [note for note in rows.notes if "carry no loss" in note]
    assert line.startswith("2 of the assistant's turns")  # one of each split


def test_a_run_goes_on_without_its_options_and_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = tiny_config(tmp_path, max_steps=3, save_steps=2, max_seq_length=100)
    relative = replace(config, model_name_or_path="llama", dataset="./llama.jsonl")
    job = prepare_job(relative, lambda _line: None)
    assert job.resolved_config.dataset == str(tmp_path / "llama.jsonl")
    assert job.resolved_config.model_name_or_path == str(tmp_path / "llama")
    run_on_threads(job, tmp_path / "out")
    checkpoint = tmp_path / "out" / "checkpoint-2"
    asked = replace(config, max_steps=None, max_seq_length=None)
    again = prepare_job(with_saved_choices(asked, checkpoint), lambda _line: None)
    assert resumed(again, checkpoint).first_step == 2
    # as runs before wrote them
    before = {"model_name_or_path": "llama", "dataset": "./llama.jsonl", "num_train_epochs": 3.0}
    saved = resumed(again, checkpoint).saved
    assert saved is not None
    config_of_now = json.loads(json.dumps(asdict(again.resolved_config)))
    same: dict[str, Any] = {"device": "cpu", "staleness": 0, "digest": saved.data_digest}
    check_same_run(replace(saved, config=saved.config | before), config_of_now, **same)
    older = {name: value for name, value in saved.config.items() if name != "packing"}
    check_same_run(replace(saved, config=older), config_of_now, **same)
    with pytest.raises(ConfigError, match=r"packing must be False as it was"):
        check_same_run(replace(saved, config=older), config_of_now | {"packing": True}, **same)
    other = replace(saved, config=saved.config | {"dataset": "./other.jsonl"})
    with pytest.raises(ConfigError, match=r"dataset must be '\./other\.jsonl' as it was"):
        check_same_run(other, config_of_now, **same)


@pytest.mark.parametrize(
    ("wrote", "how"),
    [
        ("model.safetensors", "start another run with --model_name_or_path {folder}"),
        (
            "adapter/adapter_config.json",
            "run lsp-ray export {folder} NEW --merge, then another with --model_name_or_path NEW",
        ),
    ],
)
def test_a_finished_run_says_how_to_train_longer(wrote: str, how: str, tmp_path: Path) -> None:
    (tmp_path / wrote).parent.mkdir(exist_ok=True)
    for name in ("summary.json", wrote):
        (tmp_path / name).write_text("{}", encoding="utf-8")
    config = RunConfig(output_dir=str(tmp_path), resume_from_checkpoint="last")
    expected = re.escape(f"to train its model longer, {how.format(folder=tmp_path)}") + "$"
    with pytest.raises(ConfigError, match=expected), claimed(config):
        pass


def test_one_run_at_a_time_is_at_work_in_a_folder(tmp_path: Path) -> None:
    begun = RunConfig(output_dir=str(tmp_path / "out"))
    going_on = replace(begun, resume_from_checkpoint="last")
    expected = "output_dir must be the folder of a run that has ended, and one is at work there, got "
    for own in (begun, going_on):
        with claimed(own) as folder:
            (folder / "metrics.jsonl").write_text("{}\n", encoding="utf-8")  # a step is done
            with pytest.raises(ConfigError, match=expected), claimed(going_on):
                pass
