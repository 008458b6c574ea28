"""TraceFile: timelines as a trace.json that https://ui.perfetto.dev and chrome://tracing open.

The Trace Event Format's array of events (Google, "Trace Event Format", 2016): one event a line, times in microseconds
since the first step. The closing bracket is optional there, so a run that was killed leaves a file that opens. Steps
are asynchronous events; every stream, every shard and the waits have a thread's row.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from lsp_ray.trace import ComputeSpan, Span, Timeline, WaitPart, WorkStream, is_traced

GPU_ROW, WAIT_ROW, D2H_ROW, H2D_ROW = "GPU", "GPU waits", "down-link", "up-link"
WAIT_COLOUR = "terrible"  # chrome://tracing's name for red; Perfetto colours by an event's name
_PID = 1  # events need one; which does not matter


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedSpan:
    """One bar as it was read back; seconds since the first step.

    `category` is a Phase, a WorkStream, "weights", "activations" or "wait"; `step`, counted from 0, and `layer` are the
    delta's for a wait, whose `cause` is the stream that was late.
    """

    row: str
    category: str
    step: int
    layer: int
    cause: str | None
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """A trace.json that was read back: rows from top to bottom, every step's start and end, all spans."""

    rows: tuple[str, ...]
    steps: dict[int, tuple[float, float]]
    spans: tuple[TracedSpan, ...]
    is_complete: bool


class TraceFile:
    """Writes the steps that `is_traced` names, each as soon as it is closed.

    Args:
        file: Open for writing; stays the caller's.
        shard_of_layer: Which shard's row an update goes to.
        num_steps: Of the run.
        gpu_of_part: Which GPU's row a part's payload goes to; several have rows of their own, numbered.
        has_link: Whether something crosses the link, though nothing is updated elsewhere.
        home_of_layer: The number of the machine of its shard; where there are several, each has rows of the links.
        homes: Their names.
    """

    def __init__(
        self,
        file: TextIO,
        shard_of_layer: Sequence[int],
        *,
        num_steps: int,
        gpu_of_part: Sequence[int] = (0,),
        has_link: bool = False,
        home_of_layer: Sequence[int] = (),
        homes: Sequence[str] = ("",),
    ) -> None:
        self._file = file
        self._home_of_layer, self._homes = home_of_layer, homes
        self._gpu_of_part = gpu_of_part
        self._has_several = len(set(gpu_of_part)) > 1
        self._shard_of_layer = shard_of_layer
        self._num_steps = num_steps
        self._zero_s: float | None = None
        gpus = sorted(set(gpu_of_part))
        rows = [*(self._of_gpu(GPU_ROW, gpu) for gpu in gpus), WAIT_ROW]
        if shard_of_layer or has_link:
            rows += [self._of_link(D2H_ROW, gpu, home) for gpu in gpus for home in homes]
            rows += [f"CPU shard {index}" for index in range(max(shard_of_layer, default=-1) + 1)]
            rows += [self._of_link(H2D_ROW, gpu, home) for gpu in gpus for home in homes]
        # not from 0: Perfetto takes a process's thread 0 for its first one, and two rows would become one
        self._row_ids = {row: index for index, row in enumerate(rows, start=1)}
        named = [_meta("process_name", 1, "lsp_ray")]
        for row, index in self._row_ids.items():
            named += [
                _meta("thread_name", index, row),
                {**_meta("thread_sort_index", index), "args": {"sort_index": index}},
            ]
        self._file.write("[\n" + ",\n".join(map(json.dumps, named)))

    def write(self, timeline: Timeline) -> None:
        """Append one step, if it is to be traced."""
        if not is_traced(timeline.step, self._num_steps):
            return
        if self._zero_s is None:
            self._zero_s = timeline.start_s
        self._file.write("".join(",\n" + json.dumps(event) for event in self._events(timeline)))
        self._file.flush()  # a run that is killed leaves whole steps

    def close(self) -> None:
        """Write the end; the file stays open."""
        self._file.write("\n]\n")

    def _events(self, timeline: Timeline) -> Iterator[dict[str, Any]]:
        name = f"step {timeline.step + 1}"  # as metrics.jsonl counts
        step = {"name": name, "cat": "step", "id": 1, "pid": _PID, "tid": 1, "args": {"step": timeline.step}}
        yield {**step, "ph": "b", "ts": self._us(timeline.start_s)}
        yield {**step, "ph": "e", "ts": self._us(timeline.end_s)}
        for compute in timeline.compute:
            yield self._bar(
                self._of_gpu(GPU_ROW, compute.gpu), compute.phase, f"{compute.phase} {compute.layer}", compute
            )
        for op in timeline.ops:
            yield self._bar(self._row(op), op.stream, f"{_VERBS[op.stream]} {op.layer}", op)
        for kind, copies in (("weights", timeline.weights), ("activations", timeline.activations)):
            for copy in copies:
                yield self._bar(self._row(copy), kind, f"{kind} {copy.layer}", copy)
        for wait in timeline.waits:
            bar = self._bar(WAIT_ROW, "wait", f"wait for {wait.cause}", wait)
            bar["args"]["cause"] = wait.cause
            yield {**bar, "cname": WAIT_COLOUR}

    def _bar(self, row: str, category: str, name: str, span: ComputeSpan | Span | WaitPart) -> dict[str, Any]:
        start_us, end_us = self._us(span.start_s), self._us(span.end_s)
        args: dict[str, Any] = {"step": span.step, "layer": span.layer}
        place = {"pid": _PID, "tid": self._row_ids[row], "ts": start_us, "dur": round(end_us - start_us, 3)}
        return {"name": name, "cat": category, "ph": "X", **place, "args": args}

    def _row(self, op: Span) -> str:
        match op.stream:
            case WorkStream.D2H:
                return self._of_link(D2H_ROW, self._gpu_of_part[op.part], self._home(op.layer))
            case WorkStream.H2D:
                return self._of_link(H2D_ROW, op.part, self._home(op.layer))
        return f"CPU shard {self._shard_of_layer[op.layer]}"

    def _of_gpu(self, row: str, gpu: int) -> str:
        return f"{row} {gpu}" if self._has_several else row

    def _of_link(self, row: str, gpu: int, home: str) -> str:
        own = self._of_gpu(row, gpu)
        return f"{own} · {home}" if len(self._homes) > 1 else own

    def _home(self, layer: int) -> str:
        return self._homes[self._home_of_layer[layer]] if len(self._homes) > 1 else ""

    def _us(self, time_s: float) -> float:
        assert self._zero_s is not None
        return round((time_s - self._zero_s) * 1e6, 3)


