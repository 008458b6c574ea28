"""Whatever bytes a file has: it loads, or ends in one line of our own."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from lsp_ray.data.dataset import load_rows
from lsp_ray.data.tokenize import tokenize_rows
from lsp_ray.errors import ConfigError
from lsp_ray.projection.projector_file import FILE_NAME, load_projectors, save_projectors
from lsp_ray.projection.sparse_projector import ProjectorSizes, SparseProjector
from tests.damage import damaged
from tests.linears import balanced, generator
from tests.tiny import tiny_tokenizer

# no deadline and no database: the machine may be busy, and the cases must not depend on earlier runs
FUZZ = settings(deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TOKENIZER = tiny_tokenizer()

JSONL = b"".join(
    json.dumps(row).encode() + b"\n"
    for row in (
        {"text": "w1 w2", "label": 0},
        {"text": "w3 \u00e9", "label": 1},
        {"text": "w4", "label": 0},
    )
)
MESSAGES = b'{"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]}\n' * 3
JSON_LIST = b'[{"text": "w1"}, {"text": "w2"}, {"text": "w3"}]'
CSV = b'text,label\nw1,0\n"w2, w3",1\nw4,0\n'


def parquet(**columns: list[object]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file, compression="none")
    return file.getvalue()


PARQUET = parquet(text=["w1", "w2", "w3"], label=[0, 1, 0])


@contextmanager
def at_most_one_line() -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        if len(str(error).splitlines()) != 1:
            raise AssertionError(f"{len(str(error).splitlines())} lines") from error


def loads_or_ends_in_one_line(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with at_most_one_line():
        rows = load_rows(str(path), seed=0, cache_dir=path.parent / "cache")
        tokenized = tokenize_rows(rows, TOKENIZER, max_seq_length=16)
        assert len(tokenized.train)
        assert len(tokenized.eval)


@settings(FUZZ, max_examples=150)
@given(content=damaged(JSONL, MESSAGES))
@example(content=b"null\nnull\n")
@example(content=b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n")
@example(content=b'{"text": ' + b"9" * 5000 + b"}\n")
def test_any_json_lines_load_or_end_in_one_line(tmp_path: Path, content: bytes) -> None:
    loads_or_ends_in_one_line(tmp_path / "rows.jsonl", content)


@settings(FUZZ, max_examples=80)
@given(content=damaged(JSON_LIST, JSONL))
@example(content=b"null")
@example(content=b'[null, {"text": "w1"}]')
@example(content=b"[" * 200_000)
def test_any_json_loads_or_ends_in_one_line(tmp_path: Path, content: bytes) -> None:
    loads_or_ends_in_one_line(tmp_path / "rows.json", content)


@settings(FUZZ, max_examples=80)
@given(content=damaged(CSV))
def test_any_csv_loads_or_ends_in_one_line(tmp_path: Path, content: bytes) -> None:
    loads_or_ends_in_one_line(tmp_path / "rows.csv", content)


@settings(FUZZ, max_examples=150)
@given(content=damaged(PARQUET))
def test_any_parquet_loads_or_ends_in_one_line(tmp_path: Path, content: bytes) -> None:
    loads_or_ends_in_one_line(tmp_path / "rows.parquet", content)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=4), inside, max_size=3),
    max_leaves=6,
)
COLUMNS = st.sampled_from(["text", "prompt", "completion", "messages", "label", "sentence", "sentence1", "sentence2"])


@settings(FUZZ, max_examples=100)
@given(rows=st.lists(st.dictionaries(COLUMNS, JSON_VALUES, min_size=1, max_size=3), min_size=2, max_size=5))
def test_rows_of_any_types_load_or_end_in_one_line(tmp_path: Path, rows: list[dict[str, object]]) -> None:
    content = "".join(json.dumps(row) + "\n" for row in rows).encode("utf-8", "surrogatepass")
    loads_or_ends_in_one_line(tmp_path / "rows.jsonl", content)


@settings(FUZZ, max_examples=60)
@given(
    metadata=JSON_VALUES.map(lambda value: {"info": {"features": {"text": value}}})
    | JSON_VALUES
    | st.sampled_from(["Image", "Audio", "ClassLabel", "List"]).map(
        lambda kind: {"info": {"features": {"text": {"_type": kind}}}}
    )
)
def test_any_metadata_of_a_parquet_file_load_or_end_in_one_line(tmp_path: Path, metadata: object) -> None:
    table = pa.table({"text": ["/etc/passwd"] * 3}).replace_schema_metadata({"huggingface": json.dumps(metadata)})
    path = tmp_path / "rows.parquet"
    pq.write_table(table, path)
    with at_most_one_line():
        rows = load_rows(str(path), seed=0, cache_dir=tmp_path / "cache")
        assert {*rows.train["text"], *rows.eval["text"]} == {"/etc/passwd"}  # a text, no file to read


SIZES = ProjectorSizes(shape=(24, 16), dims=(8, 6), nnz_per_row=2)
NEEDED = {"a": SIZES, "b": SIZES}


@pytest.fixture(scope="module")
def projectors(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("saved") / FILE_NAME
    first, second = (balanced(SparseProjector.random(SIZES, generator(seed))) for seed in range(2))
    save_projectors(file, {"a": first, "b": SparseProjector(second.left, first.right)})
    return file.read_bytes()


def projectors_load_or_end_in_one_line(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with at_most_one_line():
        for projector in load_projectors(file, NEEDED).values():
            assert projector.sizes == SIZES
            assert projector.left.project(torch.zeros(1, 24)).shape == (1, 8)


@settings(FUZZ, max_examples=400)
@given(data=st.data())
def test_any_projector_file_loads_or_ends_in_one_line(tmp_path: Path, projectors: bytes, data: st.DataObject) -> None:
    projectors_load_or_end_in_one_line(tmp_path / FILE_NAME, data.draw(damaged(projectors)))


DTYPES = st.sampled_from(
    [torch.int16, torch.int32, torch.int64, torch.float32, torch.bfloat16, torch.bool, torch.uint8]
)
TENSORS = st.builds(
    lambda shape, dtype, fill: torch.full(shape, fill).to(dtype),
    st.lists(st.integers(0, 25), max_size=3).map(tuple) | st.sampled_from([(24, 2), (16, 2), (24,), (16,)]),
    DTYPES,
    st.integers(-3, 9),
)
KEYS = [f"{name}.{side}.{part}" for name in "ab" for side in ("left", "right") for part in ("value", "scale")]
WHOLE = {f"{name}.{side}.value": torch.ones(rows, 2) for name in "ab" for side, rows in (("left", 24), ("right", 16))}
ENTRIES = st.tuples(st.sampled_from(["a", "b", "c"]) | JSON_VALUES, st.just(4) | JSON_VALUES, st.just(3) | JSON_VALUES)


@settings(FUZZ, max_examples=400)
@given(
    tensors=st.dictionaries(st.sampled_from(KEYS), TENSORS, max_size=3),
    linears=st.fixed_dictionaries({"a": ENTRIES | JSON_VALUES, "b": ENTRIES}) | JSON_VALUES,
)
@example(tensors={}, linears={"a": ("a", 4.0, 3), "b": ("a", 4, 3)})
@example(tensors={}, linears={"a": [], "b": ("a", 4, 3)})
def test_tensors_of_any_shape_and_type_are_projectors_or_end_in_one_line(
    tmp_path: Path, tensors: dict[str, torch.Tensor], linears: object
) -> None:
    metadata = {"format": "orthonormal blocks", "linears": json.dumps(linears)}
    projectors_load_or_end_in_one_line(tmp_path / FILE_NAME, save(WHOLE | tensors, metadata=metadata))


@settings(FUZZ, max_examples=60)
@given(metadata=st.dictionaries(st.sampled_from(["format", "linears"]), st.text(max_size=5)) | st.none())
@example(metadata={"format": "orthonormal blocks"})
@example(metadata={"format": "orthonormal blocks", "linears": "[" * 200_000})
def test_any_metadata_end_in_one_line(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    projectors_load_or_end_in_one_line(tmp_path / FILE_NAME, save(WHOLE, metadata=metadata))


@pytest.mark.parametrize("header_bytes", [0, 2**31, 2**63, 2**64 - 1])
def test_a_header_of_any_claimed_length_ends_in_one_line(tmp_path: Path, header_bytes: int) -> None:
    file = tmp_path / FILE_NAME
    file.write_bytes(header_bytes.to_bytes(8, "little") + b'{"a":1}')
    with pytest.raises(ConfigError, match="intact projectors"):
        load_projectors(file, NEEDED)


@pytest.mark.parametrize("shape", ["[4611686018427387904, 4]", "[-1, 2]", "[24, 2, 99999999999999999999]"])
def test_a_tensor_of_any_claimed_size_ends_in_one_line(tmp_path: Path, shape: str) -> None:
    header = f'{{"a.left.value": {{"dtype": "BF16", "shape": {shape}, "data_offsets": [0, 96]}}}}'.encode()
    file = tmp_path / FILE_NAME
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(96))
    with pytest.raises(ConfigError, match="intact projectors"):
        load_projectors(file, NEEDED)
