"""RunFolder: what a run left, as far as it can be read; what cannot is said in one line each."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import yaml

from lsp_ray.errors import ConfigError
from lsp_ray.output_folder import internal
from lsp_ray.trace import StepMetrics
from lsp_ray.trace_file import Trace, read_trace

REPORT = "report.html"
WARM_UP_STEPS = 2  # the first is slow, and the second's memory is measured, which makes it slow

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class LossPoint:
    """A loss after so many steps, which took so many seconds."""

    step: int
    seconds: float
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFolder:
    """`config` has dotted names; `complaints` name each file that is missing or cut short."""

    name: str
    config: dict[str, str]
    steps: tuple[StepMetrics, ...]
    summary: dict[str, Any]
    trace: Trace | None
    complaints: tuple[str, ...]

    @property
    def settled(self) -> tuple[StepMetrics, ...]:
        """The steps that figures are taken from: those after the warm-up, if there are any."""
        return self.steps[WARM_UP_STEPS:] or self.steps

    @property
    def training_losses(self) -> list[LossPoint]:
        """Of each step's own batch."""
        ends_s = accumulate(step.step_time_s for step in self.steps)
        return [
            LossPoint(step=step.step, seconds=end_s, loss=step.loss)
            for step, end_s in zip(self.steps, ends_s, strict=True)
        ]

    @property
    def eval_losses(self) -> list[LossPoint]:
        """On the held-out examples: before training, where it was measured between steps, and after training."""
        trained = self.training_losses
        pairs = [(point, step.eval_loss) for point, step in zip(trained, self.steps, strict=True)]
        points = [replace(point, loss=loss) for point, loss in pairs if loss is not None]
        before, after = (self.summary.get(f"eval_loss_{when}") for when in ("before", "after"))
        if isinstance(before, float):
            points.insert(0, LossPoint(step=0, seconds=0.0, loss=before))
        if isinstance(after, float) and trained:
            points.append(replace(trained[-1], loss=after))
        return points

    @property
    def step_time_s(self) -> float | None:
        """Median of the settled steps; None without steps."""
        return median(step.step_time_s for step in self.settled) if self.steps else None

    @property
    def figures(self) -> dict[str, Any]:
        """The summary; what it lacks, as the run has not ended, from configuration and steps."""
        known: dict[str, Any] = {
            "model": self.config.get("model_name_or_path"),
            "dataset": self.config.get("dataset"),
            "method": self.config.get("method"),
            "device": self.config.get("runtime.device"),
            "num_shards": self.config.get("runtime.num_shards"),
        }
        if self.steps:
            total_s = sum(step.step_time_s for step in self.settled)
            known |= {
                "tokens_per_second": sum(step.num_tokens for step in self.settled) / total_s,
                "overlap_fraction": 1.0 - sum(step.exposed_s for step in self.settled) / total_s,
                "bytes_d2h_per_step": median(step.bytes_d2h for step in self.steps),
                "bytes_h2d_per_step": median(step.bytes_h2d for step in self.steps),
            }
        if known.get("bytes_d2h_per_step"):
            known["policy"] = self.config.get("runtime.policy")
        return {**known, **self.summary}

    def typical_step(self) -> int | None:
        """The traced step, counted from 0, whose time is nearest to the median; None without a trace."""
        if self.trace is None or not self.trace.steps:
            return None
        times_s = {step: end_s - start_s for step, (start_s, end_s) in self.trace.steps.items()}
        settled = [step for step in times_s if step >= WARM_UP_STEPS] or list(times_s)
        median_s = self.step_time_s or median(times_s[step] for step in settled)
        return min(settled, key=lambda step: abs(times_s[step] - median_s))


def read_run(path: Path) -> RunFolder:
    """Read a run's output folder.

    Raises:
        ConfigError: It holds no file of a run.
    """
    names = ("config.yaml", "metrics.jsonl", "summary.json", "trace.json")
    if not any((path / name).is_file() for name in names[:3]):
        bound = "be the output folder of a run, with a config.yaml, a metrics.jsonl or a summary.json in it"
        raise ConfigError("run_dir", bound, str(path))
    complaints: list[str] = []
    return RunFolder(
        name=path.resolve().name,
        config=_read(path / "config.yaml", _config, complaints) or {},
        steps=_read(path / "metrics.jsonl", lambda file: _steps(file, complaints), complaints) or (),
        summary=_read(path / "summary.json", _summary, complaints) or {},
        trace=_read(internal(path, "trace.json"), lambda file: _trace(file, complaints), complaints),
        complaints=tuple(complaints),
    )


def _read(path: Path, read: Callable[[Path], _T], complaints: list[str]) -> _T | None:
    try:
        return read(path)
    except FileNotFoundError:
        complaints.append(f"{path.name} is missing")
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        complaints.append(f"{path.name} cannot be read ({' '.join(str(error).split())[:100]})")
    return None


def _config(path: Path) -> dict[str, str]:
    return dict(_flat(_mapping(yaml.safe_load(path.read_text(encoding="utf-8")))))


def _flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    flat: list[tuple[str, str]] = []
    for name, value in config.items():
        flat += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(f"{prefix}{name}", _shown(value))]
    return flat


def _shown(value: object) -> str:
    if value is None:
        return "–"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _steps(path: Path, complaints: list[str]) -> tuple[StepMetrics, ...]:
    steps: list[StepMetrics] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            steps.append(StepMetrics.from_json(json.loads(line)))
        except (ValueError, RecursionError):
            complaints.append(f"{path.name} is cut short or damaged in line {number}; the lines before it are shown")
            break
    return tuple(step for step in steps if math.isfinite(step.loss) and step.step_time_s > 0)


def _summary(path: Path) -> dict[str, Any]:
    return _mapping(json.loads(path.read_text(encoding="utf-8")))


def _trace(path: Path, complaints: list[str]) -> Trace:
    trace = read_trace(path)
    if not trace.is_complete:
        complaints.append(f"{path.name} is cut short; the {len(trace.steps)} steps before that are used")
    return trace


def _mapping(content: object) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ValueError("it is no table of names and values")
    return content
