#!/usr/bin/env python3
"""Methods against each other and against their peers: seconds a step, eval loss and accuracy, loss against seconds.

    python scripts/bench.py --quick --json figures.json                 # steps of all, peers included; about 10 minutes
    python scripts/bench.py --data_dir ../shared/data --seeds 1,2,3     # every task; hours

Peers want `pip install -e .[bench]`; one that is not there is left out, and said so. Writes docs/benchmarks/methods.md
(not with --quick) and, where matplotlib is installed, a plot for every task beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from itertools import accumulate, product
from pathlib import Path
from statistics import median
from typing import Any

from scripts.method_bench import ours, page, peers
from scripts.method_bench.memory import bytes_by_part
from scripts.method_bench.ours import Outcome, Setting
from scripts.method_bench.plot import draw, smoothed
from scripts.method_bench.tasks import METHODS, Task, tasks

PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks" / "methods.md"
SKIPPED_STEPS = 2  # caches fill, GaLore decomposes, and the second step's memory is watched
STEP_OPTIONS = {"--lsp.fit": "random", "--lsp.check_every": "0"}  # a step takes as long with learned projectors
EMULATED = "rtx4090-threadripper"


def step_seconds(num_steps: int, rounds: int, num_eval: int) -> tuple[dict[str, list[float]], dict[str, Outcome]]:
    """Run every method and every peer in turn; returns the timed steps and the last outcome of each."""
    times_s: dict[str, list[float]] = {}
    last: dict[str, Outcome] = {}
    there = [peer for peer in peers.PEERS if peers.is_there(peer)]
    for peer in set(peers.PEERS) - set(there):
        _say(f"{peer}: left out, as {peers.PEERS[peer]} is not installed (pip install -e .[bench])")
    for number, name in product(range(rounds), [*METHODS, *there]):
        if name in METHODS:
            options = STEP_OPTIONS | {"--max_eval_samples": str(num_eval)}
            last[name] = ours.run(Setting(task="docstrings", method=name), options, num_steps=num_steps)
        else:
            last[name] = peers.run(name, num_steps=num_steps, seed=42, num_eval=num_eval)
        timed = last[name].step_s[min(SKIPPED_STEPS, num_steps - 1) :]
        times_s.setdefault(name, []).extend(timed)
        _say(f"round {number + 1}: {name}: {median(timed):.2f} s a step")
    return times_s, last


def matrix(settings: Sequence[Setting], found: dict[str, Task], num_steps: int) -> dict[Setting, Outcome]:
    """Run every setting once."""
    outcomes = {}
    for setting in settings:
        outcomes[setting] = outcome = ours.run(setting, found[setting.task].options, num_steps=num_steps)
        scores = ", ".join(f"{name} {score:.4g}" for name, score in outcome.scores.items())
        _say(f"{setting.task}, seed {setting.seed}: {setting.name}: {scores}, {sum(outcome.step_s):.0f} s of training")
    return outcomes


def time_to_same_loss(lsp: Outcome, zero: Outcome) -> float | None:
    """LSP's time until its smoothed training loss is Zero-Offload's last, over all of Zero-Offload's; None: never."""
    target = smoothed(zero.losses)[-1]
    reached = (
        end_s for end_s, loss in zip(accumulate(lsp.step_s), smoothed(lsp.losses), strict=True) if loss <= target
    )
    first_s = next(reached, None)
    return None if first_s is None else first_s / sum(zero.step_s)


