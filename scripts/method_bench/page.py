"""The page methods.md, from whatever readings there are."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from scripts.method_bench.bars import Bar, Groups, all_bars, chosen, grouped, mean_score, shown, weak_points
from scripts.method_bench.memory import PARTS, bytes_by_part, kept_bytes
from scripts.method_bench.ours import Outcome, Setting
from scripts.method_bench.peers import PEERS
from scripts.method_bench.plot import draw
from scripts.method_bench.readings import DEFAULT_MODEL, Readings, Timed
from scripts.method_bench.tasks import METHODS, SCORED, Task, options_of, rate_of
from scripts.wrapped import wrapped

PACKAGES = ("lsp_ray", "torch", "transformers", "ray", "peft", "galore-torch", "deepspeed")
SKIPPED_STEPS = 2  # caches fill, GaLore decomposes, and the second step's memory is watched
Table = Sequence[Sequence[str]]

_HOW = (
    "bfloat16, 4 × at most 128 tokens (gsm8k 256, encoders 16 × at most 128). Where a CPU stands for the GPU, one "
    "thread computes; `lsp` and `zero_offload` have one more for their shard, in the place of a workstation's CPU, and "
    "the peers one in all. Every run is a process of its own, through the command line or the front door that its "
    "users have. Start-up is in no second: loading, and for `lsp` learning its projectors."
)
_STEPS = (
    "Timed in turn, in rounds, with each method's default ranks; peers have the same model, batches "
    "in the same order, dtype and attention kernels, and their first loss was checked against ours to 0.01. Their "
    "later losses are no comparison: HF's Trainer rounds updates to the nearest bfloat16, which loses small ones; "
    "lsp_ray rounds at random."
)
_MEMORY = (
    "What is kept between steps is equal to 2 % for lsp, lora and galore: the ranks follow from the model's shapes. "
    "Gradients come and go: `lsp` and `zero_offload` send theirs off layer by layer, `native` and `galore` hold all of "
    "them at the end of the backward. Peaks above are measured and hold them too."
)
_SCORES = (
    "Means over seeds ± standard deviation, at the rate of the lowest mean eval loss among those with the most seeds: "
    "the first seed is run at several rates, the others at its best one. Encoders warm up for a tenth of their steps: "
    "their heads start at random. Runs as another machine have default ranks, fewer eval examples, and `lsp` half as "
    "many steps again as `zero_offload`: they are for the time to the same loss alone."
)


def benches(timed: Mapping[Timed, Outcome]) -> dict[str, dict[Timed, Outcome]]:
    """Runs that can be compared, by what they were timed with; those of the default model first."""
    found: dict[str, dict[Timed, Outcome]] = {}
    for key, outcome in sorted(timed.items(), key=lambda item: item[0].model != DEFAULT_MODEL):
        found.setdefault(key.bench, {})[key] = outcome
    return found


def medians(timed: Mapping[Timed, Outcome]) -> dict[str, float]:
    """Seconds a step, by method or peer."""
    return {name: median(times_s) for name, times_s in step_seconds(timed).items()}


def step_seconds(timed: Mapping[Timed, Outcome]) -> dict[str, list[float]]:
    """By method or peer: the steps that count, of all rounds."""
    found: dict[str, list[float]] = {}
    for key, outcome in timed.items():
        found.setdefault(key.name, []).extend(outcome.step_s[min(SKIPPED_STEPS, key.num_steps - 1) :])
    return found


def figures(readings: Readings, found: Mapping[str, Task], *, judged: bool = True) -> dict[str, Any]:
    """What --json promises: medians of step_seconds, eval_loss and accuracy by task and method, perhaps the bars."""
    groups = grouped(readings.scored)
    losses = {task: {name: mean_score(runs, "loss") for name, runs in names.items()} for task, names in groups.items()}
    for key, outcome in readings.timed.items():  # a few steps of the default task, where it was not scored
        if "docstrings" not in groups:
            losses.setdefault("docstrings", {})[key.name] = outcome.scores["loss"]
    accuracy = {
        task: {name: mean_score(runs, score) for name, runs in names.items() if score in runs[0].scores}
        for task, names in groups.items()
        if task in found and "accuracy" in (score := found[task].score)
    }
    first = next(iter(benches(readings.timed).values()), {})
    bars = [{**asdict(bar), "verdict": bar.verdict} for bar in _bars(readings, found)] if judged else []
    for bar in bars:
        if bar["value"] == float("inf"):  # JSON has no such number
            bar["value"] = None
    return {"step_seconds": medians(first), "eval_loss": losses, "accuracy": accuracy, "bars": bars}


def write_page(readings: Readings, found: Mapping[str, Task], path: Path) -> None:
    """Write the page, and the plots beside it."""
    groups = grouped(readings.scored)
    bars = _bars(readings, found)
    weak = weak_points(bars, groups, found) or ["Nothing among these figures."]
    sections = {
        "In short": markdown(short_table(groups, found)) if groups else "",
        "Ratios": markdown([["", "measured"], *([bar.what, shown(bar.value)] for bar in bars)]),
        "What does not work as well": "\n".join(f"- {line}" for line in weak),
        "Seconds a step": "\n\n".join([_STEPS, *_steps_tables(readings.timed)]) if readings.timed else "",
    }
    if groups:
        scored = {name: task for name, task in found.items() if name in groups}
        sections |= {
            "Scores at equal bytes on the device": f"{_SCORES}\n\n{markdown(scores_table(readings.scored, found))}",
            "Bytes on the device": f"{_MEMORY}\n\n{markdown(memory_table(scored))}",
            "Eval loss against steps and seconds": _plots(readings, path),
        }
    parts = [_head(readings), *(f"## {title}\n\n{text}" for title, text in sections.items() if text)]
    path.write_text(wrapped("\n\n".join(parts) + "\n"), encoding="utf-8")


def short_table(groups: Groups, found: Mapping[str, Task]) -> Table:
    """For the README: what each task is judged by, of full fine-tuning and of methods that keep equal bytes."""
    rows = [["task", "", *("full" if method == "native" else method for method in SCORED)]]
    for name, names in groups.items():
        if name in found and any(method in names for method in SCORED):
            score = found[name].judged_by
            cells = [_spread([run.scores[score] for run in names[m]]) if m in names else "–" for m in SCORED]
            rows.append([name, f"eval {score}", *cells])
    return rows


def _steps_tables(timed: Mapping[Timed, Outcome]) -> list[str]:
    return [f"{bench}:\n\n{markdown(steps_table(runs))}" for bench, runs in benches(timed).items()]


def steps_table(timed: Mapping[Timed, Outcome]) -> Table:
    """Median and middle half of the timed steps, and the peak of device memory where it is measured."""
    rows = [["", "s a step", "middle half within", "peak device memory", ""]]
    last = {key.name: outcome for key, outcome in timed.items()}
    for name, times_s in step_seconds(timed).items():
        ordered, quarter = sorted(times_s), len(times_s) // 4
        spread = ordered[-1 - quarter] - ordered[quarter]
        rows.append([f"`{name}`", f"{median(ordered):.3g}", f"{spread:.2g}", _gigabytes(last[name]), last[name].note])
    return rows


def scores_table(outcomes: Mapping[Setting, Outcome], found: Mapping[str, Task]) -> Table:
    """Mean and standard deviation over seeds of eval loss and the task's own score."""
    rows = [["task", "method", "steps", "seeds", "learning rate", "eval loss", "score", "peak device memory"]]
    for task, names in chosen(outcomes).items():
        for name, settings in names.items():
            runs = [outcomes[setting] for setting in settings]
            score = found[task].score if task in found else "loss"
            if score not in runs[0].scores:  # emulated runs answer nothing
                score = "perplexity"
            losses, scores = ([run.scores[key] for run in runs] for key in ("loss", score))
            learning_rate = f"{rate_of(settings[0].method) * settings[0].rate_factor:g}"
            made = [str(settings[0].num_steps), str(len(runs)), learning_rate]
            rows.append([task, name, *made, _spread(losses), f"{score} {_spread(scores)}", _gigabytes(runs[0])])
    return rows


