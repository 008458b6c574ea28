"""Where the host's time goes: operators by torch's profiler, and the functions of the threads that launch them."""

from __future__ import annotations

import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from scripts.gpu_bench_parts.activity import activity_of, exported, is_launch

NUM_OPERATORS, NUM_FUNCTIONS = 25, 30


class OperatorProfile:
    """See `Watch`. Records every operator of the thread and of its backward."""

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(activities=activities)
        self.lines: list[str] = []

    def start(self) -> None:
        """See `Watch`."""
        self._start_s = time.monotonic()
        self._profile.start()

    def stop(self) -> None:
        """See `Watch`."""
        wall_ms = 1e3 * (time.monotonic() - self._start_s) / self._num_steps
        self._profile.stop()
        self.lines = list(self._said(wall_ms))

    def _said(self, wall_ms: float) -> Iterator[str]:
        trace = exported(self._profile)
        found = activity_of(trace, self._num_steps)
        yield (
            f"a step under the profiler: {wall_ms:.1f} ms, kernels {1e3 * found.kernel_s:.1f} ms, copies "
            f"{1e3 * found.copy_s:.1f} ms, {found.launches:.0f} launches, {found.syncs:.0f} synchronising calls, "
            f"{1e3 * found.waits_s:.1f} ms of waiting for the device"
        )
        names = [event["name"] for event in trace["traceEvents"] if event.get("ph") == "X"]
        for name in sorted({name for name in names if is_launch(name)}):
            yield f"{names.count(name) / self._num_steps:8.0f} {name}"
        yield f"{'self ms':>9} {'calls':>8} operator, of a step"
        rows = sorted(self._profile.key_averages(), key=lambda row: -row.self_cpu_time_total)
        for row in rows[:NUM_OPERATORS]:
            own_ms = row.self_cpu_time_total / 1e3 / self._num_steps
            yield f"{own_ms:9.3f} {row.count / self._num_steps:8.1f} {row.key}"


class FunctionProfile:
    """See `Watch`. Times Python's functions, and what they call in C, on the thread and on autograd's.

    cProfile would mix threads up since Python 3.12. It makes small functions look larger than they are, as cProfile
    does; a function that waits for the backward holds the time of what runs on autograd's thread meanwhile.
    """

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self._wanted: dict[int, bool] = {}
        self._stacks: dict[int, list[list[Any]]] = defaultdict(list)  # thread -> [function, start, time of its callees]
        self._own_s: dict[Any, float] = defaultdict(float)
        self._calls: dict[Any, int] = defaultdict(int)
        self.lines: list[str] = []

    def start(self) -> None:
        """See `Watch`."""
        self._wanted[threading.get_ident()] = True
        self._start_s = time.monotonic()
        self._set(self._note)

    def stop(self) -> None:
        """See `Watch`."""
        self._set(None)
        wall_ms = 1e3 * (time.monotonic() - self._start_s) / self._num_steps
        self.lines = [f"a step under the profile of Python: {wall_ms:.1f} ms", f"{'own ms':>9} {'calls':>8} function"]
        largest = sorted(self._own_s, key=lambda key: -self._own_s[key])[:NUM_FUNCTIONS]
        for key in largest:
            own_ms = 1e3 * self._own_s[key] / self._num_steps
            self.lines.append(f"{own_ms:9.3f} {self._calls[key] / self._num_steps:8.1f} {_named(key)}")

    def _set(self, function: Any) -> None:
        if sys.version_info >= (3, 12):
            threading.setprofile_all_threads(function)
        else:
            sys.setprofile(function)

    def _note(self, frame: FrameType, event: str, arg: Any) -> None:
        thread = threading.get_ident()
        if not self._is_wanted(thread):
            return
        stack, now_s = self._stacks[thread], time.perf_counter()
        if event in ("call", "c_call"):
            stack.append([frame.f_code if event == "call" else _key_of(arg), now_s, 0.0])
        elif stack:
            key, start_s, callees_s = stack.pop()
            taken_s = now_s - start_s
            self._own_s[key] += taken_s - callees_s
            self._calls[key] += 1
            if stack:
                stack[-1][2] += taken_s

    def _is_wanted(self, thread: int) -> bool:
        wanted = self._wanted.get(thread)
        if wanted is None:  # autograd's threads are none that Python started
            known = {own.ident for own in threading.enumerate() if not isinstance(own, threading._DummyThread)}
            wanted = self._wanted[thread] = thread not in known
        return wanted


def _key_of(function: Any) -> str:
    return str(getattr(function, "__qualname__", function))


def _named(key: Any) -> str:
    if isinstance(key, str):
        return f"{key} (C)"
    return f"{'/'.join(key.co_filename.split('/')[-2:])}:{key.co_firstlineno} {key.co_name}"
