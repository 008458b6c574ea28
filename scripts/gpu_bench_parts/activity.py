"""What a GPU and the threads that launch its work did in some steps, as CUDA's own tracer tells it."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

LONG_CALL_US = 100.0  # a call of CUDA's that takes longer waits for the device: a launch takes some microseconds
_LEAST_SHARE = 0.1  # of all launches, that a thread makes which counts as one that launches


@dataclass(frozen=True, slots=True, kw_only=True)
class Activity:
    """Of a step, on average.

    Attributes:
        launches: Kernels launched, and graphs.
        kernel_s: Sum of the kernels' times on the device.
        copy_s: Sum of copies and fills there.
        waits_s: In CUDA's calls, of the threads that launch.
        syncs: Calls of these threads that wait whatever there is to wait for.
    """

    launches: float
    kernel_s: float
    copy_s: float
    waits_s: float
    syncs: float


class Tracer:
    """See `Watch`. Traces kernels and CUDA's calls and no operators, which would slow the host down."""

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self._profile: profile | None = None
        self.activity: Activity | None = None

    def start(self) -> None:
        """See `Watch`."""
        if torch.cuda.is_available():
            self._profile = profile(activities=[ProfilerActivity.CUDA])
            self._profile.start()

    def stop(self) -> None:
        """See `Watch`."""
        if self._profile is not None:
            self._profile.stop()
            self.activity = activity_of(exported(self._profile), self._num_steps)
            self._profile = None


def exported(trace: profile) -> Any:
    """The trace in Chrome's format."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(path))
        return json.loads(path.read_text(encoding="utf-8"))


def activity_of(trace: Mapping[str, Any], num_steps: int) -> Activity:
    """Sum up a trace in Chrome's format, of so many steps."""
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    calls = [event for event in events if event.get("cat") in ("cuda_runtime", "cuda_driver")]
    launches = [event for event in calls if is_launch(event["name"])]
    by_thread = Counter(event["tid"] for event in launches)
    launching = {thread for thread, number in by_thread.items() if number >= _LEAST_SHARE * len(launches)}
    own = [event for event in calls if event["tid"] in launching]
    syncs = [event for event in own if "Synchronize" in event["name"]]
    late = [event for event in own if "Synchronize" not in event["name"] and event["dur"] >= LONG_CALL_US]

    def seconds(*categories: str) -> float:
        total_us = sum(float(event["dur"]) for event in events if event.get("cat") in categories)
        return total_us / 1e6 / num_steps

    return Activity(
        launches=len(launches) / num_steps,
        kernel_s=seconds("kernel"),
        copy_s=seconds("gpu_memcpy", "gpu_memset"),
        waits_s=sum(event["dur"] for event in syncs + late) / 1e6 / num_steps,
        syncs=len(syncs) / num_steps,
    )


def is_launch(name: str) -> bool:
    """Whether a call of this name puts a kernel or a graph on a stream."""
    return "LaunchKernel" in name or "GraphLaunch" in name
