"""Phases of a run: some steps that only warm up, some that are timed, some that are watched."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

import torch


class Watch(Protocol):
    """Looks at the steps of a phase; both are called on the thread that launches them, the device idle."""

    def start(self) -> None:
        """Before the first step."""
        ...

    def stop(self) -> None:
        """After the last."""
        ...


class Unwatched:
    """See `Watch`."""

    def start(self) -> None:
        """See `Watch`."""

    def stop(self) -> None:
        """See `Watch`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """So many steps, and who looks at them."""

    num_steps: int
    watch: Watch = field(default_factory=Unwatched)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """What a run showed.

    Attributes:
        step_s: Seconds of every step, phase by phase.
        exposed_s: Of these, how long the device waited for deltas; None where nothing is sent.
        peak_bytes: Of the device, since warming up.
        last_loss: Of the last step.
        note: What a reader of the figures should know.
    """

    step_s: Sequence[Sequence[float]]
    exposed_s: Sequence[Sequence[float]] | None
    peak_bytes: int
    last_loss: float
    note: str = ""


class StepClock:
    """Seconds between marks on the device's own time line, so that the host may run ahead."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._events: list[torch.cuda.Event] = []
        self._times_s: list[float] = []

    def mark(self) -> None:
        """Note the moment at which what was launched so far is done."""
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append(event)
        else:
            self._times_s.append(time.monotonic())

    def seconds(self) -> list[float]:
        """Between neighbouring marks; waits for the device."""
        if not self._on_gpu:
            return [end_s - start_s for start_s, end_s in pairwise(self._times_s)]
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in pairwise(self._events)]


def reset_peak(device: torch.device) -> None:
    """Forget the peak of the steps before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """Of a GPU's memory; 0 on a CPU, where torch does not count."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU still computes."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
