"""Rows of files and folders, in the shapes that people have, and one line where they have another."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from lsp_ray.config import BUILT_IN_DATASET
from lsp_ray.data.dataset import Rows, Shape, load_rows
from lsp_ray.errors import ConfigError

Load = Callable[[Path], Rows]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    cache_dir = tmp_path_factory.mktemp("cache")
    return lambda path: load_rows(str(path), seed=0, cache_dir=cache_dir)


def write_jsonl(path: Path, rows: Sequence[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def texts(*names: str) -> list[dict[str, str]]:
    return [{"text": name} for name in names]


SHAPES = [
    ({"text": "a"}, Shape.TEXT, {"text"}),
    ({"prompt": "a", "completion": "b", "id": 3}, Shape.PROMPT_COMPLETION, {"prompt", "completion"}),
    ({"question": "a", "answer": "b"}, Shape.PROMPT_COMPLETION, {"prompt", "completion"}),
    ({"messages": [{"role": "user", "content": "a"}]}, Shape.MESSAGES, {"messages"}),
    ({"instruction": "a", "output": "b", "text": "ab"}, Shape.ALPACA, {"instruction", "output"}),
    ({"instruction": "a", "input": "i", "output": "b"}, Shape.ALPACA, {"instruction", "input", "output"}),
    ({"sentence": "a", "label": 1}, Shape.SENTENCE, {"sentence", "label"}),
    ({"text": "a", "label": "good"}, Shape.SENTENCE, {"sentence", "label"}),
    ({"sentence1": "a", "sentence2": "b", "label": 0}, Shape.SENTENCE_PAIR, {"sentence1", "sentence2", "label"}),
    ({"premise": "a", "hypothesis": "b", "label": 0}, Shape.SENTENCE_PAIR, {"sentence1", "sentence2", "label"}),
]


@pytest.mark.parametrize(("row", "shape", "columns"), SHAPES)
def test_the_columns_tell_the_shape(
    load: Load, tmp_path: Path, row: dict[str, object], shape: Shape, columns: set[str]
) -> None:
    rows = load(write_jsonl(tmp_path / "rows.jsonl", [row] * 4))
    assert rows.shape is shape
    assert set(rows.train.column_names) == set(rows.eval.column_names) == columns


@pytest.mark.parametrize("shape", list(Shape))
def test_only_rows_with_a_label_are_a_classifiers(shape: Shape) -> None:
    assert (shape.task == "sequence_classification") == shape.value.startswith("sentence")


def test_a_single_file_is_split_by_the_seed(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", texts(*map(str, range(50))))
    first, again, other = (load_rows(str(path), seed=seed, cache_dir=tmp_path / "cache") for seed in (1, 1, 2))
    assert first.eval["text"][:] == again.eval["text"][:] != other.eval["text"][:]
    assert len(first.eval) == 5
    assert sorted([*first.train["text"], *first.eval["text"]]) == sorted(map(str, range(50)))


@pytest.mark.parametrize(
    ("train", "held_out"),
    [
        ("train.jsonl", "validation.jsonl"),
        ("train-00000-of-00001.jsonl", "dev-00000-of-00001.jsonl"),
        ("my_train.jsonl", "my_test.jsonl"),
        ("data.jsonl", "val.jsonl"),
        ("train/part.jsonl", "test/part.jsonl"),
    ],
)
def test_files_of_a_folder_are_split_by_their_names(load: Load, tmp_path: Path, train: str, held_out: str) -> None:
    write_jsonl(tmp_path / train, texts("a", "b", "c"))
    write_jsonl(tmp_path / held_out, texts("d"))
    rows = load(tmp_path)
    assert list(rows.train["text"]) == ["a", "b", "c"]
    assert list(rows.eval["text"]) == ["d"]


def test_validation_is_held_out_rather_than_test(load: Load, tmp_path: Path) -> None:
    for name in ("test", "train", "validation"):
        write_jsonl(tmp_path / f"{name}.jsonl", texts(name))
    assert list(load(tmp_path).eval["text"]) == ["validation"]


@pytest.mark.parametrize(
    "test_row", [{"sentence": "d", "label": -1}, {"sentence": "d", "label": None}, {"sentence": "d"}]
)
def test_a_test_split_without_labels_is_not_held_out(load: Load, tmp_path: Path, test_row: dict[str, object]) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"sentence": name, "label": 1} for name in "abc"])
    write_jsonl(tmp_path / "test.jsonl", [test_row])
    rows = load(tmp_path)
    assert len(rows.train) == 2
    assert "d" not in rows.eval["sentence"]


def test_the_case_of_a_suffix_does_not_matter(load: Load, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "Train.JSONL", texts("a", "b"))
    write_jsonl(tmp_path / "Test.Jsonl", texts("c"))
    assert list(load(tmp_path).eval["text"]) == ["c"]


def test_a_home_of_nobody_ends_in_one_line(load: Load) -> None:
    with pytest.raises(ConfigError, match="dataset must be a file or folder that can be read"):
        load(Path("~nobody-of-this-name/rows.jsonl"))


def test_other_files_beside_a_train_file_are_no_rows(load: Load, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", texts("a", "b"))
    (tmp_path / "dataset_info.json").write_text('{"version": 1}', encoding="utf-8")
    (tmp_path / "README.md").write_text("# Texts", encoding="utf-8")
    (tmp_path / ".hidden.jsonl").write_text("no JSON", encoding="utf-8")
    assert len(load(tmp_path).train) == 1


def test_files_of_one_split_are_joined(load: Load, tmp_path: Path) -> None:
    for part in "abc":
        write_jsonl(tmp_path / f"{part}.jsonl", texts(part, part * 2))
    rows = load(tmp_path)
    assert sorted([*rows.train["text"], *rows.eval["text"]]) == ["a", "aa", "b", "bb", "c", "cc"]


def test_a_json_list_a_csv_a_tsv_and_a_parquet_file_give_equal_rows(load: Load, tmp_path: Path) -> None:
    columns = {"prompt": ["NA", "b, c", "null"], "completion": ["x", "y", "z"]}
    table = Dataset.from_dict(columns)
    table.to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "rows.json").write_text(json.dumps(list(table)), encoding="utf-8")
    (tmp_path / "rows.csv").write_text('prompt,completion\nNA,x\n"b, c",y\nnull,z\n', encoding="utf-8")
    (tmp_path / "rows.tsv").write_text("prompt\tcompletion\nNA\tx\nb, c\ty\nnull\tz\n", encoding="utf-8")
    for suffix in ("parquet", "json", "csv", "tsv"):
        rows = load(tmp_path / f"rows.{suffix}")
        found = sorted((row["prompt"], row["completion"]) for row in [*rows.train, *rows.eval])
        assert found == sorted(zip(*columns.values(), strict=True)), suffix


def test_numbers_in_a_text_column_are_their_text(load: Load, tmp_path: Path) -> None:
    (tmp_path / "sums.csv").write_text("prompt,completion\n1+1,2\n2+2,4\n", encoding="utf-8")
    rows = load(tmp_path / "sums.csv")
    assert {*rows.train["completion"], *rows.eval["completion"]} == {"2", "4"}


def test_a_null_input_of_an_instruction_is_empty(load: Load, tmp_path: Path) -> None:
    made = [{"instruction": "a", "input": given, "output": "b"} for given in (None, None, "x")]
    rows = load(write_jsonl(tmp_path / "alpaca.jsonl", made))
    assert sorted([*rows.train["input"], *rows.eval["input"]]) == ["", "", "x"]


def test_class_names_survive(load: Load, tmp_path: Path) -> None:
    features = Features({"sentence": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    Dataset.from_dict({"sentence": ["a", "b"], "label": [0, 1]}, features=features).to_parquet(tmp_path / "t.parquet")
    assert load(tmp_path / "t.parquet").train.features["label"].names == ["bad", "good"]


def test_a_name_with_glob_characters_is_a_plain_name(load: Load, tmp_path: Path) -> None:
    assert len(load(write_jsonl(tmp_path / "a[1]*.jsonl", texts("a", "b"))).train) == 1


def test_nothing_is_written_beside_the_users_file(load: Load, tmp_path: Path) -> None:
    load(write_jsonl(tmp_path / "rows.jsonl", texts("a", "b", "c")))
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_byte_order_mark_is_no_text(load: Load, tmp_path: Path) -> None:
    for name, text in (("rows.jsonl", '{"text": "a"}\n{"text": "b"}\n'), ("rows.csv", "text\na\nb\n")):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        rows = load(tmp_path / name)
        assert {*rows.train["text"], *rows.eval["text"]} == {"a", "b"}, name


def test_a_changed_file_is_read_anew(load: Load, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", texts("a", "b"))
    load(path)
    rows = load(write_jsonl(path, texts("c", "d")))
    assert {*rows.train["text"], *rows.eval["text"]} == {"c", "d"}


def test_the_built_in_data_set_needs_no_file() -> None:
    rows = load_rows(BUILT_IN_DATASET, seed=0)
    assert rows.shape is Shape.PROMPT_COMPLETION
    assert len(rows.train) > 8 * len(rows.eval) > 0
    assert not set(rows.train["prompt"]) & set(rows.eval["prompt"])


FAULTY_FILES = [
    ("empty.jsonl", b"", "have rows"),
    ("blank.jsonl", b"\n\n", "have rows"),
    ("empty.json", b"[]", "have rows"),
    ("empty.csv", b"", "have rows"),
    ("header.csv", b"text\n", "have rows"),
    ("cut.jsonl", b'{"text": "a"}\n{"text": \n', "line 2"),
    ("plain.jsonl", b"once upon a time\n", "line 1"),
    ("ragged.csv", b"text,label\na,1\nb,2,3\n", "well-formed csv"),
    ("latin.jsonl", '{"text": "é"}\n'.encode("latin-1"), "UTF-8"),
    ("latin.csv", "text\né\n".encode("latin-1"), "UTF-8"),
    ("broken.parquet", b"PAR1", "well-formed parquet"),
    ("rows.xlsx", b"PK", "known format"),
    ("one.jsonl", b'{"text": "a"}\n', "at least 2 rows"),
    ("other.jsonl", b'{"body": "a", "title": "b"}\n', "'body/title'"),
    ("null.jsonl", b'{"text": "a"}\n{"text": null}\n', "row 2"),
    ("nulls.jsonl", b'{"text": null}\n{"text": null}\n', "row 1"),
    ("list.jsonl", b'{"text": ["a"]}\n{"text": ["b"]}\n', "hold text in column 'text'"),
    ("nothing.jsonl", b"null\nnull\n", "line 1: no object"),
    ("numbers.json", b"[1, 2]", "well-formed json"),
    ("deep.jsonl", b'{"text": "a"}\n{"text": ' + b"[" * 100 + b"]" * 100 + b"}\n", "line 2: nested more than 64 deep"),
    ("zeros.csv", b"text\na\0b\nc\n", "line 2: a NUL character"),
    ("packed.csv", gzip.compress(b"text\na\nb\n", mtime=0), "UTF-8"),
]


@pytest.mark.parametrize(("name", "content", "said"), FAULTY_FILES)
def test_a_faulty_file_ends_in_one_line_that_names_it(
    load: Load, tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / name)
    assert caught.value.field == "dataset"
    assert said in str(caught.value)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_line_of_100_megabytes_ends_in_one_line(load: Load, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "a"}\n{"text": "' + b"a " * 50_000_000 + b'"}\n')
    with pytest.raises(
        ConfigError, match=r"lines of at most 67108864 characters, got .*rows\.jsonl'; line 2 is longer"
    ):
        load(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_text_that_would_take_minutes_to_tokenise_is_refused(load: Load, tmp_path: Path, suffix: str) -> None:
    table = Dataset.from_dict({"text": ["a", "b " * 5_000_001]})
    getattr(table, f"to_{suffix}")(tmp_path / f"rows.{suffix}")
    with pytest.raises(ConfigError, match="at most 10000000 bytes of text in a row of column 'text', got 10000002"):
        load(tmp_path / f"rows.{suffix}")


def test_a_faulty_file_of_a_folder_is_named(load: Load, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", texts("a"))
    (tmp_path / "b.jsonl").write_text("no JSON\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"b\.jsonl.*line 1"):
        load(tmp_path)


def test_a_parquet_file_without_rows_is_refused(load: Load, tmp_path: Path) -> None:
    Dataset.from_dict({"text": []}).to_parquet(tmp_path / "none.parquet")
    with pytest.raises(ConfigError, match=r"have rows, got .*none\.parquet"):
        load(tmp_path / "none.parquet")


def test_the_permitted_columns_are_listed(load: Load, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"messages, .*prompt/completion, .*, text"):
        load(write_jsonl(tmp_path / "rows.jsonl", [{"body": "a"}]))


def test_a_folder_without_rows_names_the_formats(load: Load, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\.jsonl.*\.parquet"):
        load(tmp_path)


def test_a_split_in_two_formats_is_refused(load: Load, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", texts("a"))
    (tmp_path / "b.csv").write_text("text\nb\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="one known format"):
        load(tmp_path)


@settings(max_examples=15, deadline=None)
@given(num_rows=st.integers(2, 300), seed=st.integers(0, 2**31))
def test_every_row_is_in_exactly_one_split(tmp_path_factory: pytest.TempPathFactory, num_rows: int, seed: int) -> None:
    folder = tmp_path_factory.mktemp("rows")
    path = write_jsonl(folder / "rows.jsonl", texts(*map(str, range(num_rows))))
    rows = load_rows(str(path), seed=seed, cache_dir=folder / "cache")
    assert sorted(map(int, [*rows.train["text"], *rows.eval["text"]])) == list(range(num_rows))
    assert 1 <= len(rows.eval) <= max(1, num_rows // 10)
