"""Projectors in a safetensors file, so that another run can start from them.

For each linear NAME: NAME.left.value (M, R) and NAME.right.value (N, R), for balanced ones NAME.left.scale (M,) and
NAME.right.scale (N,), float32. The metadata say, for each linear, under whose name its right factor is, as linears that
read the same input share one, and the numbers of groups of both factors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from lsp_ray.errors import ConfigError
from lsp_ray.output_folder import internal
from lsp_ray.projection.block_factor import BlockFactor
from lsp_ray.projection.sparse_projector import ProjectorSizes, SparseProjector

FILE_NAME = "lsp_projectors.safetensors"
_FORMAT, _BLOCKS = "format", "orthonormal blocks"
_LINEARS = "linears"
INIT_FROM = "lsp.init_from"


def save_projectors(path: Path, projectors: Mapping[str, SparseProjector]) -> None:
    """Write every projector, by the name of its linear."""
    tensors: dict[str, torch.Tensor] = {}
    first_with: dict[int, str] = {}  # by the identity of a right factor: the linear under whose name it is written
    linears: dict[str, tuple[str, int, int]] = {}
    for name, projector in projectors.items():
        first = first_with.setdefault(id(projector.right), name)
        linears[name] = first, projector.left.groups, projector.right.groups
        tensors |= _tensors(f"{name}.left", projector.left)
        if first == name:
            tensors |= _tensors(f"{name}.right", projector.right)
    metadata = {_FORMAT: _BLOCKS, _LINEARS: json.dumps(linears)}
    path.write_bytes(save(tensors, metadata=metadata))  # save_file would make it private (0600)


def _tensors(key: str, factor: BlockFactor) -> dict[str, torch.Tensor]:
    tensors = {f"{key}.value": factor.value_FR.detach().cpu().contiguous()}
    return tensors if factor.scale_F is None else tensors | {f"{key}.scale": factor.scale_F}


def load_projectors(
    path: Path, linears: Mapping[str, ProjectorSizes], *, field: str = INIT_FROM
) -> dict[str, SparseProjector]:
    """Read a projector for each linear; those that shared a right factor do so again.

    Args:
        path: The file, or the folder of a run that left one.
        linears: What each linear needs, by name.
        field: The option that named the file.

    Raises:
        ConfigError: There is no such file, it is damaged or of a form that is gone, or a linear is missing or has other
            sizes in it.
    """
    file = internal(path, FILE_NAME) if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(field, f"be a file of projectors or a run's folder with {FILE_NAME} in it", str(path))
    try:
        with safe_open(file, framework="pt") as content:
            return _Reader(content, path, field).projectors(linears)
    except ConfigError:
        raise
    # whatever a damaged file holds
    except (SafetensorError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise ConfigError(field, f"hold intact projectors ({str(error).splitlines()[0]})", str(path)) from error


def saved_names(path: Path) -> list[str]:
    """Return the names of the linears in an intact file."""
    with safe_open(path, framework="pt") as content:
        return list(json.loads(content.metadata()[_LINEARS]))


class _Reader:
    def __init__(self, content: Any, path: Path, field: str) -> None:
        self._content, self._path, self._field = content, path, field
        self._keys = set(content.keys())
        metadata = content.metadata() or {}
        if metadata.get(_FORMAT) != _BLOCKS:
            if not any(key.endswith(".left.index") for key in self._keys):
                raise ConfigError(field, "be a run's folder or a file of projectors, which this is not", str(path))
            bound = "hold projectors of orthonormal blocks; this file has another form, which older versions wrote"
            raise ConfigError(field, bound, str(path))
        self._linears: dict[str, tuple[str, int, int]] = json.loads(metadata[_LINEARS])

    def projectors(self, linears: Mapping[str, ProjectorSizes]) -> dict[str, SparseProjector]:
        rights: dict[str, BlockFactor] = {}
        found = {}
        for name, needed in linears.items():
            if name not in self._linears:
                raise self._refusal(name, needed, "it is missing")
            first, *groups = self._linears[name]
            left = self._factor(name, needed, "left", name, groups[0])
            right = self._factor(name, needed, "right", first, groups[1])
            if (left.dim, right.dim) != needed.dims:
                raise self._refusal(name, needed, f"it sends {left.dim} × {right.dim}")
            found[name] = SparseProjector(left, rights.setdefault(first, right))
        return found

    def _factor(self, name: str, needed: ProjectorSizes, side: str, key: str, groups: int) -> BlockFactor:
        num_rows = needed.shape[0] if side == "left" else needed.shape[1]
        value_FR: torch.Tensor = self._content.get_tensor(f"{key}.{side}.value")
        if value_FR.ndim != 2 or not value_FR.is_floating_point() or not torch.isfinite(value_FR).all():
            raise ValueError(f"{key}.{side} is no finite matrix")
        if value_FR.shape != (num_rows, needed.nnz_per_row):
            rows, nnz_per_row = value_FR.shape
            raise self._refusal(name, needed, f"its {side} factor has {rows} rows of {nnz_per_row}")
        if not isinstance(groups, int) or not 1 <= groups <= num_rows // needed.nnz_per_row:
            raise ValueError(f"{key}.{side} has {groups!r} groups")
        return BlockFactor(value_FR, groups, self._scale(f"{key}.{side}.scale", num_rows))

    def _refusal(self, name: str, needed: ProjectorSizes, found: str) -> ConfigError:
        rows, columns = needed.shape
        wanted = f"{rows} × {columns} with r = {needed.nnz_per_row} that sends {needed.dims[0]} × {needed.dims[1]}"
        return ConfigError(self._field, f"hold {name} as {wanted}; there {found}", str(self._path))

    def _scale(self, key: str, num_rows: int) -> torch.Tensor | None:
        if key not in self._keys:
            return None
        scale_F: torch.Tensor = self._content.get_tensor(key)
        if scale_F.shape != (num_rows,) or scale_F.dtype != torch.float32:
            raise ValueError(f"{key} is not one float32 number for each of {num_rows} rows")
        if not (torch.isfinite(scale_F).all() and (scale_F > 0).all()):
            raise ValueError(f"{key} has a number that is not above 0")
        return scale_F
