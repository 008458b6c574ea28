"""trained_digest: tells whether two GPUs hold the same of what is trained, without bringing it to the host."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch

from lsp_ray.device.rounding import mixed
from lsp_ray.device.unit import AddedTarget, SummedTarget, SummedUnit, Unit

_PART = 1 << 22  # elements at a time: their integers take 8 bytes each


def trained_digest(units: Sequence[Unit]) -> int:
    """Return 63 bits that depend on every bit of what the units train: integers, so the same on any device."""
    sums: list[torch.Tensor] = []
    with torch.no_grad():
        for tensor in (tensor for unit in units for tensor in _tensors(unit)):
            integers = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
            flat = tensor.contiguous().view(-1).view(integers)
            sums += [part.to(torch.int64).sum() for part in flat.split(_PART)]
    return mixed(*torch.stack(sums).tolist())


def _tensors(unit: Unit) -> Iterator[torch.Tensor]:
    for target in unit.targets:
        if isinstance(unit, SummedUnit):
            yield cast("SummedTarget", target).total()
        else:
            yield cast("AddedTarget", target).addition.weight
