"""docs/api.md and docs/options.md say what the code says, about every public name and every option."""

from __future__ import annotations

import dataclasses
import inspect
from pydoc import locate

import pytest

import lsp_ray
from lsp_ray import errors
from scripts.api_reference import OPTIONS_PAGE, PAGE, SECTIONS, options_page, page

NAMES = [name for names in SECTIONS.values() for name in names.split()]


def test_the_committed_page_is_what_the_docstrings_make() -> None:
    made = page()
    assert PAGE.read_text(encoding="utf-8") == made, "run scripts/api_reference.py"
    assert "LSPAdamW.for_model(model: PreTrainedModel, lr: float = 0.0001, *, target_modules:" in made
    assert "| `save_total_limit` | `int \\| None` | `2` | Checkpoints kept" in made
    assert "- raises `ConfigError`: Something cannot work; nothing was written." in made


def test_the_committed_page_of_options_is_what_the_configuration_makes() -> None:
    made = options_page()
    assert OPTIONS_PAGE.read_text(encoding="utf-8") == made, "run scripts/api_reference.py"
    assert "| `--save_total_limit` | `2` | Checkpoints kept" in made
    assert "| `--lsp.balance` | `true` | " in made


def test_every_public_name_and_every_error_is_there() -> None:
    classes = inspect.getmembers(errors, inspect.isclass)
    raised = {f"errors.{name}" for name, found in classes if issubclass(found, errors.LspRayError)}
    assert {*lsp_ray._HOMES, *raised} <= set(NAMES)


@pytest.mark.parametrize("name", [name for name in NAMES if dataclasses.is_dataclass(locate(f"lsp_ray.{name}"))])
def test_every_field_of_a_record_is_explained(name: str) -> None:
    section = PAGE.read_text(encoding="utf-8").split(f"### `lsp_ray.{name}`")[1].split("###")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    nested = ("`LspConfig`", "`LoraConfig`", "`GaloreConfig`", "`RuntimeConfig`", "`Advice`")
    assert rows
    assert [row for row in rows if row.endswith("|  |") and not any(kind in row for kind in nested)] == []
