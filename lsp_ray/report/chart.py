"""Chart: lines or dots of several runs over one pair of axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lsp_ray.report.axis import Axis
from lsp_ray.report.markup import Markup, element, joined

WIDTH, HEIGHT = 540, 280
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 12, 42  # room for labels
NUM_RUN_COLOURS = 6  # of style.css
MAX_DOTS = 60  # beyond so many points a line shows none


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One run's points, in order of x; `run` is its number, which gives its colour."""

    name: str
    run: int
    points: Sequence[tuple[float, float]]
    is_line: bool = True


def chart(series: Sequence[Series], *, x_label: str, y_label: str, x_from_zero: bool = True) -> Markup:
    """Return an SVG figure; without any point a line that says so."""
    points = [point for one in series for point in one.points]
    if not points:
        return element("p", f"Nothing was recorded of {y_label}.", class_="nothing")
    xs, ys = [x for x, _ in points], [y for _, y in points]
    margin = 0.06 * (max(ys) - min(ys)) or 0.5
    across = Axis(low=0.0 if x_from_zero else min(xs), high=max(xs), start=LEFT, end=WIDTH - RIGHT)
    up = Axis(low=min(ys) - margin, high=max(ys) + margin, start=HEIGHT - BOTTOM, end=TOP)
    return element(
        "svg",
        _grid(across, up),
        element("text", x_label, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 6, class_="axis middle"),
        element(
            "text", y_label, transform=f"translate(14 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)", class_="axis middle"
        ),
        *(_drawn(one, across, up) for one in series),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=f"{y_label} against {x_label}",
    )


def _grid(across: Axis, up: Axis) -> Markup:
    parts = []
    for value in up.ticks():
        y = up.at(value)
        parts.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"))
        parts.append(element("text", up.label(value), x=LEFT - 6, y=y + 4, class_="tick end"))
    below = HEIGHT - BOTTOM + 16
    parts += [
        element("text", across.label(value), x=across.at(value), y=below, class_="tick middle")
        for value in across.ticks()
    ]
    return joined(*parts)


def _drawn(series: Series, across: Axis, up: Axis) -> Markup:
    places = [(across.at(x), up.at(y)) for x, y in series.points]
    parts = []
    if series.is_line:
        listed = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(element("polyline", points=listed, class_="line"))
    if len(places) <= MAX_DOTS or not series.is_line:
        for (x, y), (value_x, value_y) in zip(places, series.points, strict=True):
            hover = element("title", f"{series.name}: {value_y:.4g} at {value_x:.4g}")
            parts.append(element("circle", hover, cx=x, cy=y, r=2.5, class_="dot"))
    return element("g", *parts, class_=f"run-{series.run % NUM_RUN_COLOURS}")
