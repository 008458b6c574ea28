from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lsp_ray.errors import ConfigError
from lsp_ray.projection.block_factor import BlockFactor
from lsp_ray.projection.projector_file import FILE_NAME, load_projectors, save_projectors, saved_names
from lsp_ray.projection.sparse_projector import ProjectorSizes, SparseProjector
from tests.linears import SIZES, D, E, M, N, R, balanced, projector, sharing

NEEDED = dict.fromkeys("ab", SIZES)


def write(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    linears = {name: (name, D // R, E // R) for name in NEEDED}
    save_file(dict(tensors), path, metadata={"format": "orthonormal blocks", "linears": json.dumps(linears)})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_projectors(tmp_path / FILE_NAME, {"a": balanced(projector(0)), "b": projector(1)})
    return tmp_path / FILE_NAME


def assert_same(ours: BlockFactor, theirs: BlockFactor) -> None:
    assert ours.groups == theirs.groups
    assert ours.value_FR.dtype == theirs.value_FR.dtype
    assert torch.equal(ours.value_FR, theirs.value_FR)
    assert (ours.scale_F is None) == (theirs.scale_F is None)
    if ours.scale_F is not None and theirs.scale_F is not None:
        assert torch.equal(ours.scale_F, theirs.scale_F)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_balanced", [False, True])
def test_projectors_come_back_to_the_bit_and_share_what_they_shared(
    tmp_path: Path, dtype: torch.dtype, is_balanced: bool
) -> None:
    trio = [*sharing(2), projector(5)]  # the first two share
    right = trio[0].right.to(torch.device("cpu"), dtype)
    before = {name: each.to(torch.device("cpu"), dtype) for name, each in zip("abc", trio, strict=True)}
    before |= {name: SparseProjector(before[name].left, right) for name in "ab"}
    if is_balanced:
        before["c"] = balanced(before["c"])
    save_projectors(tmp_path / FILE_NAME, before)
    assert saved_names(tmp_path / FILE_NAME) == ["a", "b", "c"]
    assert "b.right.value" not in load_file(tmp_path / FILE_NAME)
    for path in (tmp_path, tmp_path / FILE_NAME):
        after = load_projectors(path, dict.fromkeys("abc", SIZES))
        for name, expected in before.items():
            assert_same(after[name].left, expected.left)
            assert_same(after[name].right, expected.right)
        assert after["a"].right is after["b"].right
        assert after["c"].right is not after["a"].right


def test_a_linear_can_be_read_without_the_one_under_whose_name_its_right_factor_is(tmp_path: Path) -> None:
    before = dict(zip("ab", sharing(2), strict=True))
    save_projectors(tmp_path / FILE_NAME, before)
    assert_same(load_projectors(tmp_path, {"b": SIZES})["b"].right, before["a"].right)


@pytest.mark.parametrize(
    ("name", "shape", "dims", "nnz_per_row", "found"),
    [
        ("c", (M, N), (D, E), R, "it is missing"),
        ("a", (M, N), (D, 16), R, "it sends 16 × 12"),
        ("a", (M, N), (8, E), R, "it sends 16 × 12"),
        ("a", (M, N), (16, 16), 8, "its left factor has 96 rows of 4"),
        ("b", (90, N), (D, E), R, "its left factor has 96 rows of 4"),
        ("b", (M, 90), (D, E), R, "its right factor has 80 rows of 4"),
    ],
)
def test_a_file_for_other_layers_names_the_layer_that_does_not_fit(
    saved: Path, name: str, shape: tuple[int, int], dims: tuple[int, int], nnz_per_row: int, found: str
) -> None:
    needed = ProjectorSizes(shape=shape, dims=dims, nnz_per_row=nnz_per_row)
    wanted = f"{shape[0]} × {shape[1]} with r = {nnz_per_row} that sends {dims[0]} × {dims[1]}"
    with pytest.raises(ConfigError, match=rf"^lsp\.init_from must hold {name} as {wanted}; there {found}, got '.*'$"):
        load_projectors(saved, {name: needed})


def test_no_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^lsp\.init_from must be a file of projectors or .*got '.*nothing'$"):
        load_projectors(tmp_path / "nothing", NEEDED)


@pytest.mark.parametrize("metadata", [{"subspace_dims": json.dumps({"a": D})}, None], ids=["older", "none"])
def test_a_file_of_an_older_form_is_refused_as_one(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    tensors = {f"a.{side}.index": torch.zeros(rows, R).short() for side, rows in (("left", M), ("right", N))}
    tensors |= {f"a.{side}.value": torch.ones(rows, R) for side, rows in (("left", M), ("right", N))}
    save_file(tensors, tmp_path / FILE_NAME, metadata=metadata)
    bound = "hold projectors of orthonormal blocks; this file has another form, which older versions wrote"
    with pytest.raises(ConfigError, match=rf"^resume_from must {bound}, got '.*'$"):
        load_projectors(tmp_path, {"a": SIZES}, field="resume_from")


def test_a_file_of_something_else_is_refused_as_such(tmp_path: Path) -> None:
    save_file({"0.1": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(
        ConfigError, match=r"^lsp\.init_from must be a run's folder or a file of projectors, which this"
    ):
        load_projectors(tmp_path / "other.safetensors", NEEDED)


def test_values_that_are_not_finite_are_refused(saved: Path) -> None:
    tensors = load_file(saved)
    tensors["b.right.value"][3, 1] = torch.nan
    write(saved, tensors)
    with pytest.raises(ConfigError, match=r"intact projectors \(b\.right is no finite matrix\)"):
        load_projectors(saved, NEEDED)


@pytest.mark.parametrize(
    "wrong",
    [torch.zeros_like, lambda scale: scale * torch.nan, lambda scale: scale[1:].clone(), lambda scale: scale.double()],
)
def test_scales_that_cannot_be_are_refused(saved: Path, wrong: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(saved)
    write(saved, tensors | {"a.left.scale": wrong(tensors["a.left.scale"])})
    with pytest.raises(ConfigError, match=r"hold intact projectors \(a\.left\.scale "):
        load_projectors(saved, NEEDED)
