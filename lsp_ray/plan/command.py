"""The command of a run with the options of a forecast, and what a method trades for its speed."""

from __future__ import annotations

import shlex
from typing import Any

from lsp_ray.config import Bits, GaloreConfig, LoraConfig, LspConfig, Method, RunConfig, RuntimeConfig
from lsp_ray.plan.options import PlanConfig
from lsp_ray.sim.forecast import Forecast

TRADES: dict[Method, str] = {
    "native": "full fine-tuning, all on the device",
    "zero_offload": "full fine-tuning, Adam on the CPU",
    "lsp": "all weights, gradients compressed",
    "galore": "all weights, gradients compressed",
    "lora": "adapters only",
}
_ON_QUANTIZED: dict[Method, str] = {"lsp": "updates of rank d beside all matrices", "lora": "adapters only (QLoRA)"}


def trade_of(row: Forecast) -> str:
    """Return what a person gives and gets with `row`."""
    method, bits = row.workload.method, row.workload.bits
    if bits is None:
        return TRADES[method]
    return f"{_ON_QUANTIZED[method]}, weights rounded to {bits} bits, an adapter comes out"


def command_of(config: PlanConfig, row: Forecast, found_bits: Bits | None = None) -> str:
    """Return what to type for a run like `row`; what is a run's own default is left out, but for batch and length.

    Where the model is quantised already, `found_bits` says to how many bits.
    """
    work = row.workload
    options: dict[str, Any] = {
        "model_name_or_path": config.model_name_or_path,
        "dataset": config.dataset,
        "method": work.method,
        "max_seq_length": work.seq_length,
        "per_device_train_batch_size": work.batch_size,
        "gradient_accumulation_steps": work.num_micro_batches,
        "num_replicas": _unless(1, work.cluster.num_gpus),
        "runtime.address": "auto" if work.cluster.num_away else None,
        "runtime.shard_nodes": _unless(RuntimeConfig.shard_nodes, work.cluster.shard_nodes),
        "gradient_checkpointing": work.gradient_checkpointing or None,
        "runtime.activations": _unless("device", work.activations),
        "bf16": config.bf16,
        **({f"load_in_{work.bits}bit": True} if work.bits and not found_bits else {}),
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
        "runtime.payload_dtype": _unless(RuntimeConfig.payload_dtype, work.payload_dtype),
        "runtime.policy": _unless(default, row.policy),
    }
    if method == "lsp":
        nnz_per_row = _unless(LspConfig.nnz_per_row, work.nnz_per_row)
        return {
            "lsp.subspace_dim": work.subspace_dim,
            "lsp.nnz_per_row": nnz_per_row,
            "lsp.delta": "apart" if work.apart and work.bits is None else None,
            "runtime.weights": "host" if work.streams else None,
            **sent,
        }
    return sent


def _unless(default: Any, value: Any) -> Any:
    return None if value == default else value


def _typed(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
