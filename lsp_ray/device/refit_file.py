"""A Refitter's state in two safetensors files: the lessons, and the projectors that wait to take over."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from lsp_ray.device.refit import RefitState, Refitter
from lsp_ray.projection.projector_file import load_projectors, save_projectors, saved_names

LESSONS = "refit_lessons.safetensors"
FITTED = "refit_projectors.safetensors"


def save_refits(folder: Path, state: RefitState) -> None:
    """Write what is under way; no file where nothing is."""
    lessons = {
        f"{key}.{name}": tensor.contiguous()
        for key, tensors in state.lessons.items()
        for name, tensor in tensors.items()
    }
    if lessons:
        save_file(lessons, folder / LESSONS)
    if state.fitted:
        save_projectors(folder / FITTED, {str(key): projector for key, projector in state.fitted.items()})


def load_refits(folder: Path, refitter: Refitter, *, field: str) -> None:
    """Give the refitter what `save_refits` wrote.

    Raises:
        ConfigError: Of `field`: projectors are damaged.
        ValueError: They are for other matrices.
        OSError, SafetensorError: A file cannot be read.
    """
    lessons: defaultdict[int, dict[str, torch.Tensor]] = defaultdict(dict)
    if (folder / LESSONS).exists():
        for name, tensor in load_file(folder / LESSONS).items():
            key, _, part = name.partition(".")
            lessons[int(key)][part] = tensor
    file = folder / FITTED
    needed = {}
    for name in saved_names(file) if file.exists() else []:
        needed[name] = refitter.projector(int(name)).sizes
    fitted = load_projectors(file, needed, field=field) if needed else {}
    refitter.restore(RefitState(lessons=lessons, fitted={int(name): fitted[name] for name in fitted}))
