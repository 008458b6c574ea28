"""Trackers: TensorBoard and Weights & Biases as sinks; neither is imported before a run asks for it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from lsp_ray.config import ReportTo, RunConfig
from lsp_ray.errors import ConfigError, TrackerError
from lsp_ray.runtime.watch.metrics_file import METRICS, Sink, read_metrics
from lsp_ray.trace import StepMetrics

_WANDB_ID = Path("wandb") / "run_id"


def check_tracker(report_to: ReportTo) -> None:
    """Look whether the tracker's package is installed.

    Raises:
        ConfigError: It is not.
    """
    if report_to == "none":
        return
    spec = find_spec(report_to)
    if spec is None or spec.origin is None:  # a folder of that name, as W&B itself writes one, is no package
        bound = f"be none where {report_to} is not installed"
        raise ConfigError("report_to", bound, report_to, hint=f"pip install {report_to}")


@contextmanager
def _tensorboard(_config: RunConfig, folder: Path, num_before: int) -> Iterator[Sink]:
    """Write event files into `folder`/tensorboard, scalars named as in metrics.jsonl."""
    from torch.utils.tensorboard import SummaryWriter

    target = folder / "tensorboard"
    is_new = not target.exists()
    # readers drop what an earlier writer left of purge_step and later ones
    with SummaryWriter(str(target), purge_step=1 if is_new else num_before + 1, flush_secs=5) as writer:

        def write(metrics: StepMetrics) -> None:
            for name, value in scalars(metrics).items():
                writer.add_scalar(name, value, metrics.step)

        for metrics in read_metrics(folder / METRICS, num_before) if is_new else ():
            write(metrics)
        yield write


@contextmanager
def _wandb(config: RunConfig, folder: Path, num_before: int) -> Iterator[Sink]:
    """Log to a run of project lsp_ray (or WANDB_PROJECT), which goes on where the training goes on in its folder.

    Raises:
        TrackerError: W&B did not start: nobody is logged in, or the like.
    """
    import wandb

    id_path = folder / _WANDB_ID
    is_new = not id_path.exists()
    if is_new:
        id_path.parent.mkdir(exist_ok=True)
        id_path.write_text(secrets.token_hex(4), encoding="utf-8")
    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "lsp_ray"),
            name=folder.resolve().name,
            dir=folder,
            id=id_path.read_text(encoding="utf-8"),
            resume="allow",
            config=asdict(config),
        )
    except wandb.Error as error:
        raise TrackerError(f"wandb did not start: {' '.join(str(error).split())}") from error
    with run:
        first_step = run.step  # W&B drops steps before it, with a warning each

        def write(metrics: StepMetrics) -> None:
            if metrics.step >= first_step:
                run.log(scalars(metrics), step=metrics.step)

        for metrics in read_metrics(folder / METRICS, num_before) if is_new else ():
            write(metrics)
        yield write


# of a run, its folder, and the number of steps before those to come, which metrics.jsonl there has
TRACKERS: Mapping[str, Callable[[RunConfig, Path, int], AbstractContextManager[Sink]]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
}


def scalars(metrics: StepMetrics) -> dict[str, float]:
    """Return every number of a step but its own; those by name within a field as `field/name`."""
    fields = asdict(metrics)
    del fields["step"]
    found: dict[str, float] = {}
    for name, value in fields.items():
        if isinstance(value, dict):
            found |= {f"{name}/{part}": number for part, number in value.items()}
        elif value is not None:
            found[name] = value
    return found
