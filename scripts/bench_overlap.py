#!/usr/bin/env python3
"""How much of offloading is hidden: LSP against Zero-Offload, native and threads; the simulator against all of them.

    python scripts/bench_overlap.py [--quick] [--json PATH]

SmolLM2-135M, 4 × 128 tokens, one device thread, one shard; every setting is a run of its own, in turn.
Writes docs/benchmarks/overlap.md. The simulator is given what runs without a throttle measured and predicts the others.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from lsp_ray.config import RunConfig
from lsp_ray.hardware import MACHINES
from lsp_ray.runtime.event_log import Decision, read_event_log
from lsp_ray.runtime.throttle import Throttle, emulating
from lsp_ray.schedule.ops import CostsMeasured, LayerSeconds
from lsp_ray.schedule.policy import POLICIES
from lsp_ray.sim.costs import LayerCosts, StepCosts
from lsp_ray.sim.simulator import Simulator
from scripts.overlap_settings import (
    COMPARED,
    LSP,
    NATIVE,
    PAPER_MACHINE,
    PREDICTED,
    PREDICTED_QUICK,
    THREADS,
    ZERO,
    Setting,
    own_policy,
)
from scripts.sim_paper import paper_figures

PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks" / "overlap.md"
SKIPPED_STEPS = 3  # caches fill, the second step's memory is watched, and deltas arrive from the second step on
HOP_S = 0.0008  # a call to an actor and back (docs/log.md)


@dataclass(frozen=True, slots=True)
class Reading:
    """Medians over the steps of all rounds of a setting; seconds.

    `compute_s` is what the emulated link and shards were scaled to, None where nothing is emulated.
    """

    step_s: float
    exposed_s: float
    spread_s: float
    layers: tuple[LayerSeconds, ...]
    compute_s: float | None

    @property
    def exposed_fraction(self) -> float:
        """Of the step."""
        return self.exposed_s / self.step_s


@dataclass(frozen=True, slots=True)
class Measured:
    """One run: the timed lines of metrics.jsonl, what its layers cost, and `compute_s` as in `Reading`."""

    lines: list[dict[str, Any]]
    layers: tuple[LayerSeconds, ...]
    compute_s: float | None


def run(setting: Setting, num_steps: int) -> Measured:
    """Run a setting in a folder of its own and read what it left."""
    with tempfile.TemporaryDirectory() as folder:
        output_dir = Path(folder) / "run"
        config = setting.config(output_dir, num_steps)
        if setting.on_ray:
            subprocess.run(
                [sys.executable, "-m", "lsp_ray.run", *_options(config)], check=True, stdout=subprocess.DEVNULL
            )
        else:
            process = multiprocessing.get_context("spawn").Process(target=_run_on_threads, args=(config,))
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(f"{setting.name} failed")
        lines = _read_lines(output_dir / "metrics.jsonl")
        told = [decision.event for decision in _decisions(output_dir / "events.jsonl")]
        compute_s = json.loads((output_dir / "summary.json").read_text(encoding="utf-8"))["emulated_compute_s"]
    costs = [event.layers for event in told if isinstance(event, CostsMeasured)]
    return Measured(lines[SKIPPED_STEPS:], costs[-1] if costs else (), compute_s)


def _options(config: RunConfig) -> list[str]:
    values: dict[str, object] = {"--method": config.method, "--output_dir": config.output_dir}
    values |= {"--max_steps": config.max_steps, "--max_eval_samples": config.max_eval_samples, "--bf16": "true"}
    values |= {f"--lsp.{name}": getattr(config.lsp, name) for name in ("subspace_dim", "fit", "check_every")}
    names = ("device", "num_shards", "device_threads", "shard_threads", "policy", "link_gbps", "emulate")
    values |= {f"--runtime.{name}": getattr(config.runtime, name) for name in names}
    return [text for name, value in values.items() if value is not None for text in (name, str(value))]


def _run_on_threads(config: RunConfig) -> None:
    from lsp_ray.report.progress import Progress
    from lsp_ray.runtime.fine_tune import fine_tune
    from lsp_ray.runtime.job import prepare_job
    from lsp_ray.runtime.thread_workers import ThreadWorkers

    job = prepare_job(config, lambda _line: None)
    workers = ThreadWorkers(job)
    try:
        assert config.output_dir is not None
        Path(config.output_dir).mkdir()
        with Progress() as progress:
            fine_tune(job, workers, Path(config.output_dir), progress, str)
    finally:
        workers.close()


def _decisions(path: Path) -> list[Decision]:
    return list(read_event_log(path)[1])


def _read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def readings(
    settings: Sequence[Setting], *, num_steps: int, rounds: int, say: Callable[[str], None]
) -> dict[Setting, Reading]:
    """Run every setting once in each round."""
    runs: dict[Setting, list[Measured]] = {setting: [] for setting in settings}
    for number in range(rounds):
        for setting in settings:
            measured = run(setting, num_steps)
            runs[setting].append(measured)
            step_s = median(line["step_time_s"] for line in measured.lines)
            say(f"round {number + 1}: {setting.name}: {step_s:.3f} s a step")
    return {setting: _reading(runs[setting]) for setting in settings}


def _reading(runs: Sequence[Measured]) -> Reading:
    lines = [line for measured in runs for line in measured.lines]
    scaled_to_s = [measured.compute_s for measured in runs if measured.compute_s is not None]
    times_s = sorted(line["step_time_s"] for line in lines)
    waits_s = [line["exposed_d2h_s"] + line["exposed_cpu_s"] + line["exposed_h2d_s"] for line in lines]
    quarter = len(times_s) // 4
    spread_s = times_s[-1 - quarter] - times_s[quarter]
    compute_s = median(scaled_to_s) if scaled_to_s else None
    return Reading(median(times_s), median(waits_s), spread_s, runs[-1].layers, compute_s)


def predicted_step_s(
    setting: Setting, free: Reading, sizes: Sequence[int], full_numel: int, compute_s: float | None
) -> float:
    """Simulate a setting from what the unthrottled run of the same work measured.

    A throttled copy takes its bytes over the rate, and an emulated machine's update its elements over the rate, unless
    the real ones are slower by themselves. An emulated machine is that of the live run, scaled to the same `compute_s`.
    """
    throttle = Throttle(link_gbps=setting.link_gbps)
    if setting.emulate is not None:
        assert compute_s is not None, "a run that emulates says what it scaled to"
        throttle = emulating(MACHINES[setting.emulate], compute_s=compute_s, full_numel=full_numel)
    link_bytes_per_s = float("inf") if throttle.link_gbps is None else throttle.link_gbps * 1e9
    updates_per_s = throttle.updates_per_s or float("inf")
    layers = tuple(
        LayerCosts(
            forward_s=layer.forward_s,
            backward_s=layer.backward_s,
            d2h_s=max(layer.d2h_s, 4 * size / link_bytes_per_s),
            cpu_s=max(layer.cpu_s, size / updates_per_s),
            h2d_s=max(layer.h2d_s, 4 * size / link_bytes_per_s),
        )
        for layer, size in zip(free.layers, sizes, strict=True)
    )
    shard_of_layer = [0] * len(layers)
    policy = POLICIES[setting.policy or own_policy(setting.method)](shard_of_layer)
    return Simulator(StepCosts(layers=layers, hop_s=HOP_S), policy, shard_of_layer, num_steps=10).run().typical.step_s


def is_predicted(setting: Setting) -> bool:
    """Whether the simulator predicts it, from the run that it is `free` of."""
    return setting != setting.free and setting.method != "native" and setting.on_ray


def _payload_sizes(setting: Setting) -> tuple[int, ...]:
    from lsp_ray.runtime.job import prepare_job

    return prepare_job(setting.config(Path("unused"), 1), lambda _line: None).payload_sizes


def main() -> None:
    """Measure, predict, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one round of fewer steps, two predictions; 8 minutes")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    options = parser.parse_args()
    num_steps, rounds = (8, 1) if options.quick else (10, options.rounds)
    compared = readings(COMPARED, num_steps=num_steps, rounds=rounds, say=_say)
    others = [s for s in (PREDICTED_QUICK if options.quick else PREDICTED) if s not in compared]
    free = {setting.free for setting in others} - set(compared)
    rest = readings([*sorted(free, key=lambda s: s.name), *others], num_steps=num_steps, rounds=1, say=_say)
    found = compared | rest
    sizes = {setting.free: _payload_sizes(setting.free) for setting in found if setting.method != "native"}
    errors = {}
    for setting in filter(is_predicted, found):
        free_sizes, compute_s = sizes[setting.free], found[setting].compute_s
        step_s = predicted_step_s(setting, found[setting.free], free_sizes, sum(sizes[ZERO]), compute_s)
        errors[setting.name] = step_s / found[setting].step_s - 1.0
    figures = _figures(found, errors)
    if not options.quick:
        PAGE.write_text(_page(found, figures), encoding="utf-8")
    print(json.dumps(figures, indent=2))
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _figures(found: dict[Setting, Reading], errors: dict[str, float]) -> dict[str, Any]:
    emulated_lsp, emulated_zero = (found[replace(setting, emulate=PAPER_MACHINE)] for setting in (LSP, ZERO))
    return {
        "lsp_over_zero_offload": emulated_lsp.step_s / emulated_zero.step_s,
        "exposed_fraction": emulated_lsp.exposed_fraction,
        "lsp_over_native": found[LSP].step_s / found[NATIVE].step_s,
        "ray_over_threads": found[LSP].step_s / found[THREADS].step_s,
        "simulator_error": errors,
        "paper": {name: [figure.paper, figure.simulated] for name, figure in paper_figures().items()},
    }


