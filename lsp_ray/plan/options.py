"""The options of a plan: a run's, as far as they matter for memory and time."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from lsp_ray.config import Bits, Delta, Method, PayloadDtype, ShardNodes, Weights
from lsp_ray.errors import ConfigError
from lsp_ray.sim.cluster import MOST_GPUS, MOST_NODES, Cluster
from lsp_ray.sim.hardware_profile import HardwareProfile, hardware_names, load_hardware

SHORTEST = 8  # tokens of an example, as in a run


@dataclass(frozen=True, kw_only=True)
class PlanLspConfig:
    """The learned sparse projectors (method lsp)."""

    subspace_dim: int | Literal["auto"] = "auto"
    """Size d of the (d, d) compressed gradient; auto: the largest whose traffic and updates the compute hides."""
    nnz_per_row: int = 8
    """Non-zeros r in every row of a projector."""
    delta: Delta | None = None
    """Whether updates are merged into the weights or kept apart from them; default: merged, apart if quantised."""


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

    shard_nodes: ShardNodes = "auto"
    """Of several nodes, those that have shards: the driver's alone, or all; auto: all where there are three."""
    num_shards: int | None = None
    """CPU shard actors; default: 1, from 16 cores on 2."""
    shard_threads: int | None = None
    """CPU threads of each shard; default: what a GPU run leaves, or a quarter of a CPU run's cores, over num_shards."""
    shard_by: Literal["layer", "slice"] = "layer"
    """Whether a shard owns whole layers, as in a run, or a slice of every layer (forecast only)."""
    payload_dtype: PayloadDtype | None = None
    """What crosses the link, both ways; default: bfloat16; int8 between machines where bfloat16 hides no d of 256."""
    weights: Weights | None = None
    """Where weights that never change live; default: on the device, in main memory (host) where nothing else fits."""
    activations: Weights | None = None
    """Where blocks' inputs wait for the backward; default: likewise (host implies gradient_checkpointing)."""
    pinned: bool = True
    """Whether the slots are page-locked."""


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """One plan. What is left open is chosen so that it fits: batch, checkpointing, length, method and d."""

    model_name_or_path: str = "smollm2-135m"
    """Alias smollm2-135m, a local folder or its config.json, a .gguf file or a hub id; no weights are read."""
    hardware: str | None = None
    """A machine by its card, such as rtx4090 (a wrong name lists all), or a .toml file of such figures."""
    measure: bool = False
    """Measure this machine instead, in under 20 s."""
    gpu_memory_gb: float | None = None
    """GPU memory in place of the machine's own, as on its box: 24 is 24 · 10⁹ bytes."""
    host_memory_gb: float | None = None
    """Main memory in place of the machine's own."""
    link_gbps: float | None = None
    """Rate of the link that is reached, in gigabytes (10⁹ bytes) a second each way, in place of the machine's own."""
    num_gpus: int = 1
    """GPUs of each machine, each of which computes its own part of a step (lsp and zero_offload)."""
    nodes: int = 1
    """Machines like this one, on one switch."""
    network_gbit: float | None = None
    """Rate of each machine's network, in gigabits (10⁹ bits) a second each way; has to be given with several nodes."""
    method: Method | None = None
    """Plan for this method alone; default: all of them."""
    max_seq_length: int | None = None
    """Tokens kept of an example; default: 128, less where nothing fits."""
    dataset: str | None = None
    """A run's data set: time and memory are then of its typical micro-batch, else of the longest there can be."""
    per_device_train_batch_size: int | None = None
    """Examples in a micro-batch; default: 4, more where that hides weights coming up, fewer where 4 do not fit."""
    gradient_accumulation_steps: int | None = None
    """Micro-batches in an optimizer update; default: 1, more where micro-batches have to be smaller."""
    max_grad_norm: float = 0.0
    """Norm to clip to; above 0 every state is kept twice, as updates may have to be made again."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What to do at NaN or infinity; skip needs the same memory as clipping."""
    bf16: bool | None = None
    """Weights and activations in bfloat16; default: where the machine is fast at it."""
    load_in_4bit: bool | None = None
    """Quantise the blocks' linears to 4 bits (NF4); lsp and lora only. Default: where a method fits only so."""
    load_in_8bit: bool = False
    """The same to 8 bits (LLM.int8), where it is asked for."""
    gradient_checkpointing: bool | None = None
    """Recompute activations in the backward pass; default: where it does not fit without."""
    json: bool = False
    """Print JSON in place of tables."""
    verbose: bool = False
    """Print memory by part and time by policy as well."""
    lsp: PlanLspConfig = field(default_factory=PlanLspConfig)
    lora: PlanLoraConfig = field(default_factory=PlanLoraConfig)
    galore: PlanGaloreConfig = field(default_factory=PlanGaloreConfig)
    runtime: PlanRuntimeConfig = field(default_factory=PlanRuntimeConfig)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.max_grad_norm) and self.max_grad_norm >= 0):
            raise ConfigError("max_grad_norm", "be a number of at least 0", self.max_grad_norm)
        for name in ("gpu_memory_gb", "host_memory_gb", "link_gbps", "network_gbit"):
            size = getattr(self, name)
            if size is not None and not (math.isfinite(size) and size > 0):
                raise ConfigError(name, "be a number above 0", size)
        self._check_counts()
        self._check_cluster()
        self._check_quantized()
        self._check_weights()
        if self.measure and self.hardware is not None:
            raise ConfigError("hardware", "be left out where --measure is given", self.hardware)
        if not self.measure:
            self._named()  # a wrong name is told before torch is imported

    def _check_counts(self) -> None:
        counts = {
            "num_gpus": self.num_gpus,
            "nodes": self.nodes,
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
            least = SHORTEST if name == "max_seq_length" else 1
            if isinstance(value, int) and value < least:
                raise ConfigError(name, f"be at least {least}", value)
        dim = self.lsp.subspace_dim
        if dim != "auto" and self.lsp.nnz_per_row > dim:
            raise ConfigError("lsp.nnz_per_row", f"be at most lsp.subspace_dim ({dim})", self.lsp.nnz_per_row)

    def _check_cluster(self) -> None:
        if self.nodes > MOST_NODES:
            raise ConfigError("nodes", f"be at most {MOST_NODES}", self.nodes)
        if self.num_gpus * self.nodes > MOST_GPUS:
            bound = f"be at most {MOST_GPUS // self.nodes}, as there are {MOST_GPUS} GPUs at most"
            raise ConfigError("num_gpus", bound, self.num_gpus)
        if self.nodes > 1 and self.network_gbit is None:
            raise ConfigError("network_gbit", f"be given with {self.nodes} nodes", None, hint="1, 10 and 25 are common")
        if self.nodes == 1 and self.network_gbit is not None:
            raise ConfigError("network_gbit", "be left out with one node", self.network_gbit)
        if self.nodes == 1 and self.runtime.shard_nodes != "auto":
            raise ConfigError("runtime.shard_nodes", "be left out with one node", self.runtime.shard_nodes)
        if self.cluster.num_gpus > 1 and self.method not in (None, "lsp", "zero_offload"):
            raise ConfigError("method", "be lsp or zero_offload with several GPUs", self.method)

    def check_gpus(self, *, on_gpu: bool) -> None:
        """Raise ConfigError for several GPUs of a machine that has none."""
        if self.num_gpus > 1 and not on_gpu:
            raise ConfigError("num_gpus", "be 1 on a machine without a GPU", self.num_gpus)

    def _check_quantized(self) -> None:
        if self.load_in_4bit and self.load_in_8bit:
            raise ConfigError("load_in_8bit", "be left out beside load_in_4bit", True)
        if self.bits is not None:
            self._check_fixed_weights(f"with load_in_{self.bits}bit")

    def _check_fixed_weights(self, where: str) -> None:
        why = "as quantised weights stay as they are"
        if self.method not in (None, "lsp", "lora"):
            raise ConfigError("method", f"be lsp or lora {where}, {why}", self.method)
        if self.lsp.delta == "merged":
            raise ConfigError("lsp.delta", f"be apart {where}, {why}", "merged")

    def _check_weights(self) -> None:
        if self.runtime.activations == "host" and self.gradient_checkpointing is False:
            raise ConfigError("gradient_checkpointing", "be true or left out with runtime.activations host", False)
        if self.runtime.weights != "host":
            return
        if self.method not in (None, "lsp"):
            raise ConfigError("runtime.weights", f"be device with method {self.method}", "host")
        if self.lsp.delta == "merged":
            raise ConfigError("lsp.delta", "be apart with runtime.weights host", "merged")
        if self.load_in_8bit:
            raise ConfigError("runtime.weights", "be device with load_in_8bit", "host")
        if self.gradient_checkpointing is False:
            raise ConfigError("gradient_checkpointing", "be true or left out with runtime.weights host", False)

    def check_on_quantized(self) -> None:
        """Raise ConfigError for what cannot be asked for where the model is quantised already."""
        if self.bits is not None:
            raise ConfigError(f"load_in_{self.bits}bit", "be left out, as the model is quantised already", True)
        self._check_fixed_weights("with this model")

    @property
    def bits(self) -> Bits | None:
        """To which the blocks' linears are to be quantised whatever else would fit."""
        return 4 if self.load_in_4bit else 8 if self.load_in_8bit else None

    @property
    def cluster(self) -> Cluster:
        """The GPUs that are to compute a step."""
        network_gbit = 10.0 if self.network_gbit is None else self.network_gbit  # of one machine it does not matter
        return Cluster(
            num_nodes=self.nodes,
            gpus_per_node=self.num_gpus,
            network_gbit=network_gbit,
            shard_nodes=self.runtime.shard_nodes,
        )

    @property
    def keeps_dense(self) -> bool:
        """Whether they are to be quantised on no account."""
        return self.load_in_4bit is False or self.lsp.delta == "merged"

    @property
    def machine(self) -> HardwareProfile | None:
        """The machine that is named, with what is given in place of its own; None where it is to be measured."""
        return None if self.measure else self.altered(self._named())

    def altered(self, machine: HardwareProfile) -> HardwareProfile:
        """Return the machine with memory and link as they were given."""
        if self.gpu_memory_gb is not None:
            machine = replace(machine, device_memory_bytes=1e9 * self.gpu_memory_gb)
        if self.host_memory_gb is not None:
            machine = replace(machine, host_memory_bytes=1e9 * self.host_memory_gb)
        if self.link_gbps is not None:
            rate = 1e9 * self.link_gbps
            machine = replace(machine, d2h_bytes_per_s=rate, h2d_bytes_per_s=rate)
        return machine

    def _named(self) -> HardwareProfile:
        if self.hardware is None:
            names = ", ".join(hardware_names())
            raise ConfigError("hardware", f"be one of {names}, or --measure be given in its place", None)
        return load_hardware(self.hardware)
