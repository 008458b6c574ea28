"""A plan as tables."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lsp_ray.plan.plan import Plan
from lsp_ray.sim.forecast import Forecast


def print_plan(plan: Plan, console: Console) -> None:
    """Write time, memory and advice to `console`."""
    model, machine = plan.model, plan.hardware
    console.print(
        f"{model.num_parameters / 1e6:.0f} M parameters, {model.num_trained / 1e6:.0f} M trained, on {machine.name}",
        highlight=False,
    )
    console.print(_times(plan.forecasts))
    console.print(_memory(plan.forecasts))
    for line in _misfits(plan.forecasts):
        console.print(Text(line))
    advice, best = plan.advice, plan.advice.forecast
    console.print(
        f"recommended: --method lsp --lsp.subspace_dim {advice.subspace_dim} --lsp.nnz_per_row {advice.nnz_per_row} "
        f"--runtime.num_shards {advice.num_shards} --runtime.shard_threads {advice.shard_threads} "
        f"--runtime.policy {advice.policy}: {_seconds(best.step_s)} a step, {best.tokens_per_s:.0f} tokens/s, "
        f"{best.device.peak_bytes / 1e9:.2f} GB on the device",
        highlight=False,
        soft_wrap=True,
    )


def _times(forecasts: tuple[Forecast, ...]) -> Table:
    table = Table(title="time", title_justify="left")
    for header in ("method", "policy"):
        table.add_column(header, no_wrap=True)
    for header in ("step", "tokens/s", "exposed", "each way"):
        table.add_column(header, justify="right")
    table.add_column("bottleneck")
    for entry in forecasts:
        table.add_row(
            _method(entry),
            entry.policy or "–",
            _seconds(entry.step_s),
            f"{entry.tokens_per_s:.0f}",
            f"{entry.exposed.total_s / entry.step_s:.0%}",
            f"{entry.bytes_each_way / 1e6:.1f} MB",
            entry.bottleneck,
        )
    return table


def _memory(forecasts: tuple[Forecast, ...]) -> Table:
    table = Table(title="memory, GB", title_justify="left")
    for header in ("method", "policy"):
        table.add_column(header, no_wrap=True)
    parts = ("weights", "projectors", "optimizer", "activations", "gradients", "payloads", "device")
    for header in (*parts, "longest batch", "store", "host"):
        table.add_column(header, justify="right")
    for entry in forecasts:
        device, host = entry.device, entry.host
        sizes = (
            *(device.weights, device.projectors, device.optimizer_state, device.activations),
            *(device.gradients, device.payload_buffers, device.peak_bytes, entry.longest_bytes),
            *(host.object_store, host.total_bytes),
        )
        table.add_row(_method(entry), entry.policy or "–", *(f"{size / 1e9:.2f}" for size in sizes))
    return table


def _misfits(forecasts: tuple[Forecast, ...]) -> list[str]:
    """One line for each method and what it lacks, with the policies that it holds for where they differ."""
    return list(
        dict.fromkeys(
            f"does not fit: {_method(entry)}{f' {entry.policy}' if entry.policy else ''}: {misfit}"
            for entry in forecasts
            for misfit in entry.misfits
        )
    )


def _method(entry: Forecast) -> str:
    work = entry.workload
    options = {
        "lsp": f" ({work.subspace_dim}, {work.nnz_per_row})",
        "lora": f" (r = {work.lora_rank})",
        "galore": f" (rank {work.galore_rank})",
    }
    return work.method + options.get(work.method, "")


def _seconds(value_s: float) -> str:
    return f"{value_s:.2f} s" if value_s >= 1 else f"{1e3 * value_s:.1f} ms"
