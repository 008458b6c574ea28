from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lsp_ray.config import LspConfig, RunConfig
from lsp_ray.errors import ConfigError
from lsp_ray.runtime.actors.thread_workers import ThreadWorkers
from lsp_ray.runtime.checkpoints.checkpoint import FACTS, checkpoints
from lsp_ray.runtime.checkpoints.saved_run import find_checkpoint, read_saved_run, with_saved_choices
from lsp_ray.runtime.prepare.job import Job, resumed
from tests.tiny_jobs import run_on_threads, tiny_job

LINE = r"resume_from_checkpoint must (hold a whole checkpoint \(.+\)|be last or the checkpoint-N folder .*), got '.+'"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    run_on_threads(tiny_job(folder, max_steps=2, save_steps=1, save_total_limit=None), folder / "out")
    return folder / "out" / "checkpoint-1"


@contextmanager
def changed(path: Path, content: bytes) -> Iterator[None]:
    """Within the context the file has other content; a checkpoint may be of hypothesis' many examples."""
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


def complaint(folder: Path) -> str:
    """What is wrong with a checkpoint; empty if nothing is."""
    try:
        read_saved_run(folder)
    except ConfigError as error:
        return str(error)
    return ""


def test_a_whole_checkpoint_is_read_and_found_as_the_last(saved: Path) -> None:
    assert read_saved_run(saved).step == 1
    assert list(checkpoints(saved.parent)) == [1, 2]
    assert find_checkpoint("last", saved.parent) == saved.with_name("checkpoint-2")


def test_a_run_that_goes_on_takes_what_was_chosen_where_it_leaves_that_open(saved: Path) -> None:
    open_run = RunConfig(lsp=LspConfig(subspace_dim="auto"))
    config = with_saved_choices(open_run, saved)
    before = read_saved_run(saved).config
    assert config.lsp.subspace_dim == 16
    assert (config.max_steps, config.max_seq_length) == (before["max_steps"], before["max_seq_length"])
    assert with_saved_choices(replace(open_run, num_train_epochs=2.0, max_seq_length=9), saved).max_steps is None
    for chosen in (False, True):
        other = re.sub(rb'"bf16": \w+', b'"bf16": ' + str(chosen).lower().encode(), (saved / FACTS).read_bytes())
        with changed(saved / FACTS, other):
            assert with_saved_choices(open_run, saved).bf16 is chosen
            assert with_saved_choices(replace(open_run, bf16=not chosen), saved).bf16 is not chosen
    other = (saved / FACTS).read_bytes().replace(b'"subspace_dim": 16', b'"subspace_dim": []')
    with changed(saved / FACTS, other), pytest.raises(ConfigError, match=rf"^{LINE}$"):
        with_saved_choices(open_run, saved)


def test_a_run_without_a_checkpoint_has_no_last_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"resume_from_checkpoint must name a checkpoint: there is none in .*'last'"):
        find_checkpoint("last", tmp_path)


