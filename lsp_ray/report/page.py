"""The report: sections of figures and tables about one run or several, as one HTML document."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from lsp_ray.report.bars import Bar, Segment, bars
from lsp_ray.report.chart import NUM_RUN_COLOURS, Series, chart
from lsp_ray.report.gantt import CAUSE_NAMES, STREAM_NAMES, gantt
from lsp_ray.report.markup import Markup, element, joined, page
from lsp_ray.report.run_folder import WARM_UP_STEPS, LossPoint, RunFolder
from lsp_ray.report.tables import NOTHING, config_table, figures_table, size
from lsp_ray.trace import Cause, WorkStream

_SAMPLES = (("sample_before", "Before"), ("sample_after", "After"), ("sample_expected", "In the data"))
_LEAST_SHOWN = 0.05  # of a step: the width of the figure, so that next to no waiting looks like it
_MOST_NAMED = 3  # causes of waiting, beside a bar
_LEGEND = {**{stream.value: name for stream, name in STREAM_NAMES.items()}, "wait": "device waits"}


def report(runs: Sequence[RunFolder]) -> str:
    """Return the whole document."""
    names = ", ".join(run.name for run in runs)
    return page(f"lsp_ray: {names}", _beside("style.css"), element("h1", "lsp_ray report"), _sections(runs))


def live_report(run: RunFolder, status: str) -> str:
    """Return the document for a run in progress, which renews itself from where it came; `status` is its first line."""
    head = element("h1", f"lsp_ray: {run.name}")
    body = _sections([run], element("p", status, class_="status"))
    return page(f"lsp_ray: {run.name}", _beside("style.css"), head, body, script=live_script())


def live_script() -> str:
    """Return what renews the document of `live_report`."""
    return _beside("live.js")


def _beside(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _sections(runs: Sequence[RunFolder], *first: Markup) -> Markup:
    sections: list[tuple[str, Sequence[Markup]]] = [("At a glance", (_complaints(runs), figures_table(runs)))]
    if any(run.steps or run.typical_step() is not None for run in runs):
        sections += [
            ("Loss", _losses(runs)),
            ("The four streams in a typical step", _gantts(runs)),
            ("Exposed time by cause", _exposed(runs)),
            ("Busy share of each stream", _busy(runs)),
            ("Device memory and traffic", _memory(runs)),
            ("Bias by layer", _bias(runs)),
        ]
    if any(name in run.summary for run in runs for name, _ in _SAMPLES):
        sections.append(("A sample answer", _samples(runs)))
    sections.append(("Configuration", _config(runs)))
    drawn = [element("section", element("h2", title), *parts) for title, parts in sections]
    return element("main", *first, *drawn)


def _text(*parts: str) -> Markup:
    return element("p", *parts)


def _complaints(runs: Sequence[RunFolder]) -> Markup:
    lines = [element("li", f"{run.name}: {line}") for run in runs for line in run.complaints]
    return element("ul", *lines, class_="complaints") if lines else Markup("")


def _run_legend(runs: Sequence[RunFolder]) -> Markup:
    entries = []
    for index, run in enumerate(runs):
        line = element("line", x1=0, x2=28, y1=6, y2=6, class_="line")
        sample = element("svg", line, viewBox="0 0 28 12", class_=f"swatch run-{index % NUM_RUN_COLOURS}")
        entries.append(element("span", sample, run.name))
    return element("p", *entries, class_="legend")


def _stream_legend(*kinds: str) -> Markup:
    names = {**CAUSE_NAMES, **_LEGEND}
    entries = [element("span", element("i", class_=f"chip {kind}"), names[kind]) for kind in kinds]
    return element("p", *entries, class_="legend")


def _losses(runs: Sequence[RunFolder]) -> Sequence[Markup]:
    own = _loss_charts(runs, [run.training_losses for run in runs], "training loss")
    parts = [_text("Loss of each step's own batch, so it jumps from step to step."), _run_legend(runs), own]
    if any(step.eval_loss is not None for run in runs for step in run.steps):
        how = "Loss on the held-out examples (eval_steps), whose measuring is in no second."
        parts += [_text(how), _loss_charts(runs, [run.eval_losses for run in runs], "eval loss")]
    return parts


def _loss_charts(runs: Sequence[RunFolder], losses: Sequence[Sequence[LossPoint]], name: str) -> Markup:
    by_step, by_second = [], []
    for index, (run, points) in enumerate(zip(runs, losses, strict=True)):
        by_step.append(Series(name=run.name, run=index, points=[(point.step, point.loss) for point in points]))
        by_second.append(Series(name=run.name, run=index, points=[(point.seconds, point.loss) for point in points]))
    return element(
        "div",
        chart(by_step, x_label="steps", y_label=name),
        chart(by_second, x_label="seconds of training", y_label=name),
        class_="pair",
    )


def _gantts(runs: Sequence[RunFolder]) -> Sequence[Markup]:
    how = _text(
        "Time runs from left to right; numbers are layers. On the device each layer adds the last step's delta "
        "(palest) and goes forward (pale); then come the backwards, deepest layer first (full colour). A layer's "
        "gradient goes down the link, a shard on the CPU makes the update, the delta comes up. Pale bars on the links "
        "and shards belong to the step before. A wait means that the next layer's delta was not there yet."
    )
    parts = [how, _stream_legend(*_LEGEND)]
    typical = [(run, run.typical_step()) for run in runs]
    lengths_s = [end_s - start_s for run, step in typical for start_s, end_s in [_ends(run, step)]]
    for run, step in typical:
        parts.append(element("h3", run.name))
        if step is None or run.trace is None:
            parts.append(element("p", "No traced step to show.", class_="nothing"))
            continue
        start_s, end_s = _ends(run, step)
        median = "" if run.step_time_s is None else f"; the median step takes {run.step_time_s:.3f} s"
        parts.append(_text(f"Step {step + 1}, {end_s - start_s:.3f} s{median}."))
        drawn = gantt(run.trace, step, length_s=max(lengths_s), device=_device(run))
        parts.append(element("div", drawn, class_="wide"))
    return parts


def _ends(run: RunFolder, step: int | None) -> tuple[float, float]:
    return (0.0, 0.0) if step is None or run.trace is None else run.trace.steps[step]


def _device(run: RunFolder) -> str:
    """As people call it."""
    return "CPU" if run.figures.get("device") == "cpu" else "GPU"


def _exposed(runs: Sequence[RunFolder]) -> Sequence[Markup]:
    how = (
        "Time a step in which the device stood still for a delta, by the stream that it was still in, or for weights "
        f"or activations (means over the steps after the first {WARM_UP_STEPS})."
    )
    rows = []
    longest_s = 0.0
    has_peers = any(step.computed_s_by_gpu for run in runs for step in run.steps)
    has_waited = {
        cause: any(step.exposed_by_cause[cause] > 0 for run in runs for step in run.steps)
        for cause in (Cause.WEIGHTS, Cause.ACTIVATIONS)
    }
    shown = {Cause.PEERS: has_peers, **has_waited}
    causes = [cause for cause in Cause if shown.get(cause, True)]
    for run in runs:
        if not run.steps:
            continue
        late_s = {cause: fmean(step.exposed_by_cause[cause] for step in run.settled) for cause in causes}
        step_s = fmean(step.step_time_s for step in run.settled)
        longest_s = max(longest_s, sum(late_s.values()), _LEAST_SHOWN * step_s)
        texts = [f"{CAUSE_NAMES[cause]} {late_s[cause] * 1e3:.1f}" for cause in causes]
        segments = [
            Segment(value=late_s[cause], kind=cause.value, text=f"{text} ms")
            for cause, text in zip(causes, texts, strict=True)
        ]
        # with more causes than three their names, which the legend has in the same order, would be cut off
        told = texts if len(causes) <= _MOST_NAMED else [f"{late_s[cause] * 1e3:.1f}" for cause in causes]
        figures = f"{' · '.join(told)} ms: {sum(late_s.values()) / step_s:.1%} of the step"
        rows.append(Bar(label=run.name, segments=segments, figures=figures))
    scale = _text(how, f" The full width is {longest_s * 1e3:.0f} ms.")
    return scale, _stream_legend(*causes), bars(rows, full=longest_s)


def _busy(runs: Sequence[RunFolder]) -> Sequence[Markup]:
    rows = []
    for run in runs:
        if not run.steps:
            continue
        step_s = fmean(step.step_time_s for step in run.settled)
        for stream in WorkStream:
            share = fmean(step.busy_by_stream[stream] for step in run.settled) / step_s
            name = _device(run) if stream is WorkStream.GPU else STREAM_NAMES[stream]
            label = f"{run.name} · {name}" if len(runs) > 1 else name
            segment = Segment(value=share, kind=stream.value, text=f"{share:.1%}")
            rows.append(Bar(label=label, segments=[segment], figures=f"{share:.1%}"))
    how = _text("Share of the step in which a stream had work; several shards count as one stream.")
    return how, bars(rows, full=1), *_gpus(runs)


def _gpus(runs: Sequence[RunFolder]) -> Sequence[Markup]:
    """What each of several GPUs computed: the others wait for the slowest."""
    rows, longest_s = [], 0.0
    for run in runs:
        times_s: dict[str, list[float]] = {}
        for step in run.settled:
            for gpu, seconds in (step.computed_s_by_gpu or {}).items():
                times_s.setdefault(gpu, []).append(seconds)
        means_s = {gpu: fmean(seconds) for gpu, seconds in times_s.items()}
        for gpu, mean_s in means_s.items():
            longest_s = max(longest_s, mean_s)
            is_slowest = mean_s == max(means_s.values())
            segment = Segment(value=mean_s, kind=WorkStream.GPU.value, text=f"{mean_s:.3f} s")
            figures = f"{mean_s:.3f} s{', the slowest' if is_slowest else ''}"
            rows.append(Bar(label=f"{run.name} · {gpu}" if len(runs) > 1 else gpu, segments=[segment], figures=figures))
    if not rows:
        return ()
    return element("h3", "Compute of each GPU a step"), bars(rows, full=longest_s)


def _memory(runs: Sequence[RunFolder]) -> Sequence[Markup]:
    peaks, traffic = [], []
    for run in runs:
        peak = _number(run, "peak_device_bytes")
        part = Segment(value=peak, kind=WorkStream.GPU.value, text=size(peak))
        peaks.append(Bar(label=run.name, segments=[part], figures=size(peak) if peak else NOTHING))
        both = {stream: _number(run, f"bytes_{stream}_per_step") for stream in (WorkStream.D2H, WorkStream.H2D)}
        texts = [f"{STREAM_NAMES[stream]} {size(num_bytes)}" for stream, num_bytes in both.items()]
        segments = [
            Segment(value=num_bytes, kind=stream.value, text=text)
            for (stream, num_bytes), text in zip(both.items(), texts, strict=True)
        ]
        traffic.append(Bar(label=run.name, segments=segments, figures=" · ".join(texts)))
    return element("h3", "Peak memory on the device"), bars(peaks), element("h3", "Bytes a step"), bars(traffic)


def _bias(runs: Sequence[RunFolder]) -> Sequence[Markup]:
    series = []
    for index, run in enumerate(runs):
        points = [(float(layer), bias) for step in run.steps for layer, bias in (step.bias_by_layer or {}).items()]
        series.append(Series(name=run.name, run=index, points=sorted(points), is_line=False))
    how = (
        "Relative bias of the projected gradient: 0 keeps the whole gradient, 1 nothing. Each dot "
        "is one measurement of the layer's matrices that were in the sample (lsp.check_every)."
    )
    drawn = chart(series, x_label="layer", y_label="relative bias")
    return _text(how), _run_legend(runs), element("div", drawn, class_="pair")


def _samples(runs: Sequence[RunFolder]) -> Sequence[Markup]:
    parts = []
    for run in runs:
        answers = [
            joined(element("dt", title), element("dd", str(run.summary[name])))
            for name, title in _SAMPLES
            if name in run.summary
        ]
        shown = element("dl", *answers) if answers else element("p", "No answer was kept.", class_="nothing")
        parts += [element("h3", run.name), shown]
    return parts


def _config(runs: Sequence[RunFolder]) -> Sequence[Markup]:
    marked = "Options in which the runs differ come first, marked ≠." if len(runs) > 1 else "Every option of the run."
    return _text(marked), config_table(runs)


def _number(run: RunFolder, name: str) -> float:
    value = run.figures.get(name)
    return float(value) if isinstance(value, int | float) else 0.0
