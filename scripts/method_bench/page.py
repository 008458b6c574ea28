"""The page docs/benchmarks/methods.md."""

from __future__ import annotations

import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from scripts.method_bench.memory import PARTS
from scripts.method_bench.ours import Outcome, Setting

PACKAGES = ("lsp_ray", "torch", "transformers", "ray", "peft", "galore-torch", "deepspeed")
Table = Sequence[Sequence[str]]


def steps_table(readings: Mapping[str, Sequence[float]], peaks: Mapping[str, int | None]) -> Table:
    """Median and middle half of the timed steps, and the peak of device memory where it is measured."""
    rows = [["", "s a step", "middle half within", "peak device memory"]]
    for name, times_s in readings.items():
        ordered, quarter = sorted(times_s), len(times_s) // 4
        peak = peaks.get(name)
        shown = "" if peak is None else f"{peak / 1e9:.2f} GB"
        rows.append([f"`{name}`", f"{median(ordered):.2f}", f"{ordered[-1 - quarter] - ordered[quarter]:.2f}", shown])
    return rows


def scores_table(outcomes: Mapping[Setting, Outcome], score_of_task: Mapping[str, str]) -> Table:
    """Mean and standard deviation over seeds of eval loss and the task's own score."""
    rows = [["task", "method", "seeds", "eval loss", "score", "peak device memory"]]
    for (task, name), group in _by_name(outcomes).items():
        score = score_of_task[task]
        losses, scores = ([outcome.scores[key] for outcome in group] for key in ("loss", score))
        peak = max(outcome.peak_bytes or 0 for outcome in group)
        shown = [str(len(group)), _spread(losses), f"{score} {_spread(scores)}", f"{peak / 1e9:.2f} GB"]
        rows.append([task, name, *shown])
    return rows


def memory_table(parts_of_method: Mapping[str, Mapping[str, float]]) -> Table:
    """Megabytes by part."""
    rows = [["method", *PARTS]]
    return [
        *rows,
        *([name, *(f"{parts[part] / 1e6:.1f} MB" for part in PARTS)] for name, parts in parts_of_method.items()),
    ]


def markdown(table: Table) -> str:
    """The table with its first row as head."""
    head, *rows = table
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def page(sections: Sequence[tuple[str, str]]) -> str:
    """Return the page in Markdown: where, when and how, then the sections."""
    command = shlex.join(["python", "scripts/bench.py", *sys.argv[1:]])
    told = ", ".join(f"{name} {found}" for name in PACKAGES if (found := _version(name)))
    head = (
        f"# Methods and peers\n\n`{command}`, {datetime.now(UTC).date().isoformat()}, {_processor()}, Python "
        f"{platform.python_version()}, {told}.\n\nbfloat16, 4 × at most 128 tokens and one thread unless said "
        "otherwise; `lsp` and `zero_offload` have one more thread for their shard. Runs take turns, each in a "
        "process of its own."
    )
    return "\n\n".join([head, *(f"## {title}\n\n{text}" for title, text in sections)]) + "\n"


def figures(outcomes: Mapping[Setting, Outcome], score_of_task: Mapping[str, str]) -> dict[str, Any]:
    """Means over seeds of what --json promises: eval_loss and the task's score, by task, then method."""
    found: dict[str, Any] = {"eval_loss": {}, "accuracy": {}}
    for (task, name), group in _by_name(outcomes).items():
        found["eval_loss"].setdefault(task, {})[name] = fmean(outcome.scores["loss"] for outcome in group)
        if "accuracy" in score_of_task[task]:
            scores = [outcome.scores[score_of_task[task]] for outcome in group]
            found["accuracy"].setdefault(task, {})[name] = fmean(scores)
    return found


def _by_name(outcomes: Mapping[Setting, Outcome]) -> dict[tuple[str, str], list[Outcome]]:
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for setting, outcome in outcomes.items():
        groups.setdefault((setting.task, setting.name), []).append(outcome)
    return groups


def _spread(values: Sequence[float]) -> str:
    return f"{fmean(values):.4g}" + (f" ± {stdev(values):.2g}" if len(values) > 1 else "")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
