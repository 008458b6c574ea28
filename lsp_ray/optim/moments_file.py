"""Adam's moments in safetensors files, one of each shard; whoever reads needs not have the writer's shards.

For each layer NUMBER: NUMBER.exp_avg and NUMBER.exp_avg_sq, flat float32 in the order of the layer's payload, and
NUMBER.step, the number of updates; where deltas are coarse NUMBER.error, what they have left out; where the shard adds
them up NUMBER.total, their sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lsp_ray.optim.adamw import AdamWState


def save_moments(path: Path, states: Mapping[int, AdamWState]) -> None:
    """Write the state of some layers, by their number."""
    tensors: dict[str, torch.Tensor] = {}
    for layer, state in states.items():
        tensors |= {f"{layer}.{name}": tensor.cpu() for name, tensor in state.tensors().items()}
    save_file({name: tensor.clone() if _shares(tensor) else tensor for name, tensor in tensors.items()}, path)


def _shares(tensor: torch.Tensor) -> bool:
    """Whether it is a part of a larger buffer, which safetensors refuses to guess about."""
    return tensor.untyped_storage().nbytes() != tensor.nbytes


def load_moments(paths: Iterable[Path], states: Mapping[int, AdamWState], *, num_updates: int) -> None:
    """Read the state of these layers into the tensors of `states`, wherever in `paths` each of them is.

    Args:
        paths: The files.
        states: What is read into.
        num_updates: Steps made; a layer has had as many updates, or fewer where steps were skipped.

    Raises:
        ValueError: A layer is missing, has another size, or moments that no run can have.
        OSError, SafetensorError: A file cannot be read.
    """
    missing = set(states)
    for path in paths:
        with safe_open(path, framework="pt") as content:
            for layer in missing & {int(key.split(".")[0]) for key in content.keys()}:  # noqa: SIM118 - no mapping
                _read(content, layer, states[layer], num_updates)
                missing.discard(layer)
    if missing:
        raise ValueError(f"the moments of layer {min(missing)} are missing")


def _read(content: Any, layer: int, state: AdamWState, num_updates: int) -> None:
    for name, into in state.tensors().items():
        tensor: torch.Tensor = content.get_tensor(f"{layer}.{name}")
        if tensor.shape != into.shape or tensor.dtype != torch.float32:
            found = f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
            raise ValueError(f"layer {layer} has {name} of {found}, not {tuple(into.shape)} float32")
        if not torch.isfinite(tensor).all() or (name == "exp_avg_sq" and (tensor < 0).any()):
            raise ValueError(f"layer {layer} has {name} that no run can have")
        into.copy_(tensor)
    if not 0 <= int(state.step) <= num_updates:
        raise ValueError(f"layer {layer} has had {int(state.step)} updates in {num_updates} steps")
