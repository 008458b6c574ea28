"""scripts/hardware_guide.py: a page from a model's shape; the committed one has every model, method and length."""

from __future__ import annotations

import re

import pytest

from scripts.hardware_guide import (
    CARDS_4_BIT_GB,
    CARDS_STREAMED,
    HEAD,
    HEAD_4_BIT,
    HEAD_STREAMED,
    LARGER_MODELS,
    LARGEST_MODELS,
    LENGTHS,
    METHODS,
    METHODS_4_BIT,
    MODELS,
    PAGE,
    page,
    smallest_card,
)

ROW = re.compile(r"^\| .*\| `(\w+)` \| ([\d.]+) / ([\d.]+) \|", re.MULTILINE)
STREAMED = re.compile(r"^\| ([^|]*?) ?\| (\d+) GB \| (\S+) \|(?: [^|]+ \|){7}$", re.MULTILINE)


def test_the_page_of_a_model_has_a_row_for_every_method_and_length() -> None:
    told: list[str] = []
    written, on_4_bit = page({"SmolLM2-135M": MODELS["SmolLM2-135M"]}, {}, {}, told.append).split(HEAD_4_BIT)
    on_4_bit, streamed = on_4_bit.split(HEAD_STREAMED)
    rows = ROW.findall(written)
    assert [row[0] for row in rows] == [method for method, _ in METHODS] * len(LENGTHS)
    assert all(float(recomputed) <= float(kept) for _, kept, recomputed in rows)
    assert told == ["SmolLM2-135M"]
    first = written.split("## 2048 tokens")[0].splitlines()[-4:-1]
    last = on_4_bit.rstrip().splitlines()[-2:]
    assert [row[2] for row in STREAMED.findall(streamed)] == ["SmolLM2-135M"] * sum(map(len, CARDS_STREAMED.values()))
    assert [row[0] for row in ROW.findall(on_4_bit)] == [method for method, _ in METHODS_4_BIT]
    assert all(line in PAGE.read_text(encoding="utf-8") for line in first + last)  # what is committed is what it writes


def test_the_committed_page_has_every_model() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text.startswith(HEAD)
    text, on_4_bit = text.split(HEAD_4_BIT)
    on_4_bit, streamed = on_4_bit.split(HEAD_STREAMED)
    rows = STREAMED.findall(streamed)
    assert [row[0] for row in rows if row[0]] == [f"{card_gb} GB, {name}" for card_gb, name in CARDS_STREAMED]
    assert [int(row[1]) for row in rows] == [host_gb for hosts_gb in CARDS_STREAMED.values() for host_gb in hosts_gb]
    names = list({**MODELS, **LARGER_MODELS, **LARGEST_MODELS})
    assert {row[2] for row in rows} <= set(names)
    assert len(ROW.findall(text)) == len(MODELS) * len(METHODS) * len(LENGTHS)
    assert all(text.count(f"| {name} (") == len(LENGTHS) for name in MODELS)
    assert len(ROW.findall(on_4_bit)) == len({**MODELS, **LARGER_MODELS}) * len(METHODS_4_BIT)
    assert re.findall(r"^\| (\d+) GB \|", on_4_bit, re.MULTILINE) == list(map(str, CARDS_4_BIT_GB))


@pytest.mark.parametrize(("peak_gb", "card"), [(2.9, "4 GB"), (3.1, "8 GB"), (22.9, "24 GB"), (79.1, "none")])
def test_a_card_needs_room_beside_the_peak(peak_gb: float, card: str) -> None:
    assert smallest_card(peak_gb * 1e9) == card
