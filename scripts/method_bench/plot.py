"""The plots of eval loss against steps and seconds. matplotlib is optional: without it there are none."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping
from pathlib import Path

from scripts.method_bench.bars import EMULATED
from scripts.method_bench.ours import Outcome

Curves = Mapping[str, Outcome]


def draw(plain: Curves, emulated: Curves, title: str, path: Path, *, elsewhere: Collection[str] = ()) -> bool:
    """Write a PNG of two panels, and of a third for the emulated runs, without those that would be empty.

    Plain runs whose names are in `elsewhere` have seconds that the others' cannot be compared with: steps alone show
    them. Returns False where matplotlib is missing.
    """
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ModuleNotFoundError:
        return False
    matplotlib.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    comparable = {name: outcome for name, outcome in plain.items() if name not in elsewhere}
    panels = [("steps", 0, plain), ("seconds of training", 1, comparable)] if plain else []
    panels += [("seconds, emulated", 1, emulated)] if emulated else []
    figure, rows = pyplot.subplots(1, len(panels), figsize=(4.5 * len(panels), 3.4), sharey=True, squeeze=False)
    (axes,) = rows
    colours: dict[str, str] = {}  # a method's is the same in every panel
    for axis, (label, column, curves) in zip(axes, panels, strict=True):
        for name, outcome in curves.items():
            colour = colours.setdefault(name.removesuffix(f", as {EMULATED}"), f"C{len(colours)}")
            points = outcome.eval_curve
            axis.plot(
                [point[column] for point in points], [point[2] for point in points], ".-", color=colour, label=name
            )
        axis.set_xlabel(label)
        axis.legend(fontsize=7, frameon=False)
    axes[0].set_ylabel("eval loss")
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True
