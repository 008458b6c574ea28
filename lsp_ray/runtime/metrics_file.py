"""metrics.jsonl: a line for every step, carried on where a run goes on from a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from lsp_ray.trace import StepMetrics

METRICS = "metrics.jsonl"


@contextmanager
def metrics_file(path: Path, *, source: Path | None, num_steps: int) -> Iterator[tuple[list[StepMetrics], TextIO]]:
    """Open a run's metrics for the steps to come; yields those of the steps before as well.

    Args:
        path: The file; what it holds of later steps is removed.
        source: Where the steps before are, perhaps `path` itself; lines that are missing there stay missing.
        num_steps: How many steps were made before.
    """
    earlier = list(read_metrics(source, num_steps)) if source is not None else []
    aside = path.with_name(f".{path.name}.new")
    aside.write_text("".join(line for line, _ in earlier), encoding="utf-8")
    aside.replace(path)
    with path.open("a", encoding="utf-8", buffering=1) as file:
        yield [metrics for _, metrics in earlier], file


def read_metrics(source: Path, num_steps: int) -> Iterator[tuple[str, StepMetrics]]:
    """Return the lines of the first steps and what they say, up to one that is cut off or of something else."""
    if not source.is_file():
        return
    with source.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                metrics = StepMetrics.from_json(json.loads(line))
            except (ValueError, RecursionError):
                return
            if metrics.step > num_steps:
                return
            yield line.rstrip("\n") + "\n", metrics


def write_metrics(file: TextIO, metrics: StepMetrics) -> None:
    """Append a step's line."""
    file.write(json.dumps(metrics.as_json(), allow_nan=False) + "\n")