_VERBS = {WorkStream.D2H: "send", WorkStream.CPU: "update", WorkStream.H2D: "fetch"}


@contextmanager
def trace_file(
    path: Path,
    shard_of_layer: Sequence[int],
    *,
    num_steps: int,
    gpu_of_part: Sequence[int] = (0,),
    has_link: bool = False,
    home_of_layer: Sequence[int] = (),
    homes: Sequence[str] = ("",),
) -> Iterator[TraceFile]:
    """Open a new TraceFile; it is closed however the run ends."""
    with path.open("w", encoding="utf-8") as file:
        trace = TraceFile(
            file,
            shard_of_layer,
            num_steps=num_steps,
            gpu_of_part=gpu_of_part,
            has_link=has_link,
            home_of_layer=home_of_layer,
            homes=homes,
        )
        try:
            yield trace
        finally:
            trace.close()


def read_trace(path: Path) -> Trace:
    """Read what `TraceFile` wrote, up to where it was cut off.

    Raises:
        OSError: The file cannot be read.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    events = list(_whole_events(lines[1:]))
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    starts = {event["args"]["step"]: event["ts"] / 1e6 for event in events if event["ph"] == "b"}
    ends = {event["args"]["step"]: event["ts"] / 1e6 for event in events if event["ph"] == "e"}
    return Trace(
        rows=tuple(names[row] for row in sorted(names)),
        steps={step: (starts[step], ends[step]) for step in starts if step in ends},
        spans=tuple(_span(event, names) for event in events if event["ph"] == "X"),
        is_complete=bool(lines) and lines[-1] == "]",
    )


def _whole_events(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            event = json.loads(line.rstrip(","))
        except json.JSONDecodeError:
            return
        yield event


def _span(event: dict[str, Any], names: dict[int, str]) -> TracedSpan:
    args = event["args"]
    return TracedSpan(
        row=names[event["tid"]],
        category=event["cat"],
        step=args["step"],
        layer=args["layer"],
        cause=args.get("cause"),
        start_s=event["ts"] / 1e6,
        end_s=(event["ts"] + event["dur"]) / 1e6,
    )


def _meta(name: str, row: int, value: str = "") -> dict[str, Any]:
    return {"name": name, "ph": "M", "pid": _PID, "tid": row, "args": {"name": value}}
