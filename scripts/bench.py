#!/usr/bin/env python3
"""Methods against each other and against their peers: seconds a step, eval loss and accuracy, loss against seconds.

    python scripts/bench.py --quick --json figures.json                 # steps of all, peers included; under 10 minutes
    python scripts/bench.py --data_dir ../shared/data --seeds 1,2,3     # every task; hours

Peers want the extra `bench` (commands in the README); one that is not there is left out, and said so. Every run's
figures go into methods.jsonl in --out, and after each methods.md and the plots beside it are written anew: the same
command goes on where it was interrupted, another one adds to what is there. With --quick nothing is kept or read.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from lsp_ray.data.stdlib_docstrings import stdlib_pairs
from scripts.method_bench import ours, page, peers
from scripts.method_bench.bars import EMULATED, at_best_rate, grouped
from scripts.method_bench.ours import Outcome, Setting
from scripts.method_bench.readings import DEFAULT_DATA, DEFAULT_LENGTH, DEFAULT_MODEL, Readings, Timed
from scripts.method_bench.tasks import METHODS, SCORED, Task, options_of, tasks, write_pairs

OUT = Path(__file__).resolve().parent.parent / "docs" / "benchmarks"
NUM_EVALS = 5  # between a run's steps
NUM_TIMED_EVALS, NUM_TIMED_SAMPLES = 10, 64  # where the time to a loss is judged: more of them, on fewer examples
EMULATED_STEPS = 40  # of zero_offload, where the time to its last loss is judged
MORE_STEPS = 1.5  # of LSP where time counts: its steps are cheaper, and it may spend some of that on more of them
SAME_LOSS = 1e-2
TIMED = (*METHODS, *peers.PEERS)
QUICK_TASK, QUICK_STEPS, QUICK_EVAL = "docstring-pairs", 8, 64  # scored with --quick, for the accuracy


class Bench:
    """What runs, what is kept, and what is written after each run.

    Args:
        found: The tasks that have data.
        readings: What was measured.
        after: Called after each run.
    """

    def __init__(self, found: dict[str, Task], readings: Readings, after: Callable[[], None]) -> None:
        self._found, self._readings, self._after = found, readings, after

    def time_steps(self, names: Sequence[str], like: Timed, *, rounds: int, num_eval: int) -> None:
        """Run these methods and peers in turn, in rounds, with the model and length of `like`."""
        missing = [name for name in names if name in peers.PEERS and not peers.is_there(name)]
        for peer in missing:
            _say(f"{peer}: left out, as {peers.PEERS[peer]} is not installed (the README has the commands)")
        for number, name in product(range(rounds), [name for name in names if name not in missing]):
            outcome = self._timed(replace(like, name=name, round=number), num_eval)
            _say(f"round {number + 1}: {name}: {median(outcome.step_s[page.SKIPPED_STEPS :]):.3g} s a step")
        self.check_first_losses()

    def score(self, settings: Sequence[Setting], factors: Sequence[float], num_eval: int | None = None) -> None:
        """Run each setting's first seed at every factor of its learning rate, and the others at the best one."""
        seeds = sorted({setting.seed for setting in settings})
        for setting in settings:
            if setting.seed == seeds[0]:
                tried = [_at(setting, factor) for factor in factors]
                for each in tried:
                    self._scored(each, num_eval)
        for setting in settings:
            if setting.seed != seeds[0]:
                tried = [_at(setting, factor, seed=seeds[0]) for factor in factors]
                (best,) = at_best_rate(tried, self._readings.scored)
                self._scored(_at(setting, best.rate_factor), num_eval)

    def score_emulated(self, names: Sequence[str]) -> None:
        """The offloading methods as the paper's machine, on the language tasks, with their default ranks."""
        num_steps = {"lsp": round(MORE_STEPS * EMULATED_STEPS), "zero_offload": EMULATED_STEPS}
        for task in (self._found[name] for name in names if self._found[name].kind == "causal_lm"):
            for method, steps in num_steps.items():
                self._scored(Setting(task=task.name, method=method, num_steps=steps, emulate=EMULATED), None)

    def _timed(self, key: Timed, num_eval: int) -> Outcome:
        def measure() -> Outcome:
            options = {"--model_name_or_path": key.model, "--dataset": key.dataset, "--max_eval_samples": str(num_eval)}
            options |= {"--max_seq_length": str(key.max_seq_length)}
            if key.name in peers.PEERS:
                return peers.run(key.name, num_steps=key.num_steps, options=options)
            # a step takes as long with learned projectors
            options |= {**options_of(key.name), "--lsp.fit": "random", "--lsp.check_every": "0"}
            return ours.run(Setting(task=key.dataset, method=key.name, num_steps=key.num_steps), options)

        outcome = self._readings.of(key, measure)
        self._after()
        return outcome

    def _scored(self, setting: Setting, num_eval: int | None) -> None:
        def measure() -> Outcome:
            task = self._found[setting.task]
            shapes = task.shapes if setting.emulate is None else None
            own = options_of(setting.method, rate_factor=setting.rate_factor, shapes=shapes)
            num_evals = NUM_EVALS if setting.emulate is None else NUM_TIMED_EVALS
            options = {**task.options, **own, **task.warmup(setting.num_steps)}
            options |= {"--eval_steps": str(max(1, setting.num_steps // num_evals))}
            if num_eval is not None:
                options |= {"--max_eval_samples": str(num_eval), "--eval_steps": "0"}
            if setting.emulate is not None:
                options |= {"--max_eval_answers": "0", "--max_eval_samples": str(NUM_TIMED_SAMPLES)}
            return ours.run(setting, options)

        outcome = self._readings.of(setting, measure)
        scores = ", ".join(f"{name} {score:.4g}" for name, score in outcome.scores.items())
        which = f"{setting.task}, seed {setting.seed}, {setting.num_steps} steps, rate × {setting.rate_factor:g}"
        _say(f"{which}: {setting.name}: {scores}, {sum(outcome.step_s):.0f} s of training")
        self._after()

    def check_first_losses(self) -> None:
        """No update is made before the first loss, so all must have the same one: else they do different jobs."""
        for runs in page.benches(self._readings.timed).values():
            first = {key.name: outcome.losses[0] for key, outcome in runs.items()}
            reference = "native" if "native" in first else next(iter(first))
            for name, loss in first.items():
                if abs(loss - first[reference]) > SAME_LOSS:
                    raise SystemExit(f"{name}: its first loss is {loss:.4f}, {reference}'s {first[reference]:.4f}")


def main() -> None:
    """Measure and write."""
    options = _options()
    if not options.quick:
        options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        pairs = Path(scratch) / "docstring_pairs.jsonl"
        write_pairs(pairs, stdlib_pairs())
        found = tasks(options.data_dir, pairs)
        readings = Readings(None if options.quick else options.out / "methods.jsonl")

        def figures() -> dict[str, Any]:
            return page.figures(readings, found, judged=not options.quick)  # a few steps reach and miss nothing

        def write() -> None:
            if options.json is not None:
                options.json.write_text(json.dumps(figures(), indent=2) + "\n", encoding="utf-8")
            if not options.quick:
                page.write_page(readings, found, options.out / "methods.md")

        bench = Bench(found, readings, write)
        if options.quick:
            _quick(bench)
        else:
            _full(bench, options, found)
    print(json.dumps(figures(), indent=2))
    _say(page.markdown(page.short_table(grouped(readings.scored), found)))


def _quick(bench: Bench) -> None:
    bench.time_steps(TIMED, Timed(name="", round=0, num_steps=5), rounds=1, num_eval=4)
    settings = [Setting(task=QUICK_TASK, method=method, num_steps=QUICK_STEPS) for method in SCORED]
    bench.score(settings, [1.0], num_eval=QUICK_EVAL)


def _full(bench: Bench, options: argparse.Namespace, found: dict[str, Task]) -> None:
    if options.rounds:
        if "deepspeed" in options.timed and peers.is_there("deepspeed"):
            peers.build_cpu_adam()
        like = Timed(
            name="",
            round=0,
            num_steps=options.timed_steps,
            model=options.timed_model,
            max_seq_length=options.timed_length,
            dataset=options.timed_dataset,
        )
        bench.time_steps(options.timed, like, rounds=options.rounds, num_eval=64)
    names = [name for name in options.tasks if name in found] if options.tasks else list(found)
    bench.score_emulated(names)
    points = product(names, options.methods, map(int, options.seeds), options.policies, options.links)
    settings = [
        Setting(
            task=task,
            method=method,
            num_steps=options.steps or found[task].num_steps,
            seed=seed,
            policy=policy,
            link_gbps=link,
        )
        for task, method, seed, policy, link in points
    ]
    bench.score(settings, options.rate_factors)


def _at(setting: Setting, factor: float, *, seed: int | None = None) -> Setting:
    return replace(setting, rate_factor=factor, seed=setting.seed if seed is None else seed)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="steps of all, in one round, and one short task")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--data_dir", type=Path, help="a folder with gsm8k and sst2_glue; without it two tasks")
    parser.add_argument("--tasks", type=_words, default=[], help="by commas; default: all that have data")
    parser.add_argument("--methods", type=_words, default=list(SCORED), help=f"scored; default: {','.join(SCORED)}")
    parser.add_argument("--policies", type=_words, default=[None], help="by commas; default: each method's own")
    parser.add_argument("--links", type=_numbers, default=[None], help="link_gbps, by commas; default: as it is")
    parser.add_argument("--seeds", type=_words, default=["42"])
    parser.add_argument("--rate_factors", type=_numbers, default=[1.0], help="of the learning rates; the best counts")
    parser.add_argument("--steps", type=int, help="of the runs that are scored; default: each task's own")
    parser.add_argument("--timed_steps", type=int, default=12, help="of the runs that are timed")
    parser.add_argument("--timed", type=_words, default=TIMED, help=f"default: {','.join(TIMED)}")
    parser.add_argument("--timed_model", default=DEFAULT_MODEL, help="an alias, a folder or a hub id")
    parser.add_argument("--timed_dataset", default=DEFAULT_DATA, help="as of python -m lsp_ray.run")
    parser.add_argument("--timed_length", type=int, default=DEFAULT_LENGTH, help="its max_seq_length")
    parser.add_argument("--rounds", type=int, default=2, help="of the runs that are timed; 0 times none")
    parser.add_argument("--out", type=Path, default=OUT, help="the folder of methods.md and methods.jsonl")
    options = parser.parse_args()
    for field, known in (("methods", METHODS), ("timed", TIMED)):
        for name in getattr(options, field):
            if name not in known:
                parser.error(f"--{field} must be some of {', '.join(known)}, got {name!r}")
    return options


def _words(text: str) -> list[str]:
    return text.split(",") if text else []


def _numbers(text: str) -> list[float]:
    return [float(word) for word in text.split(",")]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:  # the run has said what is wrong
        sys.exit(f"error: a run ended with exit code {error.returncode}; its message is above")
