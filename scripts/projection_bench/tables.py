"""Tables as rows of text, and the two ways to write them: Markdown for the page, rich for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table

from scripts.projection_bench.measure import SCALED, Measured, Point
from scripts.projection_bench.sharing import Shared
from scripts.projection_bench.transfer import Transfer

LABELS = {
    "blocks": "blocks",
    "blocks_balanced": "blocks, balanced (a run's default)",
    SCALED: "the same, bases for S G Z",
    "paper": "paper",
    "random": "random blocks",
    "galore_one_sided": "GaLore, one-sided",
    "galore_two_sided": "GaLore, two-sided",
    "dense_floor": "dense rank d (the floor)",
}
SHORT_LABELS = {
    "blocks": "blocks",
    "blocks_balanced": "balanced",
    SCALED: "balanced, S G Z",
    "paper": "paper",
    "random": "random",
    "galore_one_sided": "GaLore one",
    "galore_two_sided": "GaLore two",
    "dense_floor": "floor",
}
FIT_LABELS = {"closed_form": "closed form", "paper": "paper"}
KERNEL_LABELS = {"ours": "ours", "dense": "dense product", "memcpy": "memory copy of as many bytes"}
_SHOWN = tuple(LABELS)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextTable:
    """A heading, column names and rows; the first column is text, the others are numbers."""

    heading: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """A GitHub table under a heading of the second level."""
        ruler = ["---", *("---:" for _ in self.columns[1:])]
        lines = [self.columns, tuple(ruler), *self.rows]
        return "\n".join([f"## {self.heading}", "", *(f"| {' | '.join(line)} |" for line in lines)])

    def rich(self) -> Table:
        """The same for a terminal."""
        table = Table(title=self.heading, box=box.SIMPLE, title_justify="left")
        for number, column in enumerate(self.columns):
            table.add_column(column, justify="right" if number else "left")
        for row in self.rows:
            table.add_row(*row)
        return table


def bias_table(heading: str, measured: Measured, point: Point) -> TextTable:
    """Bias of every method at one point, and how much it sends."""
    rows = tuple(
        (LABELS[method], f"{measured.mean(point, method):.3f}", f"{measured.mean_sent(point, method):,.0f}")
        for method in _SHOWN
    )
    return TextTable(heading=heading, columns=("method", "bias", "values sent a matrix"), rows=rows)


def grid_table(heading: str, measured: Measured) -> TextTable:
    """Bias of every method at every point."""
    rows = []
    for point in sorted(measured.biases):
        cells = [f"{measured.mean(point, method):.3f}" for method in _SHOWN]
        rows.append((str(point), f"{measured.mean_bytes(point) / 1024:.0f}", *cells))
    columns = ("point", "KiB a matrix", *(SHORT_LABELS[method] for method in _SHOWN))
    return TextTable(heading=heading, columns=columns, rows=tuple(rows))


def kernel_table(heading: str, times_ms: Mapping[str, Mapping[str, float]]) -> TextTable:
    """Milliseconds of every kernel by type, and how often the copy's time that is."""
    rows = []
    for name, label in KERNEL_LABELS.items():
        cells = []
        for by_kernel in times_ms.values():
            cells += [f"{by_kernel[name]:.2f}", f"{by_kernel[name] / by_kernel['memcpy']:.1f}"]
        rows.append((label, *cells))
    columns = ["kernel"]
    for dtype in times_ms:
        columns += [f"{dtype}, ms", "times the copy"]
    return TextTable(heading=heading, columns=tuple(columns), rows=tuple(rows))


def fit_table(heading: str, seconds: Mapping[str, float]) -> TextTable:
    """Seconds of each fit for the whole model."""
    rows = tuple((FIT_LABELS[fit], f"{fit_s:.1f}") for fit, fit_s in seconds.items())
    return TextTable(heading=heading, columns=("fit", "seconds"), rows=rows)


def sharing_table(heading: str, kinds: Sequence[Shared]) -> TextTable:
    """Own Q against a shared one, by kind of linear."""
    rows = tuple(
        (each.kind, str(each.num_matrices), *(f"{bias:.3f}" for bias in (*each.plain, *each.scaled))) for each in kinds
    )
    columns = ("linear", "matrices", "blocks, own Q", "shared", "balanced for S G Z, own Q", "shared")
    return TextTable(heading=heading, columns=columns, rows=rows)


def transfer_table(heading: str, transfers: Sequence[Transfer]) -> TextTable:
    """What projectors learned elsewhere cost in bias; what they save is the fit's seconds."""
    rows = tuple(
        (
            f"{each.learned_on}, judged by {each.judged_by}",
            *(f"{bias:.3f}" for bias in (each.plain, each.balanced, each.scaled)),
        )
        for each in transfers
    )
    columns = ("learned on", LABELS["blocks"], LABELS["blocks_balanced"], LABELS[SCALED])
    return TextTable(heading=heading, columns=columns, rows=rows)


def sentence(parts: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
