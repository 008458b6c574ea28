"""Projectors in a safetensors file, so that another run can start from them.

For each linear NAME: NAME.left.index (M, R) and NAME.right.index (N, R), int16 or int32 column numbers, and
NAME.left.value, NAME.right.value of the same shapes, for balanced ones NAME.left.scale (M,) and NAME.right.scale
(N,), float32; the subspace dimensions are in the metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from lsp_ray.errors import ConfigError
from lsp_ray.projection.sparse_factor import SparseFactor
from lsp_ray.projection.sparse_projector import SparseProjector

FILE_NAME = "lsp_projectors.safetensors"
_DIMS = "subspace_dims"
INIT_FROM = "lsp.init_from"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectedShape:
    """(M, N) of a linear and the D of its projector."""

    shape: tuple[int, int]
    dim: int


def save_projectors(path: Path, projectors: Mapping[str, SparseProjector]) -> None:
    """Write every projector, by the name of its linear."""
    tensors: dict[str, torch.Tensor] = {}
    for name, projector in projectors.items():
        index_dtype = torch.int16 if projector.dim < 1 << 15 else torch.int32
        for side, factor in (("left", projector.left), ("right", projector.right)):
            tensors[f"{name}.{side}.index"] = factor.index_FR.to("cpu", index_dtype).contiguous()
            tensors[f"{name}.{side}.value"] = factor.value_FR.cpu().contiguous()
            if factor.scale_F is not None:
                tensors[f"{name}.{side}.scale"] = factor.scale_F
    dims = {name: projector.dim for name, projector in projectors.items()}
    path.write_bytes(save(tensors, metadata={_DIMS: json.dumps(dims)}))  # save_file would make it private (0600)


def load_projectors(
    path: Path, linears: Mapping[str, ProjectedShape], *, field: str = INIT_FROM
) -> dict[str, SparseProjector]:
    """Read a projector for each linear.

    Args:
        path: The file, or the folder of a run that left one.
        linears: What each linear needs, by name.
        field: The option that named the file.

    Raises:
        ConfigError: There is no such file, it is damaged, or a linear is missing or has other sizes in it.
    """
    file = path / FILE_NAME if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(field, f"be a file of projectors or a run's folder with {FILE_NAME} in it", str(path))
    try:
        with safe_open(file, framework="pt") as content:
            dims = _dims(content)
            for name, needed in linears.items():
                if dims.get(name) != needed.dim:
                    held = f"has d = {dims[name]}" if name in dims else "is missing"
                    raise ConfigError(field, f"hold {name} with d = {needed.dim}; there it {held}", str(path))
            return {name: _read(content, name, needed, path, field) for name, needed in linears.items()}
    except ConfigError:
        raise
    except (SafetensorError, ValueError, TypeError, AttributeError) as error:  # whatever a damaged file holds
        raise ConfigError(field, f"hold intact projectors ({str(error).splitlines()[0]})", str(path)) from error


def saved_names(path: Path) -> list[str]:
    """Return the names of the linears in an intact file."""
    with safe_open(path, framework="pt") as content:
        return list(_dims(content))


def _dims(content: Any) -> dict[str, Any]:
    dims: dict[str, Any] = json.loads((content.metadata() or {}).get(_DIMS, "{}"))
    return dims


def _read(content: Any, name: str, needed: ProjectedShape, path: Path, field: str) -> SparseProjector:
    factors = []
    for side, num_rows in zip(("left", "right"), needed.shape, strict=True):
        index_FR: torch.Tensor = content.get_tensor(f"{name}.{side}.index")
        value_FR: torch.Tensor = content.get_tensor(f"{name}.{side}.value")
        if index_FR.shape != value_FR.shape or index_FR.ndim != 2 or not torch.isfinite(value_FR).all():
            raise ValueError(f"{name}.{side} has no finite value for each position")
        if index_FR.shape[0] != num_rows:
            sizes = f"{needed.shape[0]} × {needed.shape[1]}"
            bound = f"hold {name} as {sizes}; there its {side} factor has {index_FR.shape[0]} rows"
            raise ConfigError(field, bound, str(path))
        if not 1 <= index_FR.shape[1] <= needed.dim:
            raise ValueError(f"{name}.{side} has {index_FR.shape[1]} non-zeros a row in {needed.dim} columns")
        scale_F = _read_scale(content, f"{name}.{side}.scale", num_rows)
        factors.append(SparseFactor(index_FR.to(torch.int32), value_FR, needed.dim, scale_F))
    return SparseProjector(*factors)


def _read_scale(content: Any, key: str, num_rows: int) -> torch.Tensor | None:
    if key not in content.keys():  # noqa: SIM118 - a safetensors file is no mapping
        return None
    scale_F: torch.Tensor = content.get_tensor(key)
    if scale_F.shape != (num_rows,) or scale_F.dtype != torch.float32:
        raise ValueError(f"{key} is not one float32 number for each of {num_rows} rows")
    if not (torch.isfinite(scale_F).all() and (scale_F > 0).all()):
        raise ValueError(f"{key} has a number that is not above 0")
    return scale_F
