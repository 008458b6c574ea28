"""Tables: the runs' figures and options side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lsp_ray.report.duration import format_duration
from lsp_ray.report.markup import Markup, element
from lsp_ray.report.run_folder import RunFolder

NOTHING = "–"

_FIGURES: tuple[tuple[str, Callable[[RunFolder], str]], ...] = (
    ("Model", lambda run: _figure(run, "model")),
    ("Data", lambda run: _data(run)),
    ("Method", lambda run: _figure(run, "method")),
    ("Policy", lambda run: _figure(run, "policy")),
    ("Device", lambda run: _figure(run, "device")),
    ("Shards", lambda run: _figure(run, "num_shards")),
    ("Steps", lambda run: str(len(run.steps))),
    ("Duration", lambda run: _figure(run, "duration_s", format_duration)),
    ("Eval loss before", lambda run: _figure(run, "eval_loss_before", "{:.4f}")),
    ("Eval loss after", lambda run: _figure(run, "eval_loss_after", "{:.4f}")),
    ("Step time, median", lambda run: NOTHING if run.step_time_s is None else f"{run.step_time_s:.3f} s"),
    ("Tokens per second", lambda run: _figure(run, "tokens_per_second", "{:.0f}")),
    ("Hidden behind compute", lambda run: _figure(run, "overlap_fraction", "{:.1%}")),
    ("Peak device memory", lambda run: _figure(run, "peak_device_bytes", size)),
    ("Down-link a step", lambda run: _figure(run, "bytes_d2h_per_step", size)),
    ("Up-link a step", lambda run: _figure(run, "bytes_h2d_per_step", size)),
)


def figures_table(runs: Sequence[RunFolder]) -> Markup:
    """Return what each run came to, a column a run; without figures that no run has."""
    rows = [(name, [show(run) for run in runs]) for name, show in _FIGURES]
    return _table(runs, [row for row in rows if set(row[1]) != {NOTHING}])


def config_table(runs: Sequence[RunFolder]) -> Markup:
    """Return every option, those in which the runs differ first and marked."""
    names = dict.fromkeys(name for run in runs for name in run.config)
    rows = [(name, [run.config.get(name, NOTHING) for run in runs]) for name in names]
    return _table(runs, sorted(rows, key=lambda row: len(set(row[1])) == 1), marks=True)


def size(num_bytes: float) -> str:
    """Bytes in a unit that reads well."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.3g} {unit}"
    return f"{num_bytes:.0f} B"


def _data(run: RunFolder) -> str:
    counts = [run.figures.get(f"num_{part}_examples") for part in ("train", "eval")]
    counted = "" if None in counts else f" ({counts[0]} examples, {counts[1]} held out)"
    return f"{_figure(run, 'dataset')}{counted}"


def _figure(run: RunFolder, name: str, form: str | Callable[[float], str] = "{}") -> str:
    value = run.figures.get(name)
    if value is None:
        return NOTHING
    if not isinstance(value, int | float):  # whatever a damaged file may hold
        return str(value)
    return form.format(value) if isinstance(form, str) else form(value)


def _table(runs: Sequence[RunFolder], rows: Sequence[tuple[str, Sequence[str]]], *, marks: bool = False) -> Markup:
    head = element("tr", element("th", ""), *(element("th", run.name, scope="col") for run in runs))
    body = []
    for name, cells in rows:
        differs = marks and len(set(cells)) > 1
        title = element("th", f"≠ {name}" if differs else name, scope="row")
        shown = [element("td", cell) for cell in cells]
        body.append(element("tr", title, *shown, class_="differs" if differs else "same"))
    table = element("table", element("thead", head), element("tbody", *body))
    return element("div", table, class_="wide")
