"""Command lines as people type them, and null in a YAML file, for every option."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import pytest
import yaml
from ray._private.utils import validate_socket_filepath

from lsp_ray.config import LspConfig, RunConfig
from lsp_ray.errors import ConfigError
from lsp_ray.inputs import check_inputs, check_temp_folder
from lsp_ray.run import parse


def options(owner: Any = RunConfig, prefix: str = "") -> list[tuple[str, Any]]:
    """Every option and group of options with its annotation."""
    found = []
    for name, hint in get_type_hints(owner).items():
        found.append((prefix + name, hint))
        found += options(hint, f"{prefix}{name}.") if is_dataclass(hint) else []
    return found


def value_of(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config


@pytest.mark.parametrize(("name", "hint"), options())
def test_null_means_the_default_unless_it_is_a_value(tmp_path: Path, name: str, hint: Any) -> None:
    content: Any = None
    for part in reversed(name.split(".")):
        content = {part: content}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    expected = None if NoneType in get_args(hint) else value_of(RunConfig(), name)
    assert value_of(parse(["--config", str(tmp_path / "run.yaml")]), name) == expected


@pytest.mark.parametrize("kind", [RunConfig, *(hint for _, hint in options() if is_dataclass(hint))])
def test_none_from_python_is_a_value_or_ends_in_one_line(kind: Any) -> None:
    hints = get_type_hints(kind)
    for known in fields(kind):
        given: dict[str, Any] = {known.name: None}
        if NoneType in get_args(hints[known.name]):
            assert getattr(kind(**given), known.name) is None
        else:
            with pytest.raises(ConfigError, match=rf"{known.name} must have a value, got None"):
                kind(**given)


def test_dashes_and_negative_numbers_are_understood() -> None:
    assert parse(["--max-steps", "-1", "--lsp.subspace-dim=16", "--bf16", "--learning-rate", "1e-4"]) == RunConfig(
        max_steps=-1, bf16=True, learning_rate=1e-4, lsp=LspConfig(subspace_dim=16)
    )
    assert parse(["--bf16=false", "--gradient-checkpointing"]) == RunConfig(bf16=False, gradient_checkpointing=True)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--learning_rate", "-1e-4"], r"learning_rate must be at least 0, got -0\.0001"),
        (["--weight-decay", "-inf"], r"weight_decay must be a number, got .-inf."),
        (["--lerning_rate", "3"], r"options must be .* '--lerning_rate 3'; did you mean --learning_rate\?"),
        (["--learning_rat=3"], r"options must be .*; did you mean --learning_rate\?"),
        (["--subspace_dim", "3"], r"options must be .*; did you mean --lsp\.subspace_dim\?"),
        (["--lsp.subspce_dim", "3"], r"options must be .*; did you mean --lsp\.subspace_dim\?"),
        (["--zzz", "3"], r"options must be those that --help lists, got '--zzz 3'$"),
    ],
)
def test_a_mistyped_option_ends_in_one_line_that_says_what_was_meant(argv: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{said}"):
        parse(argv)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dataset": "/nowhere/rows.jsonl"}, "dataset must be an existing file or folder"),
        ({"dataset": "/nowhere"}, "dataset must be an existing file or folder"),
        ({"dataset": "rows.csv"}, "dataset must be an existing file or folder"),
        ({"model_name_or_path": "/nowhere/model"}, "model_name_or_path must be smollm2"),
        ({"model_name_or_path": "model.gguf"}, "model_name_or_path must be smollm2"),
        ({"resume_from_checkpoint": "/nowhere/checkpoint-3"}, "resume_from_checkpoint must be last or"),
        ({"lsp": LspConfig(init_from="/nowhere")}, r"lsp\.init_from must be a file of projectors"),
    ],
)
def test_what_is_missing_is_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{said}.* got '"):
        check_inputs(RunConfig(**options))


def test_folders_without_what_they_should_hold_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dataset must hold files of a known format"):
        check_inputs(RunConfig(dataset=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"model_name_or_path must be a folder with a config\.json"):
        check_inputs(RunConfig(model_name_or_path=str(tmp_path)))


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
@pytest.mark.parametrize("pid", [1, 4_194_304])
def test_a_temporary_folder_too_long_for_rays_sockets_is_named_at_the_byte_where_ray_refuses_it(
    name: str, pid: int
) -> None:
    folder = "/tmp/" + "ü" * 8 + "f" * 10
    while True:
        session = f"{folder}/ray/session_{datetime.now(UTC):%Y-%m-%d_%H-%M-%S_%f}_{pid}"
        try:
            validate_socket_filepath(f"{session}/sockets/plasma_store")  # Ray's own
        except OSError:
            break
        check_temp_folder({name: folder}, pid)
        folder += "f"
    bound = len(folder.encode()) - 1
    with pytest.raises(ConfigError, match=rf"^{name} must be at most {bound} bytes long, as the sockets of Ray's .*"):
        check_temp_folder({name: folder}, pid)
    check_temp_folder({"TMPDIR": folder, "RAY_TMPDIR": "/tmp"}, pid)


@pytest.mark.parametrize(
    ("options", "environment"), [(["--dataset", "/nowhere/rows.jsonl"], {}), ([], {"TMPDIR": "/tmp/" + "f" * 60})]
)
def test_what_is_missing_or_too_long_is_refused_before_anything_slow_is_imported(
    tmp_path: Path, options: list[str], environment: dict[str, str]
) -> None:
    code = (
        "import sys\n"
        "from lsp_ray.run import main\n"
        f"assert main({[*options, '--output_dir', str(tmp_path / 'out')]!r}) == 2\n"
        "heavy = {'torch', 'ray', 'transformers', 'datasets', 'pyarrow', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "import time; print(time.process_time())\n"
    )
    command, environment = [sys.executable, "-c", code], {**os.environ, **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 1
    assert float(done.stdout) < 1.0  # of the processor, however busy the machine is
    assert not (tmp_path / "out").exists()
