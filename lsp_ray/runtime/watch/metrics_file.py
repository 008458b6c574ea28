"""metrics.jsonl: a line for every step, carried on where a run goes on from a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lsp_ray.trace import StepMetrics

METRICS = "metrics.jsonl"

Sink = Callable[[StepMetrics], None]
"""Where the metrics of a run's steps go: called with each step, in order."""


@contextmanager
def metrics_file(path: Path, earlier: Iterable[StepMetrics]) -> Iterator[Sink]:
    """Open a run's metrics for the steps to come; afterwards it holds those and `earlier`, and nothing else."""
    aside = path.with_name(f".{path.name}.new")
    with aside.open("w", encoding="utf-8") as file:
        file.writelines(map(_line, earlier))
    aside.replace(path)
    with path.open("a", encoding="utf-8", buffering=1) as file:

        def write(metrics: StepMetrics) -> None:
            file.write(_line(metrics))

        yield write


def read_metrics(path: Path, num_steps: int) -> Iterator[StepMetrics]:
    """Yield the first steps up to the number `num_steps`; what is missing or damaged ends them."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                metrics = StepMetrics.from_json(json.loads(line))
            except (ValueError, RecursionError):  # cut off, or of another version
                return
            if metrics.step > num_steps:
                return
            yield metrics


def _line(metrics: StepMetrics) -> str:
    return json.dumps(metrics.as_json(), allow_nan=False) + "\n"
