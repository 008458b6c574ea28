"""The page docs/benchmarks/projection.md: what was measured, on what machine, and where the method loses."""

from __future__ import annotations

import datetime as dt
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from lsp_ray import __version__
from lsp_ray.projection.paper_fit import LEARNING_RATE
from scripts.projection_bench.kernels import KernelSize
from scripts.projection_bench.measure import METHODS, PAPER_STEPS, Measured, Point
from scripts.projection_bench.sharing import Shared
from scripts.projection_bench.tables import LABELS, TextTable, sentence
from scripts.projection_bench.transfer import Transfer

TOLD_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What the page is made of. `headline` and `grids` are by data set; `times_ms` by size, type, kernel."""

    command: str
    notes: tuple[str, ...]
    main: Point
    headline: dict[str, Measured]
    grids: dict[str, Measured]
    fit_seconds: dict[str, float]
    times_ms: dict[KernelSize, dict[str, dict[str, float]]]
    sharing: tuple[Shared, ...]
    transfers: tuple[Transfer, ...]
    wall_s: float


def page(findings: Findings, tables: Sequence[TextTable], plot_name: str | None) -> str:
    """Return the page in Markdown."""
    parts = [
        "# Projection: bias, seconds to fit, kernel times",
        "Written by the command below; do not edit. What the figures mean stands in `scripts/projection_bench/`.",
        _facts(findings),
        "\n".join(f"- {note}" for note in findings.notes),
        *(table.markdown() for table in tables),
    ]
    if plot_name:
        parts.append(f"![Held-out bias against bytes, for every method]({plot_name})")
    parts += ["## What does not work as well", "\n".join(f"- {remark}" for remark in remarks(findings))]
    return "\n\n".join(parts) + "\n"


def method_notes() -> tuple[str, ...]:
    """How the methods are set up, the same in every run."""
    return (
        "Bias is ‖c · P Pᵀ G Q Qᵀ − G‖ / ‖G‖ on micro-batches that no method has learned from, c the best scalar. "
        "Means over the micro-batches, then over the matrices, each with a P and a Q of its own.",
        "Bytes: P and Q have (M + N) · r bfloat16 values. GaLore's factors are dense bfloat16: two-sided "
        "(M + N) · k · 2 bytes, so k = r; one-sided min(M, N) · k · 2 bytes, so k = r (M + N) / min(M, N). The dense "
        "floor has P's and Q's numbers of columns as ranks, d / r times the bytes.",
        "GaLore and the floor take their singular vectors from the same calibration gradients, by exact "
        "eigendecompositions. A side below 2 d has half of itself for d, a multiple of r.",
        "Values sent a matrix are those of the compressed gradient: what crosses the link each way in a step.",
        "Balanced is what a run's default makes: bases U and V learned for S G Z, which has rows and columns of like "
        "size, and P = S U, Q = Z V. It trains better (docs/log.md), and by design not with the least bias for G "
        "itself: so its bases are judged by S G Z as well, as they are when a run measures them.",
        f"The paper's fit is given {PAPER_STEPS} Adam steps at learning rate {LEARNING_RATE}, no bound on bias or "
        "time, and never forms an (M, N) estimate. It starts from `random`, and its bases are made orthonormal.",
        "Seconds to fit start from the gradients: the closed form's include its sketches, neither includes a backward "
        "pass. Both fits of a matrix are made one right after the other.",
    )


def remarks(findings: Findings) -> Iterator[str]:
    """Say in plain words where the blocks lose."""
    for dataset, measured in findings.headline.items():
        yield _ranking(f"{dataset}, {findings.main}", measured, findings.main)
    for dataset, measured in findings.grids.items():
        for rival in ("galore_one_sided", "galore_two_sided", "paper"):
            yield from _losses(dataset, measured, rival)
    for size, times_ms in findings.times_ms.items():
        for dtype, times in times_ms.items():
            for rival in ("dense", "memcpy"):
                if times["ours"] > times[rival]:
                    ratio = times["ours"] / times[rival]
                    yield f"{size}, {dtype}: compress takes {ratio:.1f} times as long as {rival}."
    yield "Bias is not training: which fit trains best is another benchmark's question."


def _losses(dataset: str, measured: Measured, rival: str) -> Iterator[str]:
    lost = [
        str(point) for point in sorted(measured.biases) if measured.mean(point, rival) < measured.mean(point, "blocks")
    ]
    if lost:
        total = len(measured.biases)
        where = f"all {total} points" if len(lost) == total else f"{len(lost)} of {total} points: {sentence(lost)}"
        yield f"{dataset}: {LABELS[rival]} has less bias than {LABELS['blocks']} at {where}."


def _ranking(where: str, measured: Measured, point: Point) -> str:
    ranked = sorted(METHODS, key=lambda method: measured.mean(point, method))
    return f"{where}, least bias first: " + ", ".join(
        f"{LABELS[method]} {measured.mean(point, method):.3f}" for method in ranked
    )


def _facts(findings: Findings) -> str:
    lines = [
        f"    {findings.command}",
        "",
        f"{dt.datetime.now(dt.UTC).date()}, {findings.wall_s / 60:.0f} min; {_cpu()}; "
        f"{torch.get_num_threads()} thread of {len(os.sched_getaffinity(0))} cores; "
        f"load {os.getloadavg()[2]:.1f} over the last quarter of an hour; Python {platform.python_version()}, "
        f"torch {version('torch')}, transformers {version('transformers')}, lsp_ray {__version__}",
    ]
    return "\n".join(lines)


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    fields = {name.strip(): text.strip() for name, _, text in (line.partition(":") for line in lines)}
    flags = set(fields.get("flags", "").split())
    told = [flag for flag in TOLD_FLAGS if flag in flags]
    return f"{fields.get('model name', platform.machine())} ({', '.join(told) or 'no vector flags known'})"
