"""Decided: what one GPU gives to another, so that both train the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lsp_ray.device.projected_linear import InSubspace
from lsp_ray.projection.block_factor import BlockFactor
from lsp_ray.projection.sparse_projector import SparseProjector
from lsp_ray.runtime.actors.throttle import Throttle

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided:
    """What one GPU gives to another: how much it is slowed down, and the projectors that were learned.

    `deltas` are updates kept apart that the first step begins with, by linear; empty: with none. `weights` is a file of
    what is trained, as it is before `step`; None: all begin alike.
    """

    throttle: Throttle
    projectors: Mapping[str, SparseProjector]
    deltas: Mapping[str, torch.Tensor] = field(default_factory=dict)
    step: int = 0
    weights: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SetupReport:
    """Linears whose projectors could not be learned and stay random; host buffers that could not be page-locked.

    `throttle` is decided here for the whole run: the shards must keep to it as well. `gpu_of_part` is how the parts of
    a step are divided. `missing` are linears whose updates begin with zeros, as their weights before rounding are not
    in the model's folder. `places` has a line for each GPU actor that keeps to the cores of a NUMA node.
    """

    unfitted: list[str]
    num_pageable: int
    throttle: Throttle
    gpu_of_part: tuple[int, ...]
    missing: Sequence[str] = ()
    places: tuple[str, ...] = ()


def on_cpu(linears: Sequence[tuple[str, InSubspace]]) -> dict[str, SparseProjector]:
    """Copies of the projectors of all linears, by name; those with one right factor share its copy."""
    rights: dict[int, BlockFactor] = {}
    copies = {}
    for name, own in ((name, linear.projector) for name, linear in linears):
        if id(own.right) not in rights:
            rights[id(own.right)] = own.right.to(_CPU, own.dtype)
        copies[name] = SparseProjector(own.left.to(_CPU, own.dtype), rights[id(own.right)])
    return copies