def main() -> None:
    """Measure and write."""
    options = _options()
    with tempfile.TemporaryDirectory() as scratch:
        found = tasks(options.data_dir, Path(scratch))
        score_of_task = {task.name: task.score for task in found.values()}
        num_timed, num_eval = (6, 16) if options.quick else (12, 64)
        times_s, last = step_seconds(options.timed_steps or num_timed, 1 if options.quick else options.rounds, num_eval)
        outcomes = {} if options.quick else matrix(_settings(options, found), found, options.steps)
    figures: dict[str, Any] = {"step_seconds": {name: median(times) for name, times in times_s.items()}}
    short = {"docstrings": {name: outcome.scores["loss"] for name, outcome in last.items()}}
    figures |= page.figures(outcomes, score_of_task) if outcomes else {"eval_loss": short, "accuracy": {}}
    figures["time_to_zero_offloads_loss"] = ratios = _ratios(outcomes)
    if not options.quick:
        peaks = {name: outcome.peak_bytes for name, outcome in last.items()}
        sections = [
            ("Seconds a step", page.markdown(page.steps_table(times_s, peaks))),
            (
                "Device memory by part",
                page.markdown(page.memory_table({name: bytes_by_part(name) for name in METHODS})),
            ),
            (f"After {options.steps} steps", page.markdown(page.scores_table(outcomes, score_of_task))),
            ("Time to Zero-Offload's training loss", _ratio_lines(ratios)),
            ("Loss against steps and seconds", _plots(outcomes, options.out)),
        ]
        options.out.write_text(page.page(sections), encoding="utf-8")
    print(json.dumps(figures, indent=2))
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _settings(options: argparse.Namespace, found: dict[str, Task]) -> list[Setting]:
    """Every method on every task and seed; on the language tasks the two offloading ones as the paper's machine too."""
    asked = [name for name in options.tasks.split(",") if name in found] if options.tasks else list(found)
    points = product(asked, map(int, options.seeds.split(",")), options.policies, options.links, options.methods)
    settings = [
        Setting(task=task, method=method, seed=seed, policy=policy, link_gbps=link)
        for task, seed, policy, link, method in points
        if method in ("lsp", "zero_offload") or (policy is None and link is None)
    ]
    emulated = product([task for task in asked if task in ("docstrings", "gsm8k")], ("lsp", "zero_offload"))
    return settings + [Setting(task=task, method=method, emulate=EMULATED) for task, method in emulated]


def _ratios(outcomes: dict[Setting, Outcome]) -> dict[str, float | None]:
    names = [setting.task for setting in outcomes if setting.emulate is not None and setting.method == "lsp"]
    pair = {
        task: [outcomes[Setting(task=task, method=method, emulate=EMULATED)] for method in ("lsp", "zero_offload")]
        for task in names
    }
    return {task: time_to_same_loss(lsp, zero) for task, (lsp, zero) in pair.items()}


def _ratio_lines(ratios: dict[str, float | None]) -> str:
    how = f"LSP's seconds until its training loss is Zero-Offload's last, over Zero-Offload's seconds, as {EMULATED}."
    lines = [f"- {task}: {'never' if ratio is None else f'{ratio:.2f}'}" for task, ratio in ratios.items()]
    return "\n".join([how, "", *lines])


def _plots(outcomes: dict[Setting, Outcome], out: Path) -> str:
    lines = []
    for task in dict.fromkeys(setting.task for setting in outcomes):
        first = min(setting.seed for setting in outcomes if setting.task == task and setting.emulate is None)
        of_task = [setting for setting in outcomes if setting.task == task]
        curves = {s.name: outcomes[s] for s in of_task if s.seed == first or s.emulate is not None}
        path = out.with_name(f"{out.stem}-{task}.png")
        if draw(curves, task, path):
            lines.append(f"![{task}]({path.name})")
    return "\n\n".join(lines) or "No plots: matplotlib is not installed."


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="seconds a step alone, one round; about 10 minutes")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--data_dir", type=Path, help="a folder with gsm8k and sst2_glue; without it two tasks")
    parser.add_argument("--tasks", default="", help="names, by commas; default: all that have data")
    parser.add_argument("--methods", type=_words, default=list(METHODS), help=f"default: {','.join(METHODS)}")
    parser.add_argument("--policies", type=_words, default=[None], help="by commas; default: each method's own")
    parser.add_argument("--links", type=_numbers, default=[None], help="link_gbps, by commas; default: as it is")
    parser.add_argument("--seeds", default="42")
    parser.add_argument("--steps", type=int, default=200, help="of the runs that are scored")
    parser.add_argument("--timed_steps", type=int, help="of the runs that are timed; default 12, with --quick 6")
    parser.add_argument("--rounds", type=int, default=2, help="of the runs that are timed")
    parser.add_argument("--out", type=Path, default=PAGE, help="the page; plots are written beside it")
    return parser.parse_args()


def _words(text: str) -> list[str]:
    return text.split(",")


def _numbers(text: str) -> list[float]:
    return [float(word) for word in text.split(",")]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
