"""Every command in a fenced block of the pages has options that its program takes, or says what it needs."""

from __future__ import annotations

import ast
import json
import re
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from ray.scripts.scripts import get_auth_token, start

import lsp_ray
from lsp_ray import export, generate
from lsp_ray import run as run_module
from lsp_ray.plan import __main__ as plan_module
from lsp_ray.report import __main__ as report_module
from lsp_ray.train_help import train_help

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NEEDS = re.compile(r"# .*\bneeds (a GPU|the hub)\b")
TASK_FOLDER = ROOT / "examples" / "lm_eval_task"

PARSERS: dict[str, Callable[[list[str]], object]] = {
    "lsp_ray.run": run_module.parse,
    "lsp_ray.plan": plan_module._parse,
    "lsp_ray.report": report_module._parser().parse_args,
    "lsp_ray.export": export._parser().parse_args,
    "lsp_ray.generate": generate._parser().parse_args,
}
MODULES = {"train": "run", "plan": "plan", "chat": "generate", "report": "report", "export": "export"}


def blocks(language: str) -> list[tuple[str, str]]:
    fence = re.compile(rf"^```{language}\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    found = [(page.name, block) for page in PAGES for block in fence.findall(page.read_text(encoding="utf-8"))]
    assert found
    return found


COMMANDS = [(page, line) for page, block in blocks("bash") for line in block.splitlines() if line.strip()]


def check_python(words: list[str]) -> None:
    if words[0] == "-m":
        check_module(words[1], words[2:])
        return
    known = re.findall(r'add_argument\(\s*"(--\w+)"', (ROOT / words[0]).read_text(encoding="utf-8"))
    assert {word for word in words if word.startswith("--")} <= set(known)


def check_module(name: str, arguments: list[str]) -> None:
    """Parse as the module does; --help ends it as it should."""
    if arguments == ["--help"]:
        with pytest.raises(SystemExit) as end:
            PARSERS[name](arguments)
        assert end.value.code == 0
    else:
        PARSERS[name](arguments)


def check_lsp_ray(words: list[str]) -> None:
    if words != ["--help"] and words != ["train", "--help"]:
        check_module(f"lsp_ray.{MODULES[words[0]]}", ["--help" if word == "--help_all" else word for word in words[1:]])


def check_pip(words: list[str]) -> None:
    assert words[0] == "install"
    if "-e" in words:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        target = words[words.index("-e") + 1]
        assert target.removeprefix(".").strip("[]") in {"", *extras}


def check_lm_eval(words: list[str]) -> None:
    options = dict(zip(words[::2], words[1::2], strict=True))
    task = yaml.safe_load((TASK_FOLDER / "docstring_choice.yaml").read_text(encoding="utf-8"))
    assert ROOT / options["--include_path"] == TASK_FOLDER
    assert options["--tasks"] == task["task"]
    assert options["--model_args"] == "pretrained=my-run"


def check_ray(words: list[str]) -> None:
    """`test_machines` runs them."""
    known = {option for command in (start, get_auth_token) for parameter in command.params for option in parameter.opts}
    assert words[0] in ("start", "get-auth-token")
    assert {word.split("=")[0] for word in words[1:] if word.startswith("--")} <= known


def check_settings(words: list[str]) -> None:
    assert all(re.fullmatch(r"\w+=\w+", word) for word in words)


def check_no_arguments(words: list[str]) -> None:
    assert words == []


CHECKS: dict[str, Callable[[list[str]], object]] = {
    "python": check_python,
    "pip": check_pip,
    "lm_eval": check_lm_eval,
    "lsp-ray": check_lsp_ray,
    "source": lambda words: (
        check_no_arguments(words[1:]) if words == [".venv/bin/activate"] else pytest.fail(str(words))
    ),
    "ray": check_ray,
    "export": check_settings,
    "echo": lambda words: json.loads(words[0]),  # a row of a data set
    "./scripts/demo": run_module.parse,
    "./scripts/test": check_no_arguments,
    "./scripts/check": check_no_arguments,
}


@pytest.fixture(autouse=True)
def finished_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the pages call my-run, as far as a command line reads it."""
    (tmp_path / "my-run").mkdir()
    (tmp_path / "my-run" / "config.yaml").write_text("max_steps: 3\nlsp:\n  subspace_dim: 32\n")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[f"{page}: {line[:60]}" for page, line in COMMANDS])
def test_a_documented_command_can_be_typed(page: str, line: str) -> None:
    words = [word for word in shlex.split(line, comments=True) if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    if words[0] == "python" or not NEEDS.search(line):  # an own script's options must be right wherever it can run
        assert words[0] in CHECKS, f"{page}: no test runs {words[0]}; say what it needs"
        CHECKS[words[0]](words[1:])


def test_the_examples_in_the_help_of_train_can_be_typed() -> None:
    examples = [line.split("   ")[0].split() for line in train_help().split("\n\n")[1].strip().splitlines()]
    for words in (shlex.split(" ".join(example)) for example in examples):
        check_lsp_ray(words[1:])


@pytest.mark.parametrize(("page", "block"), [item for item in blocks("python") if item[0] != "api.md"])
def test_documented_python_is_python_and_imports_what_is_there(page: str, block: str) -> None:
    imports = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.ImportFrom)]
    for node in imports:
        if node.module == "lsp_ray":
            assert {alias.name for alias in node.names} <= set(lsp_ray._HOMES), page


def test_the_example_task_of_lm_eval_has_questions_with_one_right_answer() -> None:
    task = yaml.safe_load((TASK_FOLDER / "docstring_choice.yaml").read_text(encoding="utf-8"))
    path = ROOT / task["dataset_kwargs"]["data_files"][task["test_split"]]
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(rows) > 8
    for row in rows:
        assert set(re.findall(r"{{(\w+)}}", task["doc_to_text"])) <= row.keys()
        assert len(set(row[task["doc_to_choice"]])) == 4
        assert row[task["doc_to_target"]] in range(4)
