"""Those who end a run's processes, for real."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Mapping

import psutil

from lsp_ray.trace import StepMetrics
from tests.tiny_jobs import Recorder


def actor_processes(name: str) -> list[psutil.Process]:
    """This suite's live actors of a class; Ray writes the class into their command line."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.status() != psutil.STATUS_ZOMBIE and f"ray::{name}" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


class Killer(Recorder):
    """Kills an actor's process after some steps.

    Args:
        actor_after: By number of a step: the class of the actor to kill once that is closed for the first time, so that
            a run that starts again makes a step further than before between two kills.
        seed: Of which one, and of how much later: at most as long as the shortest step so far took, so that the run
            is not over before.
    """

    signal = signal.SIGKILL

    def __init__(self, actor_after: Mapping[int, str], seed: int = 0) -> None:
        super().__init__()
        self.killed: list[str] = []
        self.killed_s: list[float] = []
        self._actor_after = actor_after
        self._random = random.Random(seed)
        self._due: list[str] = []
        self._furthest = 0
        self._last_step = time.monotonic()
        self._shortest_s = 0.1

    def step(self, metrics: StepMetrics) -> None:
        super().step(metrics)
        now = time.monotonic()
        self._shortest_s = min(self._shortest_s, now - self._last_step)
        self._last_step = now
        if metrics.step > self._furthest and metrics.step in self._actor_after:
            self._due.append(self._actor_after[metrics.step])
            self._kill_in(self._random.uniform(0.0, self._shortest_s))
        self._furthest = max(self._furthest, metrics.step)

    def _kill_in(self, delay_s: float) -> None:
        timer = threading.Timer(delay_s, self._kill)
        timer.daemon = True
        timer.start()

    def _kill(self) -> None:
        found = actor_processes(self._due[0])
        if not found:  # killed before, and its replacement is not there yet
            self._kill_in(0.05)
            return
        self.killed_s.append(time.monotonic())
        os.kill(self._random.choice(found).pid, self.signal)
        self.killed.append(self._due.pop(0))
