"""Plan: every method and policy on one machine, and what to choose."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

from lsp_ray.config import Method, PolicyName, RuntimeConfig
from lsp_ray.plan.options import PlanConfig
from lsp_ray.plan.typical_batch import TypicalBatch
from lsp_ray.runtime.layout import divide_cores
from lsp_ray.sim.advice import Advice, advise, largest_hidden_dim
from lsp_ray.sim.forecast import Forecast, forecast
from lsp_ray.sim.hardware_profile import HardwareProfile
from lsp_ray.sim.model_shape import ModelShape
from lsp_ray.sim.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Forecasts for what was asked for, and advice.

    Attributes:
        model: What is trained.
        hardware: Where.
        forecasts: Method by method, policy by policy.
        advice: LSP's options that suit both.
    """

    model: ModelShape
    hardware: HardwareProfile
    forecasts: tuple[Forecast, ...]
    advice: Advice

    def as_json(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        return {
            "hardware": asdict(self.hardware),
            "num_parameters": self.model.num_parameters,
            "num_trained": self.model.num_trained,
            "forecasts": [_forecast_json(entry) for entry in self.forecasts],
            "advice": {
                "lsp.subspace_dim": self.advice.subspace_dim,
                "lsp.nnz_per_row": self.advice.nnz_per_row,
                "runtime.num_shards": self.advice.num_shards,
                "runtime.shard_threads": self.advice.shard_threads,
                "runtime.policy": self.advice.policy,
                "forecast": _forecast_json(self.advice.forecast),
            },
        }


def make_plan(model: ModelShape, work: Workload, hardware: HardwareProfile, *, auto_dim: bool) -> Plan:
    """Forecast every method, and those that send something under every policy.

    Args:
        model: What is trained.
        work: LSP's step.
        hardware: Where.
        auto_dim: Whether `work` gets the largest subspace whose traffic and updates are hidden.

    Raises:
        ConfigError: Every linear is too small for a subspace.
    """
    if auto_dim:
        work = replace(work, subspace_dim=largest_hidden_dim(model, work, hardware))
    methods: tuple[Method, ...] = ("native", "galore", "lora", "zero_offload", "lsp")
    works = [replace(work, method=method) for method in methods]
    forecasts = [
        forecast(model, each, hardware, policy)
        for each in works
        for policy in ((None,) if each.stays_on_device else get_args(PolicyName))
    ]
    return Plan(model=model, hardware=hardware, forecasts=tuple(forecasts), advice=advise(model, work, hardware))


def workload_of(
    config: PlanConfig, *, num_units: int, cores: int, on_gpu: bool, batch: TypicalBatch | None = None
) -> Workload:
    """LSP's step with these options; d is a start of 256 where it is left open. Shards and threads are a run's."""
    asked = RuntimeConfig(num_shards=config.runtime.num_shards, shard_threads=config.runtime.shard_threads)
    shares = divide_cores(asked, num_units=num_units, cores=cores, on_gpu=on_gpu)
    dim = config.lsp.subspace_dim
    return Workload(
        method="lsp",
        batch_size=config.per_device_train_batch_size,
        seq_length=config.max_seq_length,
        typical_length=None if batch is None else batch.padded_length,
        typical_targets=None if batch is None else batch.num_targets,
        num_micro_batches=config.gradient_accumulation_steps,
        bf16=config.bf16,
        gradient_checkpointing=config.gradient_checkpointing,
        subspace_dim=256 if dim == "auto" else dim,
        nnz_per_row=config.lsp.nnz_per_row,
        lora_rank=config.lora.r,
        galore_rank=config.galore.rank,
        num_shards=shares.num_shards,
        shard_threads=shares.shard_threads,
        shard_by=config.runtime.shard_by,
        payload_dtype=config.runtime.payload_dtype,
        pinned=config.runtime.pinned,
        speculates=config.max_grad_norm > 0 or config.on_nonfinite == "skip",
    )


def _forecast_json(entry: Forecast) -> dict[str, Any]:
    return {
        "method": entry.workload.method,
        "policy": entry.policy,
        "subspace_dim": entry.workload.subspace_dim if entry.workload.method == "lsp" else None,
        "step_s": entry.step_s,
        "tokens_per_s": entry.tokens_per_s,
        "bottleneck": entry.bottleneck,
        "busy_s": entry.busy_s,
        "exposed_s": asdict(entry.exposed),
        "bytes_each_way": entry.bytes_each_way,
        "device_bytes": {**asdict(entry.device), "peak": entry.device.peak_bytes, "longest": entry.longest_bytes},
        "host_bytes": {**asdict(entry.host), "total": entry.host.total_bytes},
        "misfits": list(entry.misfits),
    }
