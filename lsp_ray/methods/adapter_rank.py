"""A run's adapter with fewer directions: the leading singular vectors of what each linear's adapter adds.

Legend: M rows (out), N columns (in), E directions of an adapter, K of those that are kept.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"


def export_adapter(source: Path, target: Path, rank: int | None, *, base: str | None) -> float:
    """Write PEFT's files of an adapter into another folder, with at most `rank` directions a linear.

    `base` is what the adapter is for, by a name that others know.

    Returns:
        The share of the update's norm that is kept: ‖kept‖ / ‖all‖ over all linears.
    """
    target.mkdir(parents=True, exist_ok=True)
    config = json.loads((source / CONFIG).read_text(encoding="utf-8")) | {"base_model_name_or_path": base}
    if rank is None:
        shutil.copyfile(source / WEIGHTS, target / WEIGHTS)
        _write(config, target)
        return 1.0
    tensors = load_file(source / WEIGHTS)
    kept = whole = 0.0
    ranks: dict[str, int] = {}
    for key in [key for key in tensors if key.endswith(_DOWN)]:
        stem = key.removesuffix(_DOWN)
        linear = stem.removeprefix("base_model.model.")
        scale = _scale(config, linear, len(tensors[key]))
        up_MK, down_KN, squares = truncated(tensors[stem + _UP].float() * scale, tensors[key].float(), rank)
        dtype = tensors[key].dtype
        tensors[key], tensors[stem + _UP] = down_KN.to(dtype).contiguous(), up_MK.to(dtype).contiguous()
        ranks[linear] = len(down_KN)
        kept, whole = kept + float(squares[: len(down_KN)].sum()), whole + float(squares.sum())
    most = max(ranks.values())
    others = {name: size for name, size in ranks.items() if size != most}
    config |= {"r": most, "lora_alpha": most, "rank_pattern": others, "alpha_pattern": others}
    (target / WEIGHTS).write_bytes(save(tensors))  # save_file would make it private (0600)
    _write(config, target)
    return math.sqrt(kept / whole) if whole else 1.0


def _write(config: dict[str, Any], target: Path) -> None:
    (target / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def truncated(up_ME: torch.Tensor, down_EN: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return B (M, K) and A (K, N), the best of rank K = min(rank, E) to up · down, and all squared singular values."""
    left_MD, upper_DE = torch.linalg.qr(up_ME)
    right_ND, lower_DE = torch.linalg.qr(down_EN.t())
    u_DK, value_K, v_KD = torch.linalg.svd(upper_DE @ lower_DE.t(), full_matrices=False)
    kept = slice(min(rank, len(value_K)))
    return left_MD @ (u_DK[:, kept] * value_K[kept]), v_KD[kept] @ right_ND.t(), value_K.double().square()


def _scale(config: dict[str, Any], linear: str, rank: int) -> float:
    """alpha / r of one linear, which the new adapter has in its own factors."""
    return float(config.get("alpha_pattern", {}).get(linear, config["lora_alpha"])) / rank
