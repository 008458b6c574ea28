#!/usr/bin/env python3
"""Held-out bias of sparse projectors and their rivals at the same bytes, seconds to fit, kernel times.

    OMP_NUM_THREADS=1 python scripts/bench_projection.py --gsm8k ../shared/data/gsm8k

Writes docs/benchmarks/projection.md and, where matplotlib is installed, projection.png beside it. The grid over (r, d)
is measured on a sample of layers, the point r=8 d=256 on every linear of the model; with --quick everything is sampled.
Run it with this repository on Python's path, as an editable installation has it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from lsp_ray.errors import LspRayError
from lsp_ray.models.shared_inputs import shared_inputs
from scripts.projection_bench.gradients import NUM_CALIBRATION, NUM_HELD_OUT, Source, open_source, spread
from scripts.projection_bench.kernels import KernelSize, kernel_times
from scripts.projection_bench.measure import FITS, METHODS, Measured, Point, Shape, measure
from scripts.projection_bench.page import Findings, method_notes, page
from scripts.projection_bench.plot import draw
from scripts.projection_bench.sharing import Shared, shared_biases
from scripts.projection_bench.tables import (
    TextTable,
    bias_table,
    fit_table,
    grid_table,
    kernel_table,
    sharing_table,
    transfer_table,
)
from scripts.projection_bench.transfer import transfers
from scripts.wrapped import wrapped

MODEL, STDLIB, GSM8K = "smollm2-135m", "stdlib-docstrings", "gsm8k"
MAIN = Point(8, 256)
GRID = tuple(Point(nnz_per_row, dim) for dim in (64, 128, 256, 384) for nnz_per_row in (1, 2, 4, 8, 16))
QUICK_GRID = (MAIN, Point(1, 256), Point(16, 256), Point(8, 64))
SAMPLED_LAYERS = 2
BATCH_SIZE, MAX_TOKENS = 4, 128
REPETITIONS = 25
SIZES = (KernelSize(), KernelSize(dim=2048, nnz_per_row=8))  # the first one is the JSON's
DTYPES = (torch.float32, torch.bfloat16)
JSON_DTYPE = "bfloat16"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code, 2 where a path or the model cannot be read."""
    options = _options(sys.argv[1:] if argv is None else argv)
    torch.set_num_threads(options.threads)
    console = Console()
    try:
        findings = _measure_all(options, console)
    except LspRayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    tables = _tables(findings)
    for table in tables:
        console.print(table.rich())
    options.out.mkdir(parents=True, exist_ok=True)
    drawn = draw(findings.grids, options.out / "projection.png")
    if not drawn:
        console.print("no plot: matplotlib is not installed")
    (options.out / "projection.md").write_text(
        wrapped(page(findings, tables, "projection.png" if drawn else None)), encoding="utf-8"
    )
    if options.json is not None:
        options.json.write_text(json.dumps(_summary(findings), indent=2) + "\n", encoding="utf-8")
    return 0


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gsm8k", metavar="PATH", help="a folder with gsm8k's JSONL files: measure on it as well")
    parser.add_argument("--json", metavar="PATH", type=Path, help="write the figures of r=8 d=256 here")
    parser.add_argument("--out", metavar="FOLDER", type=Path, default=Path("docs/benchmarks"), help="%(default)s")
    parser.add_argument("--quick", action="store_true", help="a few points on a sample of layers, under 5 minutes")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads (%(default)s)")
    return parser.parse_args(argv)


def _command(options: argparse.Namespace) -> str:
    """The command that repeats the measurement, without where its answers go."""
    words = ["python", "scripts/bench_projection.py", "--threads", str(options.threads)]
    words += ["--quick"] if options.quick else []
    words += ["--gsm8k", options.gsm8k] if options.gsm8k else []
    return shlex.join(words)


