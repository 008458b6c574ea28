"""The deltas that a stale policy has not added yet, in a checkpoint's file: STEP.UNIT, encoded, empty if void."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from lsp_ray.runtime.prepare.job import Job

_NAME = "deltas.safetensors"


def save_kept_back(state: Path, kept_back: Mapping[tuple[int, int], torch.Tensor]) -> None:
    """Write them, if there are any."""
    if kept_back:
        save_file({f"{step}.{unit}": delta for (step, unit), delta in kept_back.items()}, state / _NAME)


def load_kept_back(state: Path, job: Job, step: int) -> dict[tuple[int, int], torch.Tensor]:
    """Read those of a checkpoint after `step` updates; there are none but of a stale policy.

    Raises:
        ValueError: One is missing, too many or of another size.
        OSError, SafetensorError: The file cannot be read.
    """
    if not job.staleness:
        return {}
    kept_back = {}
    for key, delta in load_file(state / _NAME).items():
        made, unit = map(int, key.split("."))
        kept_back[made, unit] = delta
    steps = range(step - job.staleness, step)
    wires, dtype = [job.codec.wire_numel(numel) for numel in job.payload_sizes], job.codec.dtype
    expected = {(made, unit): numel for made in steps if made >= 0 for unit, numel in enumerate(wires)}
    for (made, unit), numel in expected.items():
        found = kept_back.get((made, unit))
        if found is None or found.shape not in [(numel,), (0,)] or found.dtype != dtype:
            raise ValueError(f"the delta of step {made} for unit {unit} is not {numel} numbers of {dtype}")
    if len(kept_back) > len(expected):
        raise ValueError(f"it has {len(kept_back)} deltas, not {len(expected)}")
    return kept_back
