"""Whatever a table holds: what is trained of it, decoded, is what Python's own csv and json modules read."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from lsp_ray.data.dataset import load_rows
from lsp_ray.data.tokenize import IGNORED, tokenize_rows
from lsp_ray.errors import ConfigError
from tests.tiny import character_tokenizer

FUZZ = settings(deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TOKENIZER = character_tokenizer()

WORDS = st.sampled_from(["00731", "True", "2.00", "null", "NA", "nan", "-1", "1e5", "", " ", "0x1F", "1,5", '"', "''"])
CHARACTERS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)
TEXTS = WORDS | CHARACTERS | st.text(st.sampled_from('ab ,;\t"\n\r\\é\u2028😀'), max_size=8)
SIZES = st.integers(2, 6) | st.sampled_from([999, 1000, 1001, 2001])  # about what is written at once
SCALARS = TEXTS | st.integers() | st.floats() | st.booleans()
ANYTHING = st.recursive(
    SCALARS | st.none(),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=4), inside, max_size=3),
    max_leaves=5,
)


def one_line(error: ConfigError) -> str:
    assert len(str(error).splitlines()) == 1
    return str(error)


def trained(path: Path) -> list[tuple[str, str]] | str:
    """Prompts and completions that are trained, sorted, or the line that refuses them."""
    try:
        rows = load_rows(str(path), seed=0, cache_dir=path.parent / "cache")
        tokenized = tokenize_rows(rows, TOKENIZER, max_seq_length=4096)
    except ConfigError as error:
        return one_line(error)
    found = []
    for row in [*tokenized.train, *tokenized.eval]:
        num_prompt = next(at for at, label in enumerate(row["labels"]) if label != IGNORED)
        ids = row["input_ids"]
        assert ids[-1] == TOKENIZER.eos_token_id
        found.append((str(TOKENIZER.decode(ids[:num_prompt])), str(TOKENIZER.decode(ids[num_prompt:-1]))))
    return sorted(found)


def repeated(rows: Sequence[Any], size: int) -> list[Any]:
    """So many of them, the first ones last too, so that what is odd may stand in any block."""
    return list(islice(cycle(rows), size))


def pairs(values: st.SearchStrategy[Any]) -> st.SearchStrategy[list[tuple[Any, Any]]]:
    # a prompt without a token would leave its answer's first one without a loss
    return st.lists(st.tuples(TEXTS.map("q{}".format), values), min_size=1, max_size=5)


@settings(FUZZ, max_examples=60)
@given(
    rows=pairs(TEXTS),
    size=SIZES,
    quoting=st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL, csv.QUOTE_NONNUMERIC]),
    end=st.sampled_from(["\n", "\r\n"]),
    suffix=st.sampled_from(["csv", "tsv"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig"]),
    other=st.none() | TEXTS,
)
def test_a_table_that_csv_writes_is_trained_as_csv_reads_it(
    tmp_path: Path,
    rows: list[tuple[str, str]],
    size: int,
    quoting: Any,
    end: str,
    suffix: str,
    encoding: str,
    other: str | None,
) -> None:
    path = tmp_path / f"rows.{suffix}"
    extra = [] if other is None else [other]
    with path.open("w", encoding=encoding, newline="") as file:
        writer = csv.writer(file, quoting=quoting, lineterminator=end, delimiter="\t" if suffix == "tsv" else ",")
        writer.writerow(["prompt", "completion", *("more" for _ in extra)])
        writer.writerows([*row, *extra] for row in repeated(rows, size))
    with path.open(encoding="utf-8-sig", newline="") as file:
        read = [row[:2] for row in csv.reader(file, delimiter="\t" if suffix == "tsv" else ",")][1:]
    found = trained(path)
    if isinstance(found, list):
        assert found == sorted(map(tuple, read))
    else:  # csv itself leaves a line end other than its own without quotes, and reads it as one
        assert "well-formed csv" in found
        assert [tuple(row) for row in read] != repeated(rows, size)


@settings(FUZZ, max_examples=60)
@given(
    body=st.text(st.sampled_from('a1," \n\r'), max_size=30),
    size=st.integers(1, 400),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "latin-1", "utf-16"]),
)
@example(body='a,"b\n', size=1, encoding="utf-8")
@example(body="é,b\n", size=2, encoding="latin-1")
@example(body='q,"a ""b""\r\nc"\r\n', size=400, encoding="utf-8-sig")
def test_any_text_with_commas_is_trained_as_csv_reads_it_or_refused(
    tmp_path: Path, body: str, size: int, encoding: str
) -> None:
    path = tmp_path / "rows.csv"
    text = "prompt,completion\n" + body * size
    path.write_bytes(text.encode(encoding))
    found = trained(path)
    read = [tuple(row) for row in csv.reader(io.StringIO(text, newline="")) if row][1:]
    taught = [row for row in read if any(row)]  # of nothing at all no token has one before it
    if isinstance(found, list):
        assert found == sorted(taught)
    elif encoding.startswith("utf-8") or (encoding == "latin-1" and text.isascii()):
        assert "well-formed csv" in found or len(taught) < 2
    else:
        assert "UTF-8" in found


def written(value: object) -> str:
    return ("true" if value else "false") if isinstance(value, bool) else str(value)


@settings(FUZZ, max_examples=100)
@given(
    rows=pairs(SCALARS | st.none()),
    others=st.lists(ANYTHING, min_size=1, max_size=5),
    size=SIZES,
    ascii_only=st.booleans(),
    suffix=st.sampled_from(["jsonl", "json"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig"]),
    odd_last=st.booleans(),
)
def test_any_json_is_trained_as_json_reads_it_or_refused_by_its_row(
    tmp_path: Path,
    rows: list[tuple[str, object]],
    others: list[object],
    size: int,
    ascii_only: bool,
    suffix: str,
    encoding: str,
    odd_last: bool,
) -> None:
    made: list[dict[str, object]] = [
        {"prompt": prompt, "completion": completion, "more": other}
        for (prompt, completion), other in zip(repeated(rows, size), cycle(others), strict=False)
    ]
    if odd_last:
        made[-1] = {"late": [1], **made[-1]}
    path = tmp_path / f"rows.{suffix}"
    texts = [json.dumps(row, ensure_ascii=ascii_only) for row in made]
    path.write_text("\n".join(texts) if suffix == "jsonl" else f"[{','.join(texts)}]", encoding=encoding)
    as_written: dict[str, Any] = {"parse_float": str, "parse_int": str, "parse_constant": str}
    read = [json.loads(text, **as_written) for text in texts]
    missing = [at for at, row in enumerate(read, start=1) if row["completion"] is None]
    found = trained(path)
    if missing:
        assert isinstance(found, str)
        assert f"row {missing[0]} of " in found
    else:
        assert found == sorted((row["prompt"], written(row["completion"])) for row in read)


@settings(FUZZ, max_examples=30)
@given(at=st.integers(0, 9), value=st.lists(SCALARS, max_size=2) | st.just("\ud800") | st.just({"a": 1}))
def test_a_value_that_is_no_text_is_refused_by_its_row(tmp_path: Path, at: int, value: object) -> None:
    made = [{"prompt": "q", "completion": value if index == at else "a"} for index in range(10)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    found = trained(path)
    assert isinstance(found, str)
    assert f"in row {at + 1} of " in found


@settings(FUZZ, max_examples=40)
@given(
    prompts=st.lists(TEXTS.map("q{}".format), min_size=1, max_size=4),
    completions=st.lists(TEXTS, min_size=1, max_size=4)
    | st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=4)
    | st.lists(st.floats(), min_size=1, max_size=4)
    | st.lists(st.booleans(), min_size=1, max_size=4),
    size=st.integers(2, 6),
)
def test_any_parquet_file_is_trained_as_pyarrow_reads_it(
    tmp_path: Path, prompts: list[str], completions: list[object], size: int
) -> None:
    assume(completions)
    columns = {"prompt": repeated(prompts, size), "completion": repeated(completions, size), "more": [None] * size}
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table(columns), path)
    assert trained(path) == sorted(zip(columns["prompt"], map(written, columns["completion"]), strict=True))
