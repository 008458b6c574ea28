"""The pages can be read: short lines, a README of one look, and nothing that another page says otherwise."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from lsp_ray.data.dataset import load_rows

ROOT = Path(__file__).resolve().parent.parent
TOP = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")
PAGES = [*(ROOT / name for name in TOP), *sorted((ROOT / "docs").rglob("*.md"))]
README_LINES = 130
CARDS_GB = re.compile(r"^\| (\d+) GB[^|]*\| ([^|]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", re.MULTILINE)


def prose(page: Path) -> list[str]:
    """Lines that are neither in a fenced block nor a table's."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [line for line in text.splitlines() if not line.lstrip().startswith("|")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_line_but_a_tables_or_a_commands_is_longer_than_110_characters(page: Path) -> None:
    assert [line for line in prose(page) if len(line) > 110] == []


def test_the_readme_is_one_look() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= README_LINES
    assert [line for line in prose(ROOT / "README.md") if len(line) > 100] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_says_what_is_and_not_what_was_hoped_for(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"\b(?:bars? (?:of|\d)|Bars|wanted|goals?|hoped|the target of)\b", text) == []


def test_every_entry_of_the_log_has_question_result_and_decision() -> None:
    for page in sorted((ROOT / "docs" / "log").glob("*.md")):
        assert re.fullmatch(r"\d{4}-\d\d", page.stem)
        for entry in page.read_text(encoding="utf-8").split("\n## ")[1:]:
            assert entry.startswith(page.stem), entry[:40]
            places = [entry.find(f"**{part}.**") for part in ("Question", "Result", "Decision")]
            assert -1 < places[0] < places[1] < places[2], entry[:60]


def test_the_readmes_cards_are_those_of_the_planners_page() -> None:
    """The largest model whose peak with checkpointing fits the card, of the page's first table."""
    guide = (ROOT / "docs" / "hardware.md").read_text(encoding="utf-8")
    table = guide.split("## 512 tokens")[1].split("##")[0]
    in_4_bits = {row[0]: row[2].strip() for row in CARDS_GB.findall(guide.split("## In 4 bits")[1])}
    fitting: dict[tuple[str, int], str] = {}
    model = ""
    for name, method, card in re.findall(
        r"^\| ([^|]*) \| `(\w+)` \| [^|]+ \| [^|]+ / (\d+ GB|none) \|", table, re.MULTILINE
    ):
        model = name.split(" (")[0].strip() or model
        for size_gb in (4, 6, 8, 12, 16, 24, 32, 80):
            if card != "none" and int(card.removesuffix(" GB")) <= size_gb:
                fitting[method, size_gb] = model
    rows = CARDS_GB.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(rows) >= 5
    for size_gb, *models in rows:
        expected = [fitting.get((method, int(size_gb)), "none") for method in ("lsp", "lora", "native")]
        expected.insert(2, in_4_bits[size_gb])
        assert [name.strip() for name in models] == expected, size_gb


def test_readme_choosing_and_the_option_say_the_same_of_learning_rates() -> None:
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/choosing.md", "docs/options.md")]
    for text in texts:
        assert "at most a quarter of it" in " ".join(text.split())
    for text in texts[:2]:
        assert "about ten times as much" in " ".join(text.split())


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/how_it_works.md"])
def test_files_that_a_page_names_are_there(page: str) -> None:
    named = set(re.findall(r"`((?:\w+/)+\w+\.(?:py|toml|md))`", (ROOT / page).read_text(encoding="utf-8")))
    assert named
    assert [name for name in sorted(named) if not any((ROOT / at / name).exists() for at in (".", "lsp_ray"))] == []


DATA = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
SAMPLES = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| `(\{.*?\})` \|", DATA, flags=re.MULTILINE)


@pytest.mark.parametrize(("columns", "row"), SAMPLES, ids=[columns for columns, _ in SAMPLES])
def test_a_sample_row_has_the_columns_that_it_stands_for_and_can_be_read(
    tmp_path: Path, columns: str, row: str
) -> None:
    assert re.findall(r"\w+", columns) == list(json.loads(row))
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{row}\n" * 4, encoding="utf-8")
    rows = load_rows(str(path), seed=0)
    assert len(rows.train) + len(rows.eval) == 4


def test_every_shape_has_a_sample_row() -> None:
    assert len(SAMPLES) >= 10
