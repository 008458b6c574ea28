"""Gantt: one step on all streams, a bar for every span."""

from __future__ import annotations

from lsp_ray.report.axis import Axis
from lsp_ray.report.markup import Markup, element, joined
from lsp_ray.trace import Cause, Phase, WorkStream
from lsp_ray.trace_file import Trace, TracedSpan

WIDTH, LEFT, RIGHT, TOP, ROW, BAR = 1120, 96, 12, 8, 34, 24
CHARACTER = 5.7  # width of a digit in a bar's label
GAP = 0.5  # between neighbours
MIN_WIDTH = 1.2  # what is too short to see is still there

STREAM_NAMES = {
    WorkStream.GPU: "device",
    WorkStream.D2H: "down-link",
    WorkStream.CPU: "shards",
    WorkStream.H2D: "up-link",
}


CAUSE_NAMES = {stream.value: name for stream, name in STREAM_NAMES.items()} | {
    Cause.PEERS.value: "other GPUs",
    Cause.WEIGHTS.value: "weights",
    Cause.ACTIVATIONS.value: "activations",
}


def gantt(trace: Trace, step: int, *, length_s: float | None = None, device: str = "GPU") -> Markup:
    """Return an SVG figure of the step, counted from 0: every span that reaches into it, cut off at its ends.

    Args:
        trace: Of the run.
        step: In the trace.
        length_s: What the width stands for; default: the step. Runs side by side share the longest one's.
        device: What its rows are called.
    """
    start_s, end_s = trace.steps[step]
    across = Axis(low=0.0, high=(length_s or end_s - start_s) * 1e3, start=LEFT, end=WIDTH - RIGHT)
    bottom = TOP + ROW * len(trace.rows)
    parts = [_time_axis(across, bottom)]
    for index, row in enumerate(trace.rows):
        top = TOP + ROW * index
        parts.append(element("text", row.replace("GPU", device), x=LEFT - 8, y=top + ROW / 2 + 4, class_="row end"))
        parts += [
            _bar(span, across, start_s, end_s, top + (ROW - BAR) / 2, is_own=span.step == step)
            for span in trace.spans
            if span.row == row and span.end_s > start_s and span.start_s < end_s
        ]
    height = bottom + 38
    return element("svg", *parts, viewBox=f"0 0 {WIDTH} {height}", role="img", aria_label="The streams in one step")


def _time_axis(across: Axis, bottom: float) -> Markup:
    parts = []
    for value in across.ticks(10):
        x = across.at(value)
        parts.append(element("line", x1=x, x2=x, y1=TOP, y2=bottom, class_="grid"))
        parts.append(element("text", across.label(value), x=x, y=bottom + 15, class_="tick middle"))
    parts.append(element("text", "ms since the step began", x=(LEFT + WIDTH) / 2, y=bottom + 32, class_="axis middle"))
    return joined(*parts)


def _bar(span: TracedSpan, across: Axis, zero_s: float, end_s: float, y: float, *, is_own: bool) -> Markup:
    left = max(across.start, across.at((span.start_s - zero_s) * 1e3))
    right = across.at((min(span.end_s, end_s) - zero_s) * 1e3)
    width = max(right - left - GAP, MIN_WIDTH)
    kind = "wait" if span.cause is not None else f"{_stream(span)} {span.category}"
    is_pale = span.category in (Phase.APPLY, Phase.FORWARD) or not (is_own or span.cause is not None)
    age = "" if is_own or span.cause is not None else " earlier"
    parts = [element("title", _hover(span))]
    parts.append(element("rect", x=left, y=y, width=width, height=BAR, class_=f"bar {kind}{age}"))
    label = str(span.layer) if span.cause is None else f"waits for {_name(span.cause)}"
    if width > CHARACTER * len(label) + 2:
        parts.append(
            element(
                "text", label, x=left + width / 2, y=y + BAR / 2 + 4, class_=f"{'pale' if is_pale else 'inside'} middle"
            )
        )
    return element("g", *parts)


def _hover(span: TracedSpan) -> str:
    what = f"{span.category} of layer {span.layer}, step {span.step + 1}"
    if span.cause is not None:
        what = f"waits for the delta of layer {span.layer}, late on the {_name(span.cause)}"
        if span.cause in (Cause.WEIGHTS, Cause.ACTIVATIONS):
            what = f"waits for the {span.cause} of layer {span.layer}"
    return f"{what}: {(span.end_s - span.start_s) * 1e3:.2f} ms"


def _stream(span: TracedSpan) -> str:
    return WorkStream.GPU if span.category in list(Phase) else span.category


def _name(cause: str) -> str:
    return CAUSE_NAMES.get(cause, cause)