def memory_table(found: Mapping[str, Task]) -> Table:
    """Megabytes by part, of each model."""
    rows = [["model", "method", "ranks", *PARTS, "kept beside weights"]]
    for task in {task.model: task for task in found.values()}.values():
        for method in METHODS:
            options = options_of(method, shapes=task.shapes)
            ranks = [f"{name.rpartition('.')[2]} {value}" for name, value in options.items() if name.endswith(_RANKS)]
            parts = bytes_by_part(task.shapes, method, options)
            cells = [*(parts[part] for part in PARTS), kept_bytes(task.shapes, method, options)]
            rows.append([task.model, method, ", ".join(ranks), *(f"{size / 1e6:.1f} MB" for size in cells)])
    return rows


_RANKS = (".nnz_per_row", ".r", ".rank")


def markdown(table: Table) -> str:
    """The table with its first row as head."""
    head, *rows = table
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _bars(readings: Readings, found: Mapping[str, Task]) -> list[Bar]:
    step_s = {bench: medians(runs) for bench, runs in benches(readings.timed).items()}
    return all_bars(step_s, tuple(PEERS), grouped(readings.scored), found)


def _head(readings: Readings) -> str:
    told = ", ".join(f"{name} {found}" for name in PACKAGES if (found := _version(name)))
    days, processors, commands = (sorted(values) for values in zip(*readings.circumstances, strict=True))
    when = days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"
    how = "\n".join(f"- `{command}`" for command in dict.fromkeys(commands))
    where = "; ".join(dict.fromkeys(processors))
    circumstances = f"{when}, {where}, Python {platform.python_version()}, {told}. Made with"
    return f"# Methods and peers\n\n{circumstances}\n\n{how}\n\n{_HOW}"


def _plots(readings: Readings, path: Path) -> str:
    lines = []
    for task, names in chosen(readings.scored).items():
        settings = {name: group[0] for name, group in names.items()}
        curves = {name: readings.scored[setting] for name, setting in settings.items()}
        emulated = {name for name, setting in settings.items() if setting.emulate is not None}
        plain, slowed = ({n: c for n, c in curves.items() if (n in emulated) is side} for side in (False, True))
        processors = {name: readings.processors[settings[name]] for name in plain}
        judged = processors.get("lsp", next(iter(processors.values()), ""))
        elsewhere = [name for name, processor in processors.items() if processor != judged]
        file = path.with_name(f"{path.stem}-{task}.png")
        if draw(plain, slowed, task, file, elsewhere=elsewhere):
            lines.append(f"![{task}]({file.name})")
            if elsewhere:
                lines.append(f"{', '.join(elsewhere)}: on another processor, so without seconds.")
    return "\n\n".join(lines) or "No plots: matplotlib is not installed, or nothing was scored."


def _spread(values: Sequence[float]) -> str:
    return f"{fmean(values):.4g}" + (f" ± {stdev(values):.2g}" if len(values) > 1 else "")


def _gigabytes(outcome: Outcome) -> str:
    return "" if outcome.peak_bytes is None else f"{outcome.peak_bytes / 1e9:.2f} GB"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
