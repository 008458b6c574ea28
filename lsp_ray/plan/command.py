"""The command of a run with the options of a forecast, and what a method trades for its speed."""

from __future__ import annotations

import shlex
from typing import Any

from lsp_ray.config import GaloreConfig, LoraConfig, LspConfig, Method, RunConfig, RuntimeConfig
from lsp_ray.plan.options import PlanConfig
from lsp_ray.sim.forecast import Forecast

TRADES: dict[Method, str] = {
    "native": "full fine-tuning, all on the device",
    "zero_offload": "full fine-tuning, Adam on the CPU",
    "lsp": "all weights, gradients compressed",
    "galore": "all weights, gradients compressed",
    "lora": "adapters only",
}


def command_of(config: PlanConfig, row: Forecast) -> str:
    """Return what to type for a run like `row`; what is a run's own default is left out, but for batch and length."""
    work = row.workload
    options: dict[str, Any] = {
        "model_name_or_path": config.model_name_or_path,
        "dataset": config.dataset,
        "method": work.method,
        "max_seq_length": work.seq_length,
        "per_device_train_batch_size": work.batch_size,
        "gradient_accumulation_steps": work.num_micro_batches,
        "gradient_checkpointing": work.gradient_checkpointing or None,
        "bf16": config.bf16,
        "max_grad_norm": config.max_grad_norm or None,
        "on_nonfinite": _unless("stop", config.on_nonfinite),
        **_of_method(work.method, config, row),
    }
    words = [word for name, value in options.items() if value is not None for word in (f"--{name}", _typed(value))]
    return shlex.join(["python", "-m", "lsp_ray.run", *words])


def _of_method(method: Method, config: PlanConfig, row: Forecast) -> dict[str, Any]:
    work = row.workload
    if method == "lora":
        return {"lora.r": _unless(LoraConfig.r, work.lora_rank)}
    if method == "galore":
        return {"galore.rank": _unless(GaloreConfig.rank, work.galore_rank)}
    if method == "native":
        return {}
    runtime = config.runtime
    default = RunConfig(method=method).policy
    sent = {
        "runtime.num_shards": runtime.num_shards,
        "runtime.shard_threads": runtime.shard_threads,
        "runtime.payload_dtype": _unless(RuntimeConfig.payload_dtype, runtime.payload_dtype),
        "runtime.policy": _unless(default, row.policy),
    }
    if method == "lsp":
        nnz_per_row = _unless(LspConfig.nnz_per_row, work.nnz_per_row)
        return {"lsp.subspace_dim": work.subspace_dim, "lsp.nnz_per_row": nnz_per_row, **sent}
    return sent


def _unless(default: Any, value: Any) -> Any:
    return None if value == default else value


def _typed(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
