"""The bars that the figures are held to, and where a method is better than LSP, in words made from the figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from scripts.method_bench.ours import Outcome, Setting
from scripts.method_bench.tasks import Task

RIVALS = ("lora", "galore")
EMULATED = "rtx4090-threadripper"
MOST_TIME, MOST_STEP, MOST_BEHIND, ENOUGH_TASKS, NUM_TASKS = 0.5, 0.9, 0.01, 3, 4

Groups = Mapping[str, Mapping[str, Sequence[Outcome]]]
"""By task and name of the setting: a run for every seed, at the best rate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """`value` is None where it was not measured, and infinite where it was never reached."""

    what: str
    value: float | None
    bound: float
    is_floor: bool = False

    @property
    def verdict(self) -> str:
        """In a word."""
        if self.value is None:
            return "not measured"
        return "reached" if (self.value >= self.bound if self.is_floor else self.value <= self.bound) else "missed"


def grouped(outcomes: Mapping[Setting, Outcome]) -> Groups:
    """Runs that differ in their seed alone, of the best learning rate that was run with as many seeds."""
    return {
        task: {name: [outcomes[setting] for setting in group] for name, group in names.items()}
        for task, names in chosen(outcomes).items()
    }


def chosen(outcomes: Mapping[Setting, Outcome]) -> dict[str, dict[str, list[Setting]]]:
    """The settings that count, by task and name: of the longest runs those at the best rate, first seed first."""
    found: dict[str, dict[str, list[Setting]]] = {}
    for setting in sorted(outcomes, key=lambda setting: setting.seed):
        found.setdefault(setting.task, {}).setdefault(setting.name, []).append(setting)
    for names in found.values():
        for name, group in names.items():
            most = max(setting.num_steps for setting in group)
            names[name] = at_best_rate([setting for setting in group if setting.num_steps == most], outcomes)
    return found


def at_best_rate(group: Sequence[Setting], outcomes: Mapping[Setting, Outcome]) -> list[Setting]:
    """Of settings that differ in seed and rate: those of one rate, which has the most seeds.

    Among several such rates it is that of the lowest mean eval loss: one seed says little of a rate that is too high.
    """
    runs_at: dict[float, list[Setting]] = {}
    for setting in group:
        runs_at.setdefault(setting.rate_factor, []).append(setting)
    most = max(map(len, runs_at.values()))
    tried = [runs for runs in runs_at.values() if len(runs) == most]
    return min(tried, key=lambda runs: mean_score([outcomes[setting] for setting in runs], "loss"))


def all_bars(
    benches: Mapping[str, Mapping[str, float]], peers: Sequence[str], groups: Groups, found: Mapping[str, Task]
) -> list[Bar]:
    """Every bar with what the figures say; `benches` are seconds a step by what they were timed with, and by name."""
    language = [task for task in found.values() if task.kind == "causal_lm"]
    times = [
        Bar(
            what=f"{task.name}: LSP's seconds to Zero-Offload's last eval loss, over Zero-Offload's, as {EMULATED}",
            value=time_ratio(groups.get(task.name, {})),
            bound=MOST_TIME,
        )
        for task in language
    ]
    compared = [name for name in found if all(method in groups.get(name, {}) for method in ("lsp", *RIVALS))]
    won = sum(all(lead(groups[name], found[name], rival) >= 0 for rival in RIVALS) for name in compared)
    full = [name for name in found if all(method in groups.get(name, {}) for method in ("lsp", "native"))]
    behind = max((-lead(groups[name], found[name], "native") for name in full), default=None)
    return [
        *times,
        Bar(
            what=f"tasks of {NUM_TASKS} where LSP is at least as good as LoRA and GaLore at equal bytes",
            # fewer tasks cannot miss it
            value=float(won) if len(compared) >= NUM_TASKS or won >= ENOUGH_TASKS else None,
            bound=ENOUGH_TASKS,
            is_floor=True,
        ),
        Bar(
            what=f"how far LSP is behind full fine-tuning on any of {len(full)} tasks",
            value=behind,
            bound=MOST_BEHIND,
        ),
        *(_step_bar(f": {bench}", step_s, peers) for bench, step_s in benches.items()),
        *([] if benches else [_step_bar("", {}, peers)]),
    ]


def _step_bar(where: str, step_s: Mapping[str, float], peers: Sequence[str]) -> Bar:
    fastest = min((step_s[peer] for peer in peers if peer in step_s), default=None)
    value = step_s["lsp"] / fastest if fastest and "lsp" in step_s else None
    return Bar(what=f"LSP's step over that of the fastest peer{where}", value=value, bound=MOST_STEP)


def time_ratio(names: Mapping[str, Sequence[Outcome]]) -> float | None:
    """Of one task; see `time_to_same_loss`. None where the emulated runs are missing."""
    pair = [names.get(f"{method}, as {EMULATED}") for method in ("lsp", "zero_offload")]
    lsp, zero = pair
    return time_to_same_loss(lsp[0], zero[0]) if lsp and zero else None


def time_to_same_loss(lsp: Outcome, zero: Outcome) -> float:
    """LSP's seconds until a measured eval loss is at most Zero-Offload's last, over Zero-Offload's; ∞: never."""
    _, zero_s, target = zero.eval_curve[-1]
    reached = (seconds for _, seconds, loss in lsp.eval_curve if loss <= target)
    return next(reached, float("inf")) / zero_s


def mean_score(runs: Sequence[Outcome], score: str) -> float:
    """Over seeds."""
    return fmean(outcome.scores[score] for outcome in runs)


def lead(names: Mapping[str, Sequence[Outcome]], task: Task, other: str) -> float:
    """By which share of the other's score LSP is better, by the score that the task is judged by."""
    lsp, others = (mean_score(names[method], task.judged_by) for method in ("lsp", other))
    return (lsp - others if task.judged_by == "accuracy" else others - lsp) / others


def weak_points(bars: Sequence[Bar], groups: Groups, found: Mapping[str, Task]) -> list[str]:
    """Where something else is better than LSP, a sentence each."""
    ratios = [bar for bar in bars if not bar.is_floor and bar.value is not None]
    lines = [f"{bar.what}: {shown(bar.value)}." for bar in ratios if bar.value is not None and bar.value > 1]
    for name, task in found.items():
        names = groups.get(name, {})
        for other in ("native", *RIVALS) if "lsp" in names else ():
            if other in names and (behind := -lead(names, task, other)) > 0:
                values = " against ".join(f"{mean_score(names[m], task.judged_by):.4g}" for m in ("lsp", other))
                lines.append(f"{name}: LSP's {task.judged_by} is {behind:.1%} worse than that of {other} ({values}).")
    return lines


def shown(value: float | None) -> str:
    """A bar's value as text."""
    if value is None:
        return "–"
    return "never" if value == float("inf") else f"{value:.3g}"
