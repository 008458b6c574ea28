"""The plot of bias against bytes. matplotlib is optional: without it there is no plot."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from scripts.projection_bench.measure import PAPER_STEPS, SCALED, Measured

STYLE = {
    "blocks": ("blocks", "#0072b2", "o", "-"),
    SCALED: ("blocks, balanced, bases for S G Z", "#56b4e9", "o", "--"),
    "blocks_balanced": ("blocks, balanced", "#004166", "o", ":"),
    "paper": (f"paper ({PAPER_STEPS} Adam steps)", "#d55e00", "s", "-"),
    "random": ("random blocks", "#999999", "x", "-"),
    "galore_two_sided": ("GaLore, two-sided", "#009e73", "^", "-"),
    "galore_one_sided": ("GaLore, one-sided", "#009e73", "v", "--"),
    "dense_floor": ("dense rank d, far more bytes", "#000000", "", ":"),
}


def draw(measured_by_dataset: dict[str, Measured], path: Path) -> bool:
    """Write a PNG with a panel for every data set and d; returns False where matplotlib is not installed."""
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ModuleNotFoundError:
        return False
    matplotlib.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    dims = sorted({point.subspace_dim for measured in measured_by_dataset.values() for point in measured.biases})
    figure, panels = pyplot.subplots(
        len(measured_by_dataset),
        len(dims),
        figsize=(3.3 * len(dims) + 0.6, 3.2 * len(measured_by_dataset) + 1.0),
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    for row, (dataset, measured) in enumerate(measured_by_dataset.items()):
        for column, dim in enumerate(dims):
            _panel(panels[row][column], measured, dim)
            panels[row][column].set_title(f"{dataset}, d = {dim}", fontsize=9)
        panels[row][0].set_ylabel("held-out relative bias")
    for panel in panels[-1]:
        panel.set_xlabel("KiB a matrix (mean)")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=4, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.16 / len(measured_by_dataset), 1, 1))
    figure.savefig(path, dpi=130, bbox_inches="tight")
    pyplot.close(figure)
    return True


def _panel(panel: Any, measured: Measured, dim: int) -> None:
    points = sorted(point for point in measured.biases if point.subspace_dim == dim)
    sizes_kib = [measured.mean_bytes(point) / 1024 for point in points]
    for method, (label, colour, marker, line) in STYLE.items():
        biases = [measured.mean(point, method) for point in points]
        if points:
            panel.plot(sizes_kib, biases, line, marker=marker or None, markersize=4, color=colour, label=label)
    panel.set_xscale("log", base=2)
    panel.set_ylim(0, 1.02)
    panel.grid(alpha=0.3)
    for size_kib, point in zip(sizes_kib, points, strict=True):
        panel.annotate(f"r={point.nnz_per_row}", (size_kib, 0.02), ha="center", fontsize=7, color="#555555")
