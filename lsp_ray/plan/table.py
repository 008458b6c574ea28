"""A plan as tables of 80 columns."""

from __future__ import annotations

from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lsp_ray.config import Bits
from lsp_ray.plan.command import command_of, trade_of
from lsp_ray.plan.options import PlanConfig
from lsp_ray.plan.plan import Plan
from lsp_ray.sim.cluster import Cluster
from lsp_ray.sim.forecast import Forecast
from lsp_ray.sim.hardware_profile import RESERVE_BYTES, HardwareProfile
from lsp_ray.sim.hiding import LinkAdvice
from lsp_ray.sim.longest import Longest

_AS_FAST = 0.05  # of a step within which two methods are called as fast
_LEGEND = (
    "batch: examples of a micro-batch × micro-batches of a step",
    "ckpt: --gradient_checkpointing, host: with --runtime.activations host",
    "tok/s: tokens a second, padding counted",
    "device: GB at its peak with the longest batch; host: GB of main memory, with the",
    f"weights on their way to a GPU; GB: 10⁹ bytes, {RESERVE_BYTES / 1e9:g} GB of each memory stays free",
)
_SHARED_LEGEND = (
    "MB: of a GPU's payload each way; efficiency: tokens/s over those of as many GPUs",
    "that wait for nobody",
    "bound: the GPUs, or what they wait for longest: d2h, h2d (links), cpu (updates),",
    "network, driver; step and tokens/s: of all GPUs, forecast and nowhere measured",
)


def print_plan(plan: Plan, config: PlanConfig, console: Console) -> None:
    """Write what each method needs and what to choose to `console`."""
    model, machine, rows = plan.model, plan.hardware, plan.advice.rows
    dtype, length = ("bfloat16" if rows[0].workload.bf16 else "float32"), rows[0].workload.seq_length
    say(
        console,
        f"{model.num_parameters / 1e6:.0f} M parameters, {model.num_trained / 1e6:.0f} M trained, in {dtype}, "
        f"{length} tokens an example",
        f"{machine.name}: {_there(machine)}",
    )
    console.print()
    console.print(_methods(rows))
    if config.cluster.num_gpus > 1:
        console.print()
        say(console, f"on {_cluster(config.cluster)}, each GPU with the batch above:")
        console.print(_shared(rows))
    for method in plan.refused:
        say(console, f"{method}: not forecast, as it changes the weights, which are to be quantised")
    console.print()
    say(console, *_LEGEND)
    if config.cluster.num_gpus > 1:
        say(console, *_SHARED_LEGEND)
    elsewhere = [row.elsewhere.total_bytes for row in rows if row.elsewhere]
    if elsewhere:
        say(console, f"host: of the driver's node; of others {max(elsewhere) / 1e9:.1f} GB at most")
    if config.verbose:
        for table in (_memory(rows), _seconds_table(plan.by_policy())):
            console.print()
            console.print(table)
    best = plan.advice.recommended
    if best is not None:
        head, *others = recommendation(rows, best, plan.found_bits)
        say(console, "", head, command_of(config, best, plan.found_bits), *others)
        say(console, *_longer(plan.longest))
    say(console, *hidden_from(plan.link))


def _longer(found: Longest | None) -> Iterator[str]:
    if found is not None and found.host > found.device:
        yield (
            f"above {found.device:,} tokens an example: --runtime.activations host, up to {found.host:,} "
            f"(waits: {found.waits:.0%})"
        )


def say(console: Console, *lines: str) -> None:
    """Write lines as they are: what is to be pasted is not broken."""
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def recommendation(rows: tuple[Forecast, ...], best: Forecast, found_bits: Bits | None = None) -> list[str]:
    """Return a line for the method to take and one for each other one that fits.

    Args:
        rows: A forecast a method.
        best: The one of them to take.
        found_bits: Of a model that is quantised already: no option asks for them.
    """
    others = [row for row in rows if not row.misfits and row is not best]
    return [
        f"recommended: {best.workload.method}{_in_bits(best)}{_sent(best)}, {trade_of(best)}",
        *(f"  --method {_option(row, found_bits)}: {_pace(row, best)} here, {trade_of(row)}" for row in others),
    ]


def hidden_from(link: LinkAdvice | None) -> list[str]:
    """Return a line that says from how many tokens of a micro-batch the link is hidden, and what comes closer to it."""
    if link is None:
        return []
    line = (
        f"the link is hidden from {link.tokens} tokens of a micro-batch, {_examples(link.batch_size)}"
        f"{'' if link.fits else ', which do not fit'}; here {link.share:.0%} of a step waits for weights"
    )
    if link.divided is None:
        return [line]
    work = link.divided.workload
    return [
        f"{line}; with --per_device_train_batch_size {work.batch_size} --gradient_accumulation_steps "
        f"{work.num_micro_batches}, the same examples, {link.divided.exposed.weights_s / link.divided.step_s:.0%}"
    ]


def _examples(count: int) -> str:
    return "1 example" if count == 1 else f"{count} examples"


def _there(machine: HardwareProfile) -> str:
    host = f"{machine.host_memory_bytes / 1e9:.4g} GB"
    if not machine.on_gpu:
        return f"{host} of memory for device and host together"
    return f"{machine.device_memory_bytes / 1e9:.4g} GB of device memory, {host} of host memory"


def _pace(row: Forecast, best: Forecast) -> str:
    ratio = row.step_s / best.step_s * (best.workload.tokens_per_step / row.workload.tokens_per_step)
    if abs(ratio - 1.0) <= _AS_FAST:
        return "as fast"
    return f"{_times(1 / ratio)} × faster" if ratio < 1.0 else f"{_times(ratio)} × slower"


