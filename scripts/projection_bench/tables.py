"""Tables as rows of text, and the two ways to write them: Markdown for the page, rich for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table

from scripts.projection_bench.measure import METHODS, Measured, Point
from scripts.projection_bench.transfer import Transfer

LABELS = {
    "closed_form": "closed form, unit columns",
    "closed_form_gram": "closed form, orthonormal columns",
    "closed_form_balanced": "closed form, balanced (a run's default)",
    "paper": "paper",
    "random": "random",
    "galore_one_sided": "GaLore, one-sided",
    "galore_two_sided": "GaLore, two-sided",
    "dense_floor": "dense rank d (the floor)",
}
SHORT_LABELS = {
    "closed_form": "closed, unit",
    "closed_form_gram": "closed, orthonormal",
    "closed_form_balanced": "closed, balanced",
    "paper": "paper",
    "random": "random",
    "galore_one_sided": "GaLore one",
    "galore_two_sided": "GaLore two",
    "dense_floor": "floor",
}
KERNEL_LABELS = {
    "ours": "ours, transpose included",
    "ours_transposed": "ours, from dYᵀ",
    "dense": "dense product",
    "csr": "torch CSR, transpose included",
    "memcpy": "memory copy of as many bytes",
}


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


def score_table(heading: str, measured: Measured, point: Point) -> TextTable:
    """All three figures of every method at one point, and how much it sends."""
    rows = []
    for method in METHODS:
        score = measured.mean(point, method)
        figures = (f"{score.bias:.3f}", f"{score.raw_bias:.3f}", f"{score.cosine:.3f}")
        rows.append((LABELS[method], *figures, f"{measured.mean_sent(point, method):,.0f}"))
    columns = ("method", "bias at the best scalar", "raw bias", "cosine", "values sent a matrix")
    return TextTable(heading=heading, columns=columns, rows=tuple(rows))


def grid_table(heading: str, measured: Measured, figure: str) -> TextTable:
    """One figure (`bias`, `raw_bias` or `cosine`) of every method at every point."""
    rows = []
    for point in sorted(measured.scores):
        cells = [f"{getattr(measured.mean(point, method), figure):.3f}" for method in METHODS]
        rows.append(
            (f"r={point.nnz_per_row} d={point.subspace_dim}", f"{measured.mean_bytes(point) / 1024:.0f}", *cells)
        )
    columns = ("point", "KiB a matrix", *(SHORT_LABELS[method] for method in METHODS))
    return TextTable(heading=heading, columns=columns, rows=tuple(rows))


def kernel_table(heading: str, times_ms: dict[str, dict[str, float]]) -> TextTable:
    """Milliseconds of every kernel by type, and how often the copy's time that is."""
    rows = []
    for name, label in KERNEL_LABELS.items():
        cells = []
        for by_kernel in times_ms.values():
            known = name in by_kernel
            cells.append(f"{by_kernel[name]:.2f}" if known else "none")
            cells.append(f"{by_kernel[name] / by_kernel['memcpy']:.1f}" if known else "")
        rows.append((label, *cells))
    columns = ["kernel"]
    for dtype in times_ms:
        columns += [f"{dtype}, ms", "times the copy"]
    return TextTable(heading=heading, columns=tuple(columns), rows=tuple(rows))


def fit_table(heading: str, seconds: dict[str, float]) -> TextTable:
    """Seconds of each fit for the whole model."""
    rows = tuple((LABELS[method], f"{fit_s:.1f}") for method, fit_s in seconds.items())
    return TextTable(heading=heading, columns=("fit", "seconds"), rows=rows)


def transfer_table(heading: str, transfers: Sequence[Transfer]) -> TextTable:
    """What projectors learned elsewhere cost in bias; what they save is the fit's seconds."""
    rows = tuple(
        (f"{each.learned_on}, judged by {each.judged_by}", f"{each.orthonormal.bias:.3f}", f"{each.balanced.bias:.3f}")
        for each in transfers
    )
    columns = ("learned on", LABELS["closed_form_gram"], LABELS["closed_form_balanced"])
    return TextTable(heading=heading, columns=columns, rows=rows)


def sentence(parts: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
