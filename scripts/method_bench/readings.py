"""Readings: every run's outcome in a JSON Lines file, so that a bench that was interrupted goes on where it was."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from scripts.method_bench.ours import Outcome, Setting, gpu_name

DEFAULT_MODEL, DEFAULT_LENGTH, DEFAULT_DATA = "smollm2-135m", 128, "stdlib-docstrings"


def processor() -> str:
    """What this machine computes with: the GPU, if there is one, and the CPU."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return " beside ".join(filter(None, [gpu_name(), next(names, platform.machine())]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """A run of which only the steps are of interest: a method or a peer, in one of the rounds.

    Runs that differ in these three alone are compared with each other; the others say on what.
    """

    name: str
    round: int
    num_steps: int
    model: str = DEFAULT_MODEL
    max_seq_length: int = DEFAULT_LENGTH
    dataset: str = DEFAULT_DATA
    processor: str = field(default_factory=processor)

    @property
    def bench(self) -> str:
        """What it was timed with, in words."""
        tokens = f"4 × at most {self.max_seq_length} tokens of {Path(self.dataset).name}"
        return f"{Path(self.model).name}, {tokens}, {self.processor}"


_KINDS: Mapping[str, type[Setting | Timed]] = {"scored": Setting, "timed": Timed}


class Readings:
    """Outcomes by what was run.

    Args:
        path: Read if it is there, and added to; None keeps them in memory alone.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._outcomes: dict[Setting | Timed, Outcome] = {}
        self.circumstances: set[tuple[str, str, str]] = set()
        """Days, processors and commands."""
        self.processors: dict[Setting | Timed, str] = {}
        if path is not None and path.exists():
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
                try:
                    self._take(json.loads(line))
                except (ValueError, LookupError, TypeError) as error:
                    raise SystemExit(f"{path}: line {number} is no reading; remove it to measure it again") from error

    @property
    def scored(self) -> dict[Setting, Outcome]:
        """Those of the matrix."""
        return {key: outcome for key, outcome in self._outcomes.items() if isinstance(key, Setting)}

    @property
    def timed(self) -> dict[Timed, Outcome]:
        """Those of the rounds."""
        return {key: outcome for key, outcome in self._outcomes.items() if isinstance(key, Timed)}

    def of(self, key: Setting | Timed, measure: Callable[[], Outcome]) -> Outcome:
        """Return what was measured before, else measure and keep it."""
        if key not in self._outcomes:
            outcome = measure()
            kind = next(name for name, own in _KINDS.items() if isinstance(key, own))
            row = {"kind": kind, "key": asdict(key), "outcome": asdict(outcome)}
            row |= {"day": datetime.now(UTC).date().isoformat(), "processor": processor(), "command": _command()}
            if self._path is not None:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            self._take(row)
        return self._outcomes[key]

    def _take(self, row: Mapping[str, Any]) -> None:
        read = dict(row["outcome"])
        read["eval_losses"] = tuple((step, loss) for step, loss in read["eval_losses"])
        read |= {name: tuple(read[name]) for name in ("step_s", "losses")}
        told = row["key"]
        if row["kind"] == "timed":
            told = told | {"processor": row["processor"]}  # older files have it in the row alone
        key = _KINDS[row["kind"]](**told)
        self._outcomes[key], self.processors[key] = Outcome(**read), row["processor"]
        self.circumstances.add((row["day"], row["processor"], row["command"]))


def _command() -> str:
    return shlex.join(["python", "scripts/bench.py", *sys.argv[1:]])