def _times(ratio: float) -> str:
    return f"{ratio:.2g}" if ratio < 10.0 else f"{ratio:.0f}"


def _methods(rows: tuple[Forecast, ...]) -> Table:
    table = _table("method", "batch", "ckpt", "device", "host", "step", "tok/s")
    table.add_column("fits", no_wrap=True)
    for row in rows:
        work = row.workload
        table.add_row(
            _method(row),
            f"{work.batch_size} × {work.num_micro_batches}",
            "host" if work.parks_inputs else "yes" if work.gradient_checkpointing else "no",
            f"{row.longest_bytes / 1e9:.1f}",
            f"{row.host.total_bytes / 1e9:.1f}",
            _seconds(row.step_s),
            f"{row.tokens_per_s:.0f}",
            _fits(row),
        )
    return table


def _cluster(cluster: Cluster) -> str:
    gpus = "1 GPU" if cluster.gpus_per_node == 1 else f"{cluster.gpus_per_node} GPUs"
    if cluster.num_nodes == 1:
        return gpus
    return f"{cluster.num_nodes} nodes of {gpus} at {cluster.network_gbit:g} Gbit/s"


def _shared(rows: tuple[Forecast, ...]) -> Table:
    """What several GPUs make of it."""
    table = _table("method", "payload", "MB", "step", "efficiency", "tokens/s")
    table.add_column("bound", no_wrap=True)
    for row in rows:
        work = row.workload
        if work.stays_on_device:
            table.add_row(
                _method(row), "–", "–", _seconds(row.step_s), "–", f"{row.tokens_per_s:.0f}", "runs on one GPU"
            )
        else:
            table.add_row(
                _method(row),
                work.payload_dtype,
                f"{row.bytes_each_way / 1e6:.1f}",
                _seconds(row.step_s),
                f"{row.efficiency:.2f}",
                f"{row.tokens_per_s:.0f}",
                row.bound,
            )
    return table


def _memory(rows: tuple[Forecast, ...]) -> Table:
    """Parts below each other, methods beside each other."""
    table = _table("GB", *(row.workload.method for row in rows))
    parts = {
        "weights": [row.device.weights for row in rows],
        "quantised": [row.device.quantized for row in rows],
        "weights coming up": [row.device.weight_buffers for row in rows],
        "for rounding": [row.device.noise for row in rows],
        "kept apart": [row.device.deltas for row in rows],
        "projectors": [row.device.projectors for row in rows],
        "optimizer": [row.device.optimizer_state for row in rows],
        "dequantised, of": [row.device.dequantized for row in rows],
        "activations": [row.device.activations for row in rows],
        "gradients": [row.device.gradients for row in rows],
        "payloads": [row.device.payload_buffers for row in rows],
        "device, typical": [row.device.peak_bytes for row in rows],
        "device, longest": [row.longest_bytes for row in rows],
        "host: slots": [row.host.object_store for row in rows],
        "host: processes": [row.host.processes for row in rows],
        "host: weights": [row.host.weights for row in rows],
        "host: activations": [row.host.inputs for row in rows],
    }
    for name, sizes in parts.items():
        table.add_row(name, *(f"{size / 1e9:.2f}" for size in sizes))
    return table


def _seconds_table(entries: list[Forecast]) -> Table:
    table = _table("method", "policy", "step", "exposed", "MB each way")
    table.add_column("busiest", no_wrap=True)
    for entry in entries:
        table.add_row(
            entry.workload.method,
            entry.policy or "–",
            _seconds(entry.step_s),
            f"{entry.exposed.total_s / entry.step_s:.0%}",
            f"{entry.bytes_each_way / 1e6:.1f}",
            entry.bottleneck,
        )
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column(first, no_wrap=True)
    for header in others:
        table.add_column(header, justify="right", no_wrap=True)
    return table


def _fits(row: Forecast) -> str:
    lacking = {"GPU" if need.where == "device" else "host" for need in row.misfits}
    return {0: "yes", 1: f"no: {''.join(lacking)}"}.get(len(lacking), "no: both")


def _method(row: Forecast) -> str:
    work = row.workload
    options = {
        "lsp": f" d {work.subspace_dim} r {work.nnz_per_row}",
        "lora": f" r {work.lora_rank}",
        "galore": f" rank {work.galore_rank}",
    }
    bits = f" {work.bits}-bit" if work.bits else ""
    bits += " host" if work.streams else ""
    return work.method + bits + options.get(work.method, "")


def _sent(row: Forecast) -> str:
    work = row.workload
    if work.cluster.num_gpus == 1:
        return ""
    dim = f" with d = {work.subspace_dim}" if work.method == "lsp" else ""
    return f"{dim} in {work.payload_dtype} on {_cluster(work.cluster)}"


def _in_bits(row: Forecast) -> str:
    bits = f" in {row.workload.bits} bits" if row.workload.bits else ""
    kept = [
        f"{what} in main memory, for which {waited_s / row.step_s:.0%} of a step waits"
        for is_kept, what, waited_s in (
            (row.workload.streams, "weights", row.exposed.weights_s),
            (row.workload.parks_inputs, "activations", row.exposed.activations_s),
        )
        if is_kept
    ]
    return f"{bits} with {' and '.join(kept)}" if kept else bits


def _option(row: Forecast, found_bits: Bits | None) -> str:
    bits = row.workload.bits
    return row.workload.method + (f" --load_in_{bits}bit true" if bits and not found_bits else "")


def _seconds(value_s: float) -> str:
    if value_s < 0.1:
        return f"{1e3 * value_s:.3g} ms"
    return f"{value_s:.3g} s" if value_s < 100 else f"{value_s:.0f} s"
