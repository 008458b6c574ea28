from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lsp_ray.errors import ConfigError
from lsp_ray.projection.projector_file import FILE_NAME, ProjectedShape, load_projectors, save_projectors
from lsp_ray.projection.sparse_projector import SparseProjector

SHAPE, DIM = (24, 16), 8
NEEDED = {"a": ProjectedShape(shape=SHAPE, dim=DIM), "b": ProjectedShape(shape=SHAPE, dim=DIM)}


def projector(seed: int) -> SparseProjector:
    return SparseProjector.random(SHAPE, DIM, 2, torch.Generator().manual_seed(seed))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_projectors(tmp_path / FILE_NAME, {"a": projector(0), "b": projector(1)})
    return tmp_path / FILE_NAME


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projectors_come_back_as_they_were(tmp_path: Path, dtype: torch.dtype) -> None:
    before = {name: projector(seed).to(torch.device("cpu"), dtype) for seed, name in enumerate(NEEDED)}
    save_projectors(tmp_path / FILE_NAME, before)
    for path in (tmp_path, tmp_path / FILE_NAME):
        after = load_projectors(path, NEEDED)
        for name, expected in before.items():
            assert torch.equal(after[name].left.dense(), expected.left.dense())
            assert torch.equal(after[name].right.dense(), expected.right.dense())


def test_positions_are_saved_in_two_bytes(saved: Path) -> None:
    assert load_file(saved)["a.left.index"].dtype == torch.int16


@pytest.mark.parametrize(
    ("name", "needed", "message"),
    [
        ("c", ProjectedShape(shape=SHAPE, dim=DIM), r"hold c with d = 8; there it is missing"),
        ("a", ProjectedShape(shape=SHAPE, dim=4), r"hold a with d = 4; there it has d = 8"),
        ("a", ProjectedShape(shape=(30, 16), dim=DIM), r"hold a as 30 × 16; there its left factor has 24 rows"),
    ],
)
def test_a_file_for_other_layers_names_the_layer_that_does_not_fit(
    saved: Path, name: str, needed: ProjectedShape, message: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^lsp\.init_from must {message}, got '.*'$"):
        load_projectors(saved, {name: needed})


def test_no_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^lsp\.init_from must be a file of projectors or .*got '.*nothing'$"):
        load_projectors(tmp_path / "nothing", NEEDED)


def test_values_that_are_not_finite_are_refused(saved: Path) -> None:
    tensors = load_file(saved)
    tensors["b.right.value"][3, 1] = torch.nan
    save_file(tensors, saved, metadata={"subspace_dims": json.dumps({"a": DIM, "b": DIM})})
    with pytest.raises(ConfigError, match=r"intact projectors \(b\.right has no finite value for each position\)"):
        load_projectors(saved, NEEDED)


@given(at=st.integers(0, 10_000), byte=st.integers(0, 255), cut=st.booleans())
def test_a_damaged_file_gives_projectors_or_one_line_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, at: int, byte: int, cut: bool
) -> None:
    file = tmp_path_factory.mktemp("damaged") / FILE_NAME
    save_projectors(file, {"a": projector(0), "b": projector(1)})
    content = bytearray(file.read_bytes())
    at %= len(content)
    file.write_bytes(bytes(content[:at]) if cut else bytes(content[:at] + bytes([byte]) + content[at + 1 :]))
    with suppress(ConfigError):
        assert set(load_projectors(file, NEEDED)) == set(NEEDED)


def balanced() -> SparseProjector:
    plain = projector(0)
    return SparseProjector(
        plain.left.scaled(torch.linspace(0.5, 2, 24)), plain.right.scaled(torch.linspace(0.1, 1, 16))
    )


def test_a_balanced_projectors_scales_come_back(tmp_path: Path) -> None:
    save_projectors(tmp_path / FILE_NAME, {"a": balanced()})
    after = load_projectors(tmp_path, {"a": NEEDED["a"]})["a"]
    assert torch.equal(after.left.unscaled.dense(), balanced().left.unscaled.dense())
    assert torch.equal(after.right.unscaled.dense(), balanced().right.unscaled.dense())


@pytest.mark.parametrize(
    "scale", [torch.zeros(24), torch.full((24,), torch.nan), torch.ones(23), torch.ones(24, dtype=torch.float64)]
)
def test_scales_that_cannot_be_are_refused(tmp_path: Path, scale: torch.Tensor) -> None:
    file = tmp_path / FILE_NAME
    save_projectors(file, {"a": balanced()})
    save_file(load_file(file) | {"a.left.scale": scale}, file, metadata={"subspace_dims": json.dumps({"a": DIM})})
    with pytest.raises(ConfigError, match=r"hold intact projectors \(a\.left\.scale "):
        load_projectors(file, {"a": NEEDED["a"]})
