"""The options of a plan: a run's, as far as they matter for memory and time."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from lsp_ray.config import PayloadDtype
from lsp_ray.errors import ConfigError
from lsp_ray.sim.hardware_profile import hardware_names


@dataclass(frozen=True, kw_only=True)
class PlanLspConfig:
    """The learned sparse projectors (method lsp)."""

    subspace_dim: int | Literal["auto"] = "auto"
    """Size d of the (d, d) compressed gradient; auto: the largest whose traffic and updates the compute hides."""
    nnz_per_row: int = 8
    """Non-zeros r in every row of a projector."""


@dataclass(frozen=True, kw_only=True)
class PlanLoraConfig:
    """Low-rank adapters (method lora)."""

    r: int = 8
    """Rank of the adapters beside every linear."""


@dataclass(frozen=True, kw_only=True)
class PlanGaloreConfig:
    """Gradients projected onto their leading singular vectors (method galore)."""

    rank: int = 128
    """Dimensions that a gradient's shorter side is projected onto."""


@dataclass(frozen=True, kw_only=True)
class PlanRuntimeConfig:
    """Shards and their memory."""

    num_shards: int | None = None
    """CPU shard actors; default: 1, from 16 cores on 2."""
    shard_threads: int | None = None
    """CPU threads of each shard; default: what a GPU run leaves, or a quarter of a CPU run's cores, over num_shards."""
    shard_by: Literal["layer", "slice"] = "layer"
    """Whether a shard owns whole layers, as in a run, or a slice of every layer (forecast only)."""
    payload_dtype: PayloadDtype = "bfloat16"
    """What crosses the link, both ways; int8 comes with a scale for every 64 values."""
    pinned: bool = True
    """Whether the slots are page-locked."""


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """One plan."""

    model_name_or_path: str = "smollm2-135m"
    """Alias smollm2-135m, a local folder or its config.json, a .gguf file or a hub id; no weights are read."""
    hardware: str | None = None
    """A machine by name: a1000-laptop, h100-pcie, rtx3060 or rtx4090-threadripper."""
    measure: bool = False
    """Measure this machine instead, in under 20 s."""
    max_seq_length: int = 128
    """Tokens kept of an example."""
    dataset: str | None = None
    """A run's data set: time and memory are then of its typical micro-batch, else of the longest there can be."""
    per_device_train_batch_size: int = 4
    """Examples in a micro-batch."""
    gradient_accumulation_steps: int = 1
    """Micro-batches in an optimizer update."""
    max_grad_norm: float = 0.0
    """Norm to clip to; above 0 every state is kept twice, as updates may have to be made again."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What to do at NaN or infinity; skip needs the same memory as clipping."""
    bf16: bool = True
    """Weights and activations in bfloat16."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    json: bool = False
    """Print JSON in place of tables."""
    lsp: PlanLspConfig = field(default_factory=PlanLspConfig)
    lora: PlanLoraConfig = field(default_factory=PlanLoraConfig)
    galore: PlanGaloreConfig = field(default_factory=PlanGaloreConfig)
    runtime: PlanRuntimeConfig = field(default_factory=PlanRuntimeConfig)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.max_grad_norm) and self.max_grad_norm >= 0):
            raise ConfigError("max_grad_norm", "be a number of at least 0", self.max_grad_norm)
        counts = {
            "max_seq_length": self.max_seq_length,
            "per_device_train_batch_size": self.per_device_train_batch_size,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "lsp.subspace_dim": self.lsp.subspace_dim,
            "lsp.nnz_per_row": self.lsp.nnz_per_row,
            "lora.r": self.lora.r,
            "galore.rank": self.galore.rank,
            "runtime.num_shards": self.runtime.num_shards,
            "runtime.shard_threads": self.runtime.shard_threads,
        }
        for name, value in counts.items():
            if isinstance(value, int) and value < 1:
                raise ConfigError(name, "be at least 1", value)
        if self.measure == (self.hardware is not None):
            names = ", ".join(hardware_names())
            raise ConfigError("hardware", f"be one of {names}, or --measure be given in its place", self.hardware)
