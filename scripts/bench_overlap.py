#!/usr/bin/env python3
"""How much of offloading is hidden: LSP against Zero-Offload, native and threads; simulator and planner against all.

    python scripts/bench_overlap.py [--quick] [--json PATH]

SmolLM2-135M, one micro-batch of 4 × 128 tokens over and over, one device thread, one shard. All workers stay up and run
short blocks of steps in turn, round after round, so that a machine that drifts does so for all alike. The simulator is
given a block without any throttle and predicts the block beside it, of which it knows the throttle alone; the mean of
what it says from the block before and from the one after counts.
Writes docs/benchmarks/overlap.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import Any

import torch

from lsp_ray.data.tokenize import TokenizedRows
from lsp_ray.runtime.actors.ray_workers import RayWorkers
from lsp_ray.runtime.actors.thread_workers import ThreadWorkers
from lsp_ray.runtime.actors.throttle import Throttle
from lsp_ray.runtime.cluster.private_cluster import ray_cluster
from lsp_ray.runtime.prepare.job import prepare_job
from scripts.live_session import Block, LiveSession, alike_rows, num_row_targets
from scripts.overlap_page import write_page
from scripts.overlap_prediction import planned_step_s, predicted_step_s
from scripts.overlap_settings import (
    COMPARED,
    EMULATED_LSP,
    EMULATED_ZERO,
    LSP,
    NATIVE,
    PREDICTED,
    PREDICTED_QUICK,
    THREADS,
    ZERO,
    Setting,
)
from scripts.sim_paper import paper_figures


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Blocks of every setting, one a round; with those that are predicted, the free blocks right before and after."""

    blocks: dict[Setting, list[Block]] = field(default_factory=lambda: defaultdict(list))
    free: dict[Setting, list[tuple[Block, Block]]] = field(default_factory=lambda: defaultdict(list))
    planned_s: dict[Setting, float] = field(default_factory=dict)

    def step_s(self, setting: Setting) -> float:
        """Median over all rounds' steps."""
        return median(self._times_s(setting))

    def spread_s(self, setting: Setting) -> float:
        """Within how many seconds of each other the middle half of the steps lies."""
        low, _, high = quantiles(self._times_s(setting), n=4)
        return high - low

    def exposed_fraction(self, setting: Setting) -> float:
        """Median of the waits over the median step."""
        waits_s = [wait_s for block in self.blocks[setting] for wait_s in block.waits_s]
        return median(waits_s) / self.step_s(setting)

    def ratios(self, setting: Setting, other: Setting) -> list[float]:
        """Step over the other's step, round by round."""
        pairs = zip(self.blocks[setting], self.blocks[other], strict=True)
        return [block.step_s / beside.step_s for block, beside in pairs]

    def _times_s(self, setting: Setting) -> list[float]:
        return [time_s for block in self.blocks[setting] for time_s in block.step_times_s]


class Machine:
    """The sessions of all settings. The emulated machine is the same for every setting."""

    def __init__(self, sessions: dict[Setting, LiveSession]) -> None:
        self._sessions = sessions
        self._emulated = sessions[ZERO].emulated

    def throttle(self, setting: Setting) -> Throttle:
        """What the setting is slowed down to."""
        return self._emulated if setting.emulate else Throttle(link_gbps=setting.link_gbps)

    def run(self, setting: Setting, num_steps: int) -> Block:
        """A block of the setting."""
        block = self._sessions[setting.session].run(setting.policy, self.throttle(setting), num_steps)
        print(f"{setting.name}: {block.step_s:.3f} s a step", file=sys.stderr, flush=True)
        return block

    def prediction_s(self, setting: Setting, free: Block) -> float:
        """Of the setting's step."""
        sizes = self._sessions[setting.session].payload_sizes
        return predicted_step_s(setting, free, sizes, self.throttle(setting))


@contextmanager
def machine_of(settings: Sequence[Setting], rows: TokenizedRows) -> Iterator[Machine]:
    """Start everything that the settings need."""
    hosts = list(dict.fromkeys(setting.session for setting in settings))
    jobs = {host: prepare_job(host.config(), lambda _line: None, rows) for host in hosts}
    on_ray = [job for host, job in jobs.items() if host.on_ray]
    with ExitStack() as stack:
        num_actors = sum(1 + job.layout.num_shards for job in on_ray)
        stack.enter_context(ray_cluster(num_actors=num_actors, store_bytes=sum(job.store_bytes for job in on_ray)))
        sessions = {}
        for host, job in jobs.items():
            sessions[host] = LiveSession(job, RayWorkers if host.on_ray else ThreadWorkers)
            stack.callback(sessions[host].close)
        yield Machine(sessions)


def measured(predicted: Sequence[Setting], *, num_rounds: int, num_steps: int) -> tuple[Found, dict[str, float]]:
    """Run every round; returns what was found and the simulator's relative errors, medians over the rounds."""
    rows = alike_rows(LSP.config())
    found = Found()
    with machine_of([*COMPARED, *predicted], rows) as machine:
        for setting in COMPARED:  # caches fill, and device memory is watched in the second step
            machine.run(setting, 1)
        for number in range(num_rounds):
            if number == num_rounds // 2:  # the planner measures this machine amid the steps that it forecasts
                targets = num_row_targets(rows.train[0])
                found.planned_s.update(planned_step_s((LSP, NATIVE, ZERO), targets_a_row=targets))
            _run_round(machine, predicted, num_steps, found)
        errors = {
            setting.name: median(
                fmean(machine.prediction_s(setting, free) for free in around) / block.step_s - 1.0
                for around, block in zip(found.free[setting], found.blocks[setting], strict=True)
            )
            for setting in predicted
        }
    return found, errors


def _run_round(machine: Machine, predicted: Sequence[Setting], num_steps: int, found: Found) -> None:
    for setting in COMPARED:
        found.blocks[setting].append(machine.run(setting, num_steps))
    for free, settings in groupby(predicted, key=lambda setting: setting.free):
        before = machine.run(free, num_steps)
        for setting in settings:
            found.blocks[setting].append(machine.run(setting, num_steps))
            after = machine.run(free, num_steps)
            found.free[setting].append((before, after))
            before = after


def figures_of(found: Found, errors: dict[str, float]) -> dict[str, Any]:
    """What --json writes."""
    return {
        "lsp_over_zero_offload": median(found.ratios(EMULATED_LSP, EMULATED_ZERO)),
        "exposed_fraction": found.exposed_fraction(EMULATED_LSP),
        "lsp_over_native": median(found.ratios(LSP, NATIVE)),
        "ray_over_threads": median(found.ratios(LSP, THREADS)),
        "simulator_error": errors,
        "plan_error": {
            setting.name: planned_s / found.step_s(setting) - 1.0 for setting, planned_s in found.planned_s.items()
        },
        "paper": {name: [figure.paper, figure.simulated] for name, figure in paper_figures().items()},
    }


def main() -> None:
    """Measure, predict, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, steps and predictions; within 8 minutes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    predicted = PREDICTED_QUICK if options.quick else PREDICTED
    num_rounds, num_steps = (2, 3) if options.quick else (options.rounds, 4)
    found, errors = measured(predicted, num_rounds=num_rounds, num_steps=num_steps)
    figures = figures_of(found, errors)
    if not options.quick:
        write_page(found, figures, num_rounds=num_rounds)
    text = json.dumps(figures, indent=2)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
