#!/usr/bin/env python3
"""Stop a run in each of six ways amid long steps, let it go on, and compare with the same run left alone.

    python scripts/stop_ways.py [--step_s 90] [--ways group+SIGHUP tree+SIGTERM] [--at_once 6] [--json PATH]

A signal goes to the driver, to its process group or to every process of the run, Ray's too and these first. Steps are
so long as the link is slow: they take no processor, and several runs stand beside each other. The signal comes in the
second step; what goes on has a fast link, which changes no bit.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lsp_ray.run import parse
from lsp_ray.runtime.prepare.job import Job, prepare_job
from tests.signalled import WAYS, Run, To, assert_same_end, assert_saved, tiny_options, wait_until
from tests.tiny_jobs import run_on_threads

NUM_STEPS = 6
DEADLINE_S = 3600.0
NAMES = {f"{to}+{number.name}": (to, number) for to, number in WAYS}


def main(argv: Sequence[str] | None = None) -> int:
    """Stop and go on, print what was seen; 0 if nothing was lost in any way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step_s", type=float, default=90.0, help="seconds of a step")
    parser.add_argument("--ways", nargs="+", choices=NAMES, default=list(NAMES), help="which; default: all")
    parser.add_argument("--at_once", type=int, default=6, help="runs beside each other")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    chosen = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options = tiny_options(folder / "tiny", "--max_steps", str(NUM_STEPS))
        job = prepare_job(parse([*options, "--output_dir", str(folder / "reference")]), lambda _line: None)
        run_on_threads(job, folder / "reference")
        slow = [*options, "--runtime.link_gbps", str(_link_gbps(job, chosen.step_s))]
        with ThreadPoolExecutor(chosen.at_once) as threads:
            seen = list(threads.map(lambda way: _stopped(folder, slow, options, way), chosen.ways))
    figures = {"step_s": chosen.step_s, "ways": dict(zip(chosen.ways, seen, strict=True))}
    print(json.dumps(figures, indent=2))
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0 if all(way["failure"] is None for way in seen) else 1


def _link_gbps(job: Job, step_s: float) -> float:
    """A step's payloads go down, then its deltas up, of which the first while the last payloads still go down."""
    return 1.5 * job.bytes_each_way / step_s / 1e9


def _stopped(folder: Path, slow: Sequence[str], fast: Sequence[str], way: str) -> dict[str, Any]:
    """What became of a run that was stopped in this way; `failure` is None where all is well."""
    to, number = NAMES[way]
    facts: dict[str, Any] = {"failure": None}
    run = Run.start(folder / way, *slow)
    try:
        _stop(run, to, number, facts)
        run = Run.start(folder / way, *fast, "--resume_from_checkpoint", "last")
        assert run.ends() == 0, run.said()
        assert_same_end(run.out, folder / "reference")
    except AssertionError as error:
        facts["failure"] = str(error) or "something differs"
    finally:
        run.end_at_once()
    return facts


def _stop(run: Run, to: To, number: signal.Signals, facts: dict[str, Any]) -> None:
    # the first step is done before its deltas come up, the second waits for them
    wait_until(lambda: run.num_lines() > 0 or run.process.poll() is not None, "a step", DEADLINE_S)
    assert run.process.poll() is None, run.said()
    facts["steps_before"] = run.num_lines()
    start_s = time.monotonic()
    run.send(number, to)
    code = run.ends(DEADLINE_S)
    facts |= {"stopped_in_s": round(time.monotonic() - start_s, 1), "steps_saved": run.num_lines(), "exit_code": code}
    lines = (run.out / "metrics.jsonl").read_text().splitlines()
    facts["longest_step_s"] = round(max(json.loads(line)["step_time_s"] for line in lines), 1)
    assert code == 128 + number, run.said()
    assert_saved(run)


if __name__ == "__main__":
    sys.exit(main())
