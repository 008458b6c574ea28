"""Inputs that people have: what is trained is what stands in the file, or a line says what became of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from lsp_ray.data.chat import template_columns
from lsp_ray.data.dataset import load_rows
from lsp_ray.data.tokenize import IGNORED, TokenizedRows, tokenize_rows
from lsp_ray.errors import ConfigError
from tests.tiny import CHAT_TEMPLATE, character_tokenizer

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return character_tokenizer()


def write(path: Path, content: str) -> Path:
    path.write_text(content, encoding="utf-8")
    return path


def jsonl(path: Path, rows: Sequence[object]) -> Path:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def tokenized(path: Path, tokenizer: PreTrainedTokenizerFast, *, max_seq_length: int | None = 512) -> TokenizedRows:
    rows = load_rows(str(path), seed=0, cache_dir=path.parent / "cache", template_columns=template_columns(tokenizer))
    return tokenize_rows(rows, tokenizer, max_seq_length=max_seq_length)


def decoded(rows: TokenizedRows, tokenizer: PreTrainedTokenizerFast, *, learnt: bool = False) -> list[str]:
    """Texts of both splits, or what is learnt of them, sorted."""
    both = [*rows.train, *rows.eval]
    ids = [[label for label in row["labels"] if label != IGNORED] if learnt else row["input_ids"] for row in both]
    return sorted(str(tokenizer.decode(row)) for row in ids)


@pytest.mark.parametrize(
    "answers",
    [["00731", "04211", "00012"], ["True", "False", "True"], ["1.50", "2.00", "10.00"], ["1", "x1", "null"]],
)
@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_an_answer_is_trained_as_it_is_written(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, answers: list[str], suffix: str
) -> None:
    path = tmp_path / f"rows.{suffix}"
    if suffix == "jsonl":
        jsonl(path, [{"prompt": "q?", "completion": answer} for answer in answers])
    else:
        mark = "," if suffix == "csv" else "\t"
        write(path, f"prompt{mark}completion\n" + "".join(f"q?{mark}{answer}\n" for answer in answers))
    assert decoded(tokenized(path, tokenizer), tokenizer, learnt=True) == sorted(f"{a}<eos>" for a in answers)


def test_numbers_in_json_are_trained_as_they_are_written(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    answers = ["2.00", "1e5", "-0", "12345678901234567890123", "true"]
    content = "".join(f'{{"prompt": "q", "completion": {answer}}}\n' for answer in answers)
    rows = tokenized(write(tmp_path / "rows.jsonl", content), tokenizer)
    assert decoded(rows, tokenizer, learnt=True) == sorted(f"{answer}<eos>" for answer in answers)
    said = " ".join(rows.notes)
    assert "column 'completion' has numbers in 4 rows" in said
    assert "true or false in 1 rows" in said


def test_columns_may_change_their_type_anywhere(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    made: list[dict[str, Any]] = [{"text": f"t{at}", "extra": None, "more": 1} for at in range(2500)]
    made += [{"text": "last", "extra": {"new": "key"}, "more": "x1", "late": [1]}]
    rows = load_rows(str(jsonl(tmp_path / "rows.jsonl", made)), seed=0, cache_dir=tmp_path / "cache")
    assert sorted([*rows.train["text"], *rows.eval["text"]]) == sorted(row["text"] for row in made)
    assert "columns not used: extra, more, late" in rows.notes
    head = "text,more\n" + "".join(f"t{at},{at}\n" for at in range(2500))
    rows = load_rows(str(write(tmp_path / "r.csv", head + "last,x1\n")), seed=0, cache_dir=tmp_path / "cache")
    assert len(rows.train) + len(rows.eval) == 2501


def turns(*contents: str) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[at % 2], "content": content} for at, content in enumerate(contents)]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "human", "content": "q0"}, {"role": "gpt", "content": "a0"}]},
        {"messages": [{"role": "User", "content": "q0"}, {"role": "Assistant", "content": "a0"}]},
        {"conversations": [{"from": "human", "value": "q0"}, {"from": "gpt", "value": "a0"}]},
        {"conversations": turns("q0", "a0")},
        {"messages": json.dumps(turns("q0", "a0"))},
    ],
)
def test_conversations_of_other_tools_are_read(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, row: dict[str, Any]
) -> None:
    rows = tokenized(jsonl(tmp_path / "rows.jsonl", [row] * 3), tokenizer)
    assert set(decoded(rows, tokenizer)) == {"<|user|> q0 <|end|> <|assistant|> a0 <|end|> "}
    assert set(decoded(rows, tokenizer, learnt=True)) == {"a0 <|end|> "}


def test_roles_that_answer_nothing_are_named(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    odd = [{"role": "critic", "content": "a"}, {"role": "poet", "content": "b"}]
    with pytest.raises(ConfigError, match=r"have turns of the role assistant.* got 'critic/poet'"):
        tokenized(jsonl(tmp_path / "rows.jsonl", [{"messages": odd}] * 3), tokenizer)
    rows = tokenized(jsonl(tmp_path / "mixed.jsonl", [{"messages": [*odd, *turns("q", "a")]}] * 3), tokenizer)
    assert any("carry no loss: critic, poet" in note for note in rows.notes)


def test_rows_without_an_answer_are_counted(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    made = [*([turns("hi")] * 3), turns("x", ""), *([turns("q", "a")] * 4), []]
    rows = tokenized(jsonl(tmp_path / "rows.jsonl", [{"messages": row} for row in made]), tokenizer)
    assert rows.num_dropped == 4
    assert "4 examples dropped as they had no answer to learn" in rows.notes
    assert any(note.startswith("1 conversations have an empty answer") for note in rows.notes)


def test_a_part_that_is_no_text_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    picture = {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]}
    made = [{"messages": turns("q", "a")}, {"messages": [picture, {"role": "assistant", "content": "a cat"}]}]
    said = r"hold messages of text alone, got 'a part of type image'; in row 2 of .*rows\.jsonl"
    with pytest.raises(ConfigError, match=said):
        tokenized(jsonl(tmp_path / "rows.jsonl", made), tokenizer)


ITEMS = (
    "{% if tools %}[{{ tools[0]['function']['name'] }}]{% endif %}{% for message in messages %}"
    "<|{{ message['role'] }}|> {% for call in message.tool_calls or [] %}"
    "{% for key, value in call.function.arguments|items %}{{ key }}={{ value }};{% endfor %}{% endfor %}"
    "{{ message['content'] }} <|end|> {% endfor %}{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
AS_JSON = ITEMS.replace(
    "{% for key, value in call.function.arguments|items %}{{ key }}={{ value }};{% endfor %}",
    "{{ call.function.arguments | tojson }}",
)
ADDED = ITEMS.replace(
    "{% for key, value in call.function.arguments|items %}{{ key }}={{ value }};{% endfor %}",
    "{{ '' + call.function.arguments }}",
)


@pytest.mark.parametrize(
    ("template", "called"),
    [(ITEMS, "town=Rome;n=1;"), (AS_JSON, '{"town": "Rome", "n": 1}'), (ADDED, '{"town": "Rome", "n": 1}')],
)
@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_tools_and_calls_reach_the_template(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, template: str, called: str, written: bool, suffix: str
) -> None:
    tokenizer.chat_template = template

    def talk(**arguments: object) -> list[dict[str, Any]]:
        call = {"function": {"name": "f", "arguments": json.dumps(arguments) if written else arguments}}
        first, answer = turns("q", "")
        return [first, answer | {"tool_calls": [call]}, {"role": "tool", "content": "1"}, turns("", "done")[1]]

    tools = json.dumps(TOOLS) if written else TOOLS
    made = [{"messages": talk(town="Rome", n=1), "tools": tools}, {"messages": talk(left=0.5), "tools": tools}] * 2
    path = jsonl(tmp_path / "rows.jsonl", made)
    if suffix == "parquet":
        from datasets import Dataset

        path = tmp_path / "rows.parquet"
        Dataset.from_list(made).to_parquet(path)
    rows = tokenized(path, tokenizer)
    said = sorted(set(decoded(rows, tokenizer)))
    assert all(text.startswith("[weather]<|user|> q <|end|> <|assistant|> ") for text in said)
    order = [text for text in said if "Rome" in text]
    assert len(said) == 2
    assert f"<|assistant|> {called} <|end|>" in order[0] or suffix == "parquet"  # whose keys are in another order
    assert "None" not in "".join(said)
    assert all(text.startswith(("town=", "n=", "{", "left=")) for text in decoded(rows, tokenizer, learnt=True))


def test_what_the_template_does_not_read_is_named(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    call = {"function": {"name": "f", "arguments": {"town": "Rome"}}}
    talk = [turns("q", "")[0], {"role": "assistant", "content": "", "tool_calls": [call], "name": "bot"}]
    talk += [{"role": "tool", "content": "mild"}, turns("", "It is mild.")[1]]
    path = jsonl(tmp_path / "rows.jsonl", [{"messages": turns("q", "a")}] * 30 + [{"messages": talk, "tools": TOOLS}])
    unread = "not read by the model's chat template, so not trained: "
    assert f"{unread}name, tool_calls, tools" in tokenized(path, tokenizer).notes
    tokenizer.chat_template = ITEMS
    assert f"{unread}name" in tokenized(path, tokenizer).notes


def test_every_column_that_the_template_reads_reaches_it(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "{{ mood }}{% if shout %}!{% endif %}" + CHAT_TEMPLATE
    made = [
        {"messages": turns("q", "a"), "mood": "gay ", "chat_template_kwargs": {"shout": True}, "id": 3},
        {"messages": turns("q", "a"), "mood": None},
    ]
    rows = tokenized(jsonl(tmp_path / "rows.jsonl", made), tokenizer)
    plain = "<|user|> q <|end|> <|assistant|> a <|end|> "
    assert decoded(rows, tokenizer) == sorted([plain, f"gay !{plain}"])
    assert "columns not used: id" in rows.notes


def test_a_column_of_tools_that_is_none_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    made = [{"messages": turns("q", "a"), "tools": "weather"}] * 2
    with pytest.raises(ConfigError, match=r"hold lists of mappings in column 'tools', got .*; in row [12] of"):
        tokenized(jsonl(tmp_path / "rows.jsonl", made), tokenizer)


def test_a_row_that_the_template_refuses_is_numbered(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "{% if messages|length > 2 %}{{ raise_exception('too many') }}{% endif %}" + CHAT_TEMPLATE
    made = [turns("q", "a")] * 30
    made[17] = turns("q", "a", "b", "c")
    with pytest.raises(ConfigError, match=r"in row 18 of .*rows\.jsonl: too many"):
        tokenized(jsonl(tmp_path / "rows.jsonl", [{"messages": row} for row in made]), tokenizer)


@pytest.mark.parametrize("seed", range(10))
def test_another_row_is_held_out_where_the_drawn_one_is_too_long(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, seed: int
) -> None:
    made = [{"prompt": f"p{at} " + 600 * "w" * (at == 5), "completion": f"c{at}"} for at in range(10)]
    path = jsonl(tmp_path / "rows.jsonl", made)
    rows = load_rows(str(path), seed=seed, cache_dir=tmp_path / "cache")
    split = tokenize_rows(rows, tokenizer, max_seq_length=128)
    assert len(split.train) + len(split.eval) == 9
    assert len(split.eval) == 1
    assert split.notes == ("1 examples dropped as their prompt alone has 128 tokens",)


@pytest.mark.parametrize("seed", range(10))
def test_another_row_is_held_out_where_the_drawn_one_has_no_label(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, seed: int
) -> None:
    made = [{"sentence": f"s{at}", "label": None if at == 5 else at % 2} for at in range(10)]
    rows = load_rows(str(jsonl(tmp_path / "rows.jsonl", made)), seed=seed, cache_dir=tmp_path / "cache")
    split = tokenize_rows(rows, tokenizer, max_seq_length=128)
    assert (len(split.train), len(split.eval)) == (8, 1)
    assert "1 examples dropped as they had no label" in split.notes


def test_labels_with_gaps_and_minus_one_are_told(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    labels = ["0.0", "1.0", "0.0", "", "0.0", "1.0"]
    table = "sentence,label\n" + "".join(f"s{at},{label}\n" for at, label in enumerate(labels))
    gaps = tokenized(write(tmp_path / "gaps.csv", table), tokenizer)
    assert gaps.label_names == ("0", "1")
    assert "column 'label' has whole numbers such as 1.0 beside gaps, which are taken for classes" in gaps.notes
    assert "1 examples dropped as they had no label" in gaps.notes


@pytest.mark.parametrize("seed", range(6))
def test_minus_one_is_a_class_whichever_rows_are_held_out(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, seed: int
) -> None:
    made = [{"sentence": f"s{at}", "label": label} for at, label in enumerate([0, 1, -1, 0, 1, 0])]
    rows = load_rows(str(jsonl(tmp_path / "minus.jsonl", made)), seed=seed, cache_dir=tmp_path / "cache")
    minus = tokenize_rows(rows, tokenizer, max_seq_length=128)
    assert "3 classes: -1, 0, 1" in minus.notes
    assert any(note.startswith("-1 is a class") for note in minus.notes)


def test_minus_one_in_a_split_of_its_own_is_no_label_and_it_is_told(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = tmp_path / "both"
    folder.mkdir()
    jsonl(folder / "train.jsonl", [{"sentence": f"s{at}", "label": at % 2} for at in range(6)])
    jsonl(folder / "validation.jsonl", [{"sentence": f"s{at}", "label": label} for at, label in enumerate([0, -1, 1])])
    rows = tokenized(folder, tokenizer)
    assert rows.label_names == ("0", "1")
    assert "1 examples dropped as they had no label (-1 counts as none)" in rows.notes


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["1", "0", "1"], ("0", "1")),
        (["007", "7", "007"], ("007", "7")),
        (["True", "False", "True"], ("False", "True")),
        (["0.5", "1", "2"], ("LABEL_0",)),
        (["1", "x1", "1"], ("1", "x1")),
        (["99999999999999999999", "1", "1"], ("1", "99999999999999999999")),
    ],
)
def test_what_labels_are_is_decided_over_the_whole_file(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, labels: list[str], names: tuple[str, ...]
) -> None:
    table = "sentence,label\n" + "".join(f"s{at},{label}\n" for at, label in enumerate(labels * 2))
    assert tokenized(write(tmp_path / "rows.csv", table), tokenizer).label_names == names


def test_other_columns_in_the_held_out_file_are_told(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    folder = tmp_path / "both"
    folder.mkdir()
    jsonl(folder / "train.jsonl", [{"prompt": "q", "completion": "a"}] * 4)
    jsonl(folder / "test.jsonl", [{"q": "q", "a": "a"}] * 4)
    rows = tokenized(folder, tokenizer)
    assert "test rows are not used, as they have no column completion, prompt" in rows.notes


def test_an_unwritable_cache_is_no_malformed_file(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", [{"text": "a"}] * 2)
    (tmp_path / "cache").write_text("a file", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"be convertible into the cache .*; HF_DATASETS_CACHE moves the cache"):
        load_rows(str(path), seed=0, cache_dir=tmp_path / "cache")


def test_the_split_is_the_one_that_datasets_draws(tmp_path: Path) -> None:
    from datasets import Dataset

    made = [{"text": f"t{at}"} for at in range(57)]
    rows = load_rows(str(jsonl(tmp_path / "rows.jsonl", made)), seed=7, cache_dir=tmp_path / "cache")
    parts = Dataset.from_list(made).train_test_split(test_size=5, seed=7)
    assert rows.train["text"][:] == parts["train"]["text"][:]
    assert rows.eval["text"][:] == parts["test"]["text"][:]
    assert rows.row_numbers is not None
    assert [f"t{number - 1}" for number in rows.row_numbers[0]] == rows.train["text"][:]


@pytest.mark.parametrize(
    ("length", "expected"), [(10, 64), (100, 128), (64, 64), (5000, 1024)], ids=["short", "long", "exact", "capped"]
)
def test_the_length_follows_from_the_data(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, length: int, expected: int
) -> None:
    made = [{"text": (length - 1) * "a"}] * 200 + [{"text": 9000 * "b"}]
    rows = tokenized(jsonl(tmp_path / "rows.jsonl", made), tokenizer, max_seq_length=None)
    assert rows.max_seq_length == expected
    assert max(len(row["input_ids"]) for row in rows.train) <= expected
