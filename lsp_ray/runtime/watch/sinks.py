"""open_sinks: where a run's metrics go; metrics.jsonl, Ray's live metrics, TensorBoard and W&B are all Sinks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lsp_ray.config import RunConfig
from lsp_ray.runtime.watch.live_metrics import LiveMetrics
from lsp_ray.runtime.watch.metrics_file import METRICS, Sink, metrics_file
from lsp_ray.runtime.watch.trackers import TRACKERS
from lsp_ray.trace import StepMetrics


@contextmanager
def open_sinks(
    config: RunConfig, folder: Path, earlier: Iterable[StepMetrics], *, first_step: int
) -> Iterator[Sequence[Sink]]:
    """Open all that a run asks for; a step that is made again is in each file once.

    Args:
        config: Of the run.
        folder: Its output folder.
        earlier: The steps until the checkpoint that it goes on from, as far as they are known.
        first_step: Their number.
    """
    with ExitStack() as stack:
        sinks = [stack.enter_context(metrics_file(folder / METRICS, earlier))]
        if config.runtime.dashboard:
            sinks.append(LiveMetrics().step)
        if config.report_to != "none":
            sinks.append(stack.enter_context(TRACKERS[config.report_to](config, folder, first_step)))
        yield sinks
