"""The plots of training loss against steps and against seconds. matplotlib is optional: without it there are none."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path

from scripts.method_bench.ours import Outcome

SMOOTHED_STEPS = 10


def smoothed(losses: Sequence[float]) -> list[float]:
    """Means over the last SMOOTHED_STEPS losses: every step sees another batch."""
    return [
        sum(part) / len(part) for at in range(len(losses)) if (part := losses[max(0, at + 1 - SMOOTHED_STEPS) : at + 1])
    ]


def draw(curves: Mapping[str, Outcome], title: str, path: Path) -> bool:
    """Write a PNG of two panels; returns False where matplotlib is not installed."""
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ModuleNotFoundError:
        return False
    matplotlib.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for name, outcome in curves.items():
        losses = smoothed(outcome.losses)
        panels[0].plot(range(1, len(losses) + 1), losses, label=name)
        panels[1].plot(list(accumulate(outcome.step_s)), losses, label=name)
    panels[0].set_xlabel("steps")
    panels[1].set_xlabel("seconds of training")
    panels[0].set_ylabel(f"training loss, mean of {SMOOTHED_STEPS} steps")
    panels[1].legend(fontsize=7, frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True