def _page(found: dict[Setting, Reading], figures: dict[str, Any]) -> str:
    today = datetime.now(UTC).date().isoformat()
    rows = "\n".join(
        f"| {setting.name} | {reading.step_s:.3f} | {reading.spread_s:.3f} | {reading.exposed_fraction:.1%} "
        f"| {_percent(figures['simulator_error'].get(setting.name))} |"
        for setting, reading in found.items()
    )
    ratios = "\n".join(
        f"| {name} | {figures[key]:.3f} | {bound} |"
        for name, key, bound in (
            ("LSP over Zero-Offload, both as rtx4090-threadripper", "lsp_over_zero_offload", 0.40),
            ("exposed time of that LSP step", "exposed_fraction", 0.05),
            ("LSP over native", "lsp_over_native", 0.85),
            ("LSP on Ray over LSP on threads", "ray_over_threads", 1.05),
        )
    )
    return f"""# Overlap

`python scripts/bench_overlap.py`, {today}, Python {platform.python_version()}, 2 shared cores, no GPU.
SmolLM2-135M, 4 × 128 tokens, one device thread, one shard thread. Medians of all timed steps; runs in turn.

| ratio | measured | wanted: at most |
|---|---|---|
{ratios}

| run | s a step | middle half within | exposed | simulator's error |
|---|---|---|---|---|
{rows}

The simulator is given what the same method's run without a throttle measured for each layer. LSP whitens on the shard.
"""


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:+.1%}"


if __name__ == "__main__":
    main()