def _measure_all(options: argparse.Namespace, console: Console) -> Findings:
    begin_s = time.monotonic()
    console.print("kernel times")
    times_ms = {size: _kernel_times(size) for size in SIZES}
    headline: dict[str, Measured] = {}
    grids: dict[str, Measured] = {}
    notes = list(method_notes())
    counts: Counter[Shape] = Counter()
    sources: dict[str, Source] = {}
    for label, dataset in {STDLIB: STDLIB, GSM8K: options.gsm8k}.items():
        if dataset is None:
            continue
        source = open_source(MODEL, dataset, batch_size=BATCH_SIZE, max_seq_length=MAX_TOKENS, log=console.print)
        sources[label] = source
        counts = Counter(site.shape for layer in source.layers for site in layer.linears)
        sample = spread(len(source.layers), SAMPLED_LAYERS)
        grids[label] = _measure(source, sample, QUICK_GRID if options.quick else GRID, label, console)
        headline[label] = grids[label]
        if label == STDLIB and not options.quick:
            others = [index for index in range(len(source.layers)) if index not in sample]
            headline[label] = grids[label].merged(_measure(source, others, [MAIN], label, console), MAIN)
        notes.append(_data_note(label, sample, headline[label], source))
    extrapolated = ", extrapolated from the sampled layers" if options.quick else ""
    notes.append(
        f"Seconds are for all {counts.total()} linears at {MAIN} on {STDLIB}{extrapolated}: "
        "the median of each shape times the number of matrices of that shape."
    )
    fit_seconds = {fit: headline[STDLIB].fit_seconds(fit, counts) for fit in FITS}
    return Findings(
        command=_command(options),
        notes=tuple(notes),
        main=MAIN,
        headline=headline,
        grids=grids,
        fit_seconds=fit_seconds,
        times_ms=times_ms,
        sharing=tuple(_sharing(sources[STDLIB], sample if options.quick else None, console)),
        transfers=tuple(transfers(sources, sample, MAIN)) if len(sources) > 1 else (),
        wall_s=time.monotonic() - begin_s,
    )


def _measure(source: Source, layers: Sequence[int], points: Sequence[Point], label: str, console: Console) -> Measured:
    with console.status(f"{label}: {len(layers)} layers, {len(points)} points") as status:
        return measure(
            source.gradients(layers),
            points,
            MAIN,
            clock=time.perf_counter,
            on_done=lambda name: status.update(f"{label}: {name} done, {len(points)} points"),
        )


def _data_note(label: str, sample: Sequence[int], headline: Measured, source: Source) -> str:
    listed = ", ".join(map(str, sample))
    total = sum(len(layer.linears) for layer in source.layers)
    return (
        f"{label}: {MODEL} in float32, {NUM_CALIBRATION} micro-batches of {BATCH_SIZE} × at most {MAX_TOKENS} tokens "
        f"to learn from, {NUM_HELD_OUT} others to judge by; {MAIN} on {headline.num_matrices(MAIN)} of {total} "
        f"linears, the grid on those of layers {listed}."
    )


def _kernel_times(size: KernelSize) -> dict[str, dict[str, float]]:
    """By type, then kernel."""
    return {
        str(dtype).removeprefix("torch."): kernel_times(size, dtype, repetitions=REPETITIONS, clock=time.perf_counter)
        for dtype in DTYPES
    }


def _sharing(source: Source, layers: Sequence[int] | None, console: Console) -> list[Shared]:
    """Of all layers unless some are named."""
    with console.status("one Q for linears that read the same input"):
        chosen = range(len(source.layers)) if layers is None else layers
        return shared_biases(source.gradients(chosen), shared_inputs(source.model), MAIN)


def _tables(findings: Findings) -> list[TextTable]:
    tables = [
        bias_table(f"{label}, {MAIN}, mean of {measured.num_matrices(MAIN)} linears", measured, MAIN)
        for label, measured in findings.headline.items()
    ]
    tables.append(fit_table(f"Seconds to fit the whole model, {MAIN}", findings.fit_seconds))
    tables.append(sharing_table(f"One Q for linears that read the same input, {STDLIB}, {MAIN}", findings.sharing))
    if findings.transfers:
        tables.append(transfer_table(f"Projectors of another data set, {MAIN}, sampled layers", findings.transfers))
    for size, times_ms in findings.times_ms.items():
        tables.append(kernel_table(f"Compress, {size}, medians of {REPETITIONS}", times_ms))
    for label, measured in findings.grids.items():
        tables.append(grid_table(f"{label}, sampled layers", measured))
    return tables


def _summary(findings: Findings) -> dict[str, dict[str, float]]:
    headline = findings.headline[STDLIB]
    return {
        "heldout_bias": {method: headline.mean(MAIN, method) for method in METHODS},
        "fit_seconds": findings.fit_seconds,
        "kernel_ms": findings.times_ms[SIZES[0]][JSON_DTYPE],
    }


if __name__ == "__main__":
    sys.exit(main())
