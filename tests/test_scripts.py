"""The repository's own promises: scripts, pinned versions, README and licence say the same thing. No network."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import stat
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lsp_ray.config import RunConfig

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ["scripts/demo", "scripts/test", "scripts/check", ".ci/run"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs" / "log").glob("*.md")),
]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PINS = {
    canonicalize_name(requirement.name): requirement
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
    for requirement in [Requirement(line)]
}

FAKE_PYTHON = """#!/bin/sh
printf '%s|%s\\n' "$PWD" "$*" >>"$CALLS"
case "$*" in *"pip install"*) exit "${PIP_EXIT:-0}" ;; esac
"""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Checkout:
    """A copy of the scripts whose .venv has a Python that only writes down how it was called."""

    root: Path
    calls_file: Path

    def run(self, script: str, *args: str, cwd: Path | None = None, **environ: str) -> subprocess.CompletedProcess[str]:
        self.calls_file.write_text("")
        return subprocess.run(
            [self.root / script, *args],
            cwd=cwd or self.root,
            env={**os.environ, "CALLS": str(self.calls_file), **environ},
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )

    @property
    def calls(self) -> list[str]:
        return self.calls_file.read_text().splitlines()

    @property
    def installs(self) -> list[str]:
        return [call for call in self.calls if "pip install" in call]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    root = tmp_path / "a folder"
    shutil.copytree(ROOT / "scripts", root / "scripts")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, root / name)
    python = root / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    return Checkout(root=root, calls_file=tmp_path / "calls")


def options(config: type, prefix: str = "") -> Iterator[tuple[str, object]]:
    for field in dataclasses.fields(config):
        if field.default is not dataclasses.MISSING:
            yield f"--{prefix}{field.name}", field.default
        else:
            assert isinstance(field.default_factory, type)
            yield from options(field.default_factory, f"{field.name}.")


@pytest.mark.parametrize("script", [*COMMANDS, "scripts/env.sh"])
def test_every_script_is_valid_bash(script: str) -> None:
    checked = subprocess.run(["bash", "-n", ROOT / script], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


@pytest.mark.parametrize("script", COMMANDS)
def test_every_command_is_executable_and_stops_at_the_first_failure(script: str) -> None:
    path = ROOT / script
    assert path.stat().st_mode & stat.S_IXUSR
    assert path.read_text().startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in path.read_text()


def test_the_demo_passes_its_arguments_on_and_stays_in_the_folder_it_was_called_from(
    checkout: Checkout, tmp_path: Path
) -> None:
    done = checkout.run("scripts/demo", "--dataset", "my notes.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert checkout.calls[-1] == f"{tmp_path}|-P -m lsp_ray.run --dataset my notes.jsonl"


def test_the_tests_run_in_the_root_with_the_arguments_given(checkout: Checkout, tmp_path: Path) -> None:
    done = checkout.run("scripts/test", "-k", "a b", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert checkout.calls[-1] == f"{checkout.root}|-m pytest -k a b"
    checkout.run("scripts/test")
    assert checkout.calls[-1] == f"{checkout.root}|-m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder"


def test_a_script_called_through_a_link_finds_its_root(checkout: Checkout, tmp_path: Path) -> None:
    link = tmp_path / "lsp-test"
    link.symlink_to(checkout.root / "scripts" / "test")
    assert checkout.run(str(link)).returncode == 0
    assert checkout.calls[-1].startswith(f"{checkout.root}|")


def test_a_second_run_installs_nothing(checkout: Checkout) -> None:
    checkout.run("scripts/test")
    assert len(checkout.installs) == 1
    assert "-e " + str(checkout.root) + "[dev]" in checkout.installs[0]
    for script in ("scripts/test", "scripts/demo"):
        checkout.run(script)
        assert len(checkout.calls) == 1


def test_the_tests_add_what_the_demo_did_not_need(checkout: Checkout) -> None:
    checkout.run("scripts/demo")
    assert "[dev]" not in checkout.installs[0]
    checkout.run("scripts/test")
    assert "[dev]" in checkout.installs[0]


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_changed_requirements_are_installed(checkout: Checkout, name: str) -> None:
    checkout.run("scripts/demo")
    (checkout.root / name).write_text("# changed")
    checkout.run("scripts/demo")
    assert len(checkout.installs) == 1


def test_a_failed_installation_ends_in_one_line_and_is_tried_again(checkout: Checkout) -> None:
    failed = checkout.run("scripts/demo", PIP_EXIT="1")
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1] == "lsp_ray: pip could not install the dependencies; its message is above"
    checkout.run("scripts/demo")
    assert len(checkout.installs) == 1


def test_a_machine_without_python_is_told_so_in_one_line(checkout: Checkout, tmp_path: Path) -> None:
    shutil.rmtree(checkout.root / ".venv")
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "readlink", "cat", "cksum"):
        (tools / name).symlink_to(str(shutil.which(name)))
    (tools / "python3").symlink_to(str(shutil.which("false")))  # stands for one that is too old
    failed = checkout.run("scripts/demo", PATH=str(tools))
    assert failed.returncode == 1
    assert failed.stderr.count("\n") == 1
    assert "no Python 3.11 or newer on the PATH" in failed.stderr


def test_every_dependency_is_pinned_within_its_own_range() -> None:
    project = PYPROJECT["project"]
    for text in [
        *project["dependencies"],
        *project["optional-dependencies"]["dev"],
        *project["optional-dependencies"]["bench"],
    ]:
        requirement = Requirement(text)
        (pin,) = PINS[canonicalize_name(requirement.name)].specifier
        assert pin.operator == "=="
        assert requirement.specifier.contains(pin.version), text


def test_pins_are_exact_public_versions() -> None:
    for name, requirement in PINS.items():
        assert re.fullmatch(r"==[0-9][0-9a-z.]*", str(requirement.specifier)), name


def test_commands_in_the_readme_exist() -> None:
    named = set(re.findall(r"(?<![\w/])\.?/?((?:scripts|\.ci)/[\w.]+)", README))
    assert {"scripts/demo", "scripts/test", "scripts/check", ".ci/run"} <= named
    for name in named:
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent.name != "log"], ids=lambda page: page.name)
def test_options_that_a_page_names_exist(page: Path) -> None:
    known = {name for name, _ in options(RunConfig)} | {"--config", "--help"}
    known |= {"--merge", "--export_rank"}  # of export
    known |= {"--output", "--dtype", "--help_all"} | {"--hardware", "--json", "--measure"}  # of report, export and plan
    known |= {"--num_gpus", "--nodes", "--network_gbit", "--host_memory_gb"}  # of plan
    known |= {"--base", "--raw", "--prompt", "--temperature", "--top_p"}  # of chat
    known |= {"--head", "--port", "--address", "--node-ip-address", "--object-store-memory", "--generate"}  # of Ray
    known |= {"--strict", "--shm-size", "--no-build-isolation"}  # of mypy, docker and pip
    known |= {"--quick", "--data_dir", "--seeds", "--rate_factors", "--out", "--ray"}  # of the benchmarks
    known |= {"--model", "--model_args", "--tasks", "--include_path", "--device", "--batch_size"}  # of lm-eval
    assert set(re.findall(r"(?<=[\s`])--[a-z][\w.-]*", page.read_text(encoding="utf-8"))) <= known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_other_files_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_that_a_page_starts_exist(page: Path) -> None:
    for module in set(re.findall(r"python -m (lsp_ray\.\w+)", page.read_text(encoding="utf-8"))):
        path = ROOT.joinpath(*module.split("."))
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


def test_the_licence_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert PYPROJECT["project"]["license"] == "Apache-2.0"