def test_what_is_no_checkpoint_is_one_line(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(ConfigError, match=rf"^{LINE}$"):
            read_saved_run(path)


FILES = ("model.safetensors", "config.json", "lsp_state/moments-0.safetensors", "lsp_state/lsp_projectors.safetensors")


@given(name=st.sampled_from(FILES), at=st.integers(0), byte=st.integers(1, 255))
def test_any_flipped_byte_of_any_file_is_found_and_named(saved: Path, name: str, at: int, byte: int) -> None:
    content = bytearray((saved / name).read_bytes())
    content[at % len(content)] ^= byte
    with (
        changed(saved / name, bytes(content)),
        pytest.raises(ConfigError, match=rf"^resume_from_checkpoint must hold a whole .*{name} is damaged"),
    ):
        read_saved_run(saved)


@given(name=st.sampled_from(FILES), length=st.integers(0))
def test_any_truncated_file_is_found_and_named(saved: Path, name: str, length: int) -> None:
    content = (saved / name).read_bytes()
    with (
        changed(saved / name, content[: length % len(content)]),
        pytest.raises(ConfigError, match=rf"{name} is damaged"),
    ):
        read_saved_run(saved)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(content=JSON)
def test_random_facts_are_one_line(saved: Path, content: Any) -> None:
    with changed(saved / FACTS, json.dumps(content).encode()), pytest.raises(ConfigError, match=rf"^{LINE}$"):
        read_saved_run(saved)


@given(at=st.integers(0), byte=st.integers(0, 255), cut=st.booleans())
def test_damaged_facts_are_read_or_one_line(saved: Path, at: int, byte: int, cut: bool) -> None:
    content = bytearray((saved / FACTS).read_bytes())
    at %= len(content)
    content[at:] = b"" if cut else bytes([byte]) + content[at + 1 :]
    with changed(saved / FACTS, bytes(content)):
        assert re.fullmatch(rf"|{LINE}", complaint(saved))


@given(name=st.sampled_from(["step", "config", "staleness", "files", "data_digest", "device", "format"]), value=JSON)
def test_facts_of_another_kind_are_read_or_one_line(saved: Path, name: str, value: Any) -> None:
    facts = {**json.loads((saved / FACTS).read_text()), name: value}
    with changed(saved / FACTS, json.dumps(facts).encode()):
        assert re.fullmatch(rf"|{LINE}", complaint(saved))


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "lsp_state/../../secret", "missing.safetensors"])
def test_a_name_that_leads_out_of_the_checkpoint_or_nowhere_is_refused(saved: Path, name: str) -> None:
    facts = json.loads((saved / FACTS).read_text())
    facts["files"][name] = [0, 0]
    with changed(saved / FACTS, json.dumps(facts).encode()), pytest.raises(ConfigError, match=r"outside|missing"):
        read_saved_run(saved)


def test_an_index_that_names_weights_elsewhere_is_refused(saved: Path) -> None:
    index = saved / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "../../secret.safetensors"}}))
    try:
        with pytest.raises(ConfigError, match=r"names '\.\./\.\./secret\.safetensors'"):
            read_saved_run(saved)
    finally:
        index.unlink()


def forged(saved: Path, tmp_path: Path, name: str, **changes: torch.Tensor | None) -> tuple[Job, Path]:
    """A checkpoint with other tensors in it and checksums that agree; None removes a tensor."""
    folder = shutil.copytree(saved, tmp_path / "forged")
    tensors = {**load_file(folder / name), **changes}
    save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, folder / name)
    content = (folder / name).read_bytes()
    facts = json.loads((folder / FACTS).read_text())
    facts["files"][name] = [len(content), zlib.crc32(content)]
    (folder / FACTS).write_text(json.dumps(facts))
    return resumed(tiny_job(saved.parent.parent, max_steps=2), folder), folder


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("0.exp_avg", torch.zeros(3), r"layer 0 has exp_avg of \(3,\) float32, not \(\d+,\) float32"),
        ("0.exp_avg_sq", None, r"0\.exp_avg_sq"),
        ("0.step", torch.tensor(7.0), r"layer 0 has had 7 updates in 1 steps"),
    ],
)
def test_moments_of_another_run_are_one_line(
    saved: Path, tmp_path: Path, key: str, value: torch.Tensor | None, message: str
) -> None:
    job, _ = forged(saved, tmp_path, "lsp_state/moments-0.safetensors", **{key: value})
    workers = ThreadWorkers(job)
    try:
        with pytest.raises(ConfigError, match=rf"hold a whole checkpoint \(.*{message}.*\), got '.*forged'"):
            workers.setup(lambda _line: None)
    finally:
        workers.close()


def test_weights_that_are_missing_are_one_line(saved: Path, tmp_path: Path) -> None:
    job, _ = forged(saved, tmp_path, "model.safetensors", **{"model.norm.weight": None})
    workers = ThreadWorkers(job)
    try:
        with pytest.raises(ConfigError, match=r"hold all weights .*got '.*forged'; without model\.norm\.weight"):
            workers.setup(lambda _line: None)
    finally:
        workers.close()
