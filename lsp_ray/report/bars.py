"""Bars: horizontal, one a row, of segments with a class (a stream's colour) each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lsp_ray.report.markup import Markup, element, joined

WIDTH, LEFT, MIDDLE, ROW, BAR = 1120, 230, 740, 26, 16
MAX_LABEL = 34  # characters that fit on the left


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A part of a bar; `kind` is its CSS class, `text` shows on hovering."""

    value: float
    kind: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A row: label on the left, segments, figures on the right."""

    label: str
    segments: Sequence[Segment]
    figures: str


def bars(rows: Sequence[Bar], *, full: float | None = None) -> Markup:
    """Return an SVG figure; a bar that is `full` (default: the longest one) takes the whole width."""
    longest = full or max((sum(part.value for part in row.segments) for row in rows), default=0.0) or 1.0
    drawn = [_row(row, index * ROW, (MIDDLE - LEFT) / longest) for index, row in enumerate(rows)]
    return element("svg", *drawn, viewBox=f"0 0 {WIDTH} {max(1, len(rows)) * ROW}", role="img")


def _row(row: Bar, top: float, scale: float) -> Markup:
    baseline = top + ROW / 2 + 4
    label = row.label if len(row.label) <= MAX_LABEL else row.label[: MAX_LABEL - 1] + "…"
    parts = [element("text", label, x=LEFT - 10, y=baseline, class_="row end")]
    y, x = top + (ROW - BAR) / 2, float(LEFT)
    parts.append(element("rect", x=LEFT, y=y, width=MIDDLE - LEFT, height=BAR, class_="track"))
    for part in row.segments:
        width = part.value * scale
        parts.append(
            element("rect", element("title", part.text), x=x, y=y, width=width, height=BAR, class_=f"bar {part.kind}")
        )
        x += width
    parts.append(element("text", row.figures, x=MIDDLE + 12, y=baseline, class_="row"))
    return joined(*parts)
