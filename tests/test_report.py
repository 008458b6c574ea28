"""report.html: well formed, complete, escaped and self-contained, also for folders that lack something."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lsp_ray.report.__main__ import main
from lsp_ray.report.axis import Axis
from lsp_ray.report.markup import element
from lsp_ray.report.page import report
from lsp_ray.report.run_folder import read_run
from lsp_ray.trace_file import trace_file
from tests.test_progress import STEP
from tests.test_trace_file import timeline

EVIL = "<script>alert('&amp;')</script>"
VOID = {"meta"}


class Page(HTMLParser):
    """Every tag with its attributes, every text; complains where tags do not close in order."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(document)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def of_class(self, name: str) -> list[dict[str, str]]:
        return [attributes for _, attributes in self.tags if name in attributes.get("class", "").split()]


def write_run(folder: Path, *, num_steps: int = 4, dataset: str = "notes.jsonl", seed: int = 42) -> Path:
    """What a run of one layer and one shard leaves; its second step has a bias measured."""
    folder.mkdir(parents=True)
    config = {"dataset": dataset, "seed": seed, "lsp": {"subspace_dim": 256}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    steps = [replace(STEP, step=number + 1, loss=4.0 - number / 4, exposed_cpu_s=0.05) for number in range(num_steps)]
    steps[1] = replace(steps[1], bias_by_layer={"0": 0.5, "7": 0.75})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(asdict(step)) + "\n" for step in steps))
    summary = {"method": "lsp", "eval_loss_before": 4.0, "eval_loss_after": 3.25, "peak_device_bytes": 7e8}
    (folder / "summary.json").write_text(json.dumps({**summary, "sample_after": "It <adds> & returns."}))
    with trace_file(folder / "trace.json", [0], num_steps=num_steps) as trace:
        for step in range(num_steps):
            trace.write(timeline(step))
    return folder


def test_the_report_of_a_run_has_every_section_and_figure(tmp_path: Path) -> None:
    page = Page(report([read_run(write_run(tmp_path / "run"))]))
    titles = ("At a glance", "Loss", "The four streams in a typical step", "Exposed time by cause", "Bias by layer")
    for text in (*titles, "3.2500", "700 MB", "It <adds> & returns.", "lsp.subspace_dim", "256"):
        assert text in page.texts
    assert len(page.of_class("line")) == 2 + 2  # two charts, and the run's sample in two legends
    assert len(page.of_class("dot")) == 2 * 4 + 2


def test_eval_losses_between_steps_have_charts_of_their_own_from_before_to_after(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines[1] = json.dumps({**json.loads(lines[1]), "eval_loss": 3.5})
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    run = read_run(folder)
    assert [(point.step, point.seconds, point.loss) for point in run.eval_losses] == [
        (0, 0.0, 4.0),
        (2, 4.0, 3.5),
        (4, 8.0, 3.25),
    ]
    page = Page(report([run]))
    assert len(page.of_class("dot")) == 2 * 4 + 2 * 3 + 2
    assert page.texts.count("eval loss") == 2


def test_the_gantt_has_a_bar_for_every_span_that_reaches_into_the_step(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    page = Page(report([run]))
    step = run.typical_step()
    assert run.trace is not None
    assert step is not None
    start_s, end_s = run.trace.steps[step]
    within = [span for span in run.trace.spans if span.end_s > start_s and span.start_s < end_s]
    hovers = [text for text in page.texts if re.search(r"layer \d+.*: [\d.]+ ms", text)]
    assert len(hovers) == len(within) == 6  # three of its own, three of the step before


def test_the_typical_step_is_the_traced_one_nearest_to_the_median(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", num_steps=5)
    with trace_file(folder / "trace.json", [0], num_steps=5) as trace:
        for step, seconds in enumerate((2.0, 2.0, 9.0, 2.1, 1.0)):
            trace.write(replace(timeline(step), start_s=100.0 + 10 * step, end_s=100.0 + 10 * step + seconds))
    assert read_run(folder).typical_step() == 3  # the median is 2 s, but the first two steps warm up


def test_a_report_names_model_data_and_duration(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    summary = json.loads((folder / "summary.json").read_text())
    facts = {"model": "some/model", "num_train_examples": 90, "num_eval_examples": 10, "duration_s": 83.0}
    (folder / "summary.json").write_text(json.dumps({**summary, **facts}))
    page = Page(report([read_run(folder)]))
    assert {"some/model", "notes.jsonl (90 examples, 10 held out)", "1:23"} <= set(page.texts)


def test_steps_of_two_runs_are_drawn_to_one_scale(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name) for name in ("one", "two")]
    with trace_file(folders[1] / "trace.json", [0], num_steps=4) as trace:
        for step in range(4):
            trace.write(replace(timeline(step), start_s=100.0 + 10 * step, end_s=104.0 + 10 * step))
    runs = [read_run(folder) for folder in folders]
    alone, both = (Page(report(some)) for some in (runs[:1], runs))

    def axes(page: Page) -> list[str]:
        ticks = [text for text in page.texts if re.fullmatch(r"\d+", text)]
        return [text for text in ticks if int(text) >= 1000]

    assert "4000" not in axes(alone)
    assert axes(both).count("4000") == 2  # the shorter run's axis is the longer one's


def test_internal_files_are_found_in_their_folder_and_where_older_runs_have_them(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    older = read_run(folder)
    (folder / "internals").mkdir()
    (folder / "trace.json").rename(folder / "internals" / "trace.json")
    assert older.trace is not None
    assert read_run(folder) == older


def test_text_from_data_is_escaped_wherever_it_shows(tmp_path: Path) -> None:
    folder = write_run(tmp_path / EVIL.replace("/", "_"), dataset=EVIL)
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps({**summary, "method": EVIL, "sample_before": EVIL}))
    document = report([read_run(folder)])
    page = Page(document)
    assert "<script" not in document
    assert page.texts.count(EVIL) == 4  # method, dataset twice, sample


def test_the_report_refers_to_nothing_outside_itself(tmp_path: Path) -> None:
    document = report([read_run(write_run(tmp_path / "run"))])
    assert not re.search(r"https?:|//|@import|url\(", document)
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in Page(document).tags}


def test_runs_side_by_side_mark_only_the_options_in_which_they_differ(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / name, seed=seed)) for name, seed in (("one", 1), ("two", 2))]
    page = Page(report(runs))
    assert len(page.of_class("differs")) == 1
    assert "≠ seed" in page.texts
    assert "dataset" in page.texts
    assert page.of_class("run-0")
    assert page.of_class("run-1")


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "summary.json", "trace.json"])
def test_a_missing_file_is_said_in_one_line_and_the_rest_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    folder = write_run(tmp_path / "run")
    (folder / name).unlink()
    assert main([str(folder), "--output", str(tmp_path / "report.html")]) == 0
    assert capsys.readouterr().err == f"run: {name} is missing\n"
    page = Page((tmp_path / "report.html").read_text())
    assert f"run: {name} is missing" in page.texts
    assert len(page.of_class("bar")) >= 4


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "summary.json", "trace.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"\xff\xfe\x00", b'{"a": ['])
def test_a_damaged_file_is_said_and_the_rest_is_shown(tmp_path: Path, name: str, content: bytes) -> None:
    folder = write_run(tmp_path / "run")
    (folder / name).write_bytes(content)
    run = read_run(folder)
    Page(report([run]))
    said = [line for line in run.complaints if line.startswith(name)]
    assert len(said) == (0 if (name, content) == ("metrics.jsonl", b"") else 1)


@given(share=st.floats(0, 1))
def test_metrics_cut_anywhere_show_the_whole_lines_before(
    tmp_path_factory: pytest.TempPathFactory, share: float
) -> None:
    folder = write_run(tmp_path_factory.mktemp("cut") / "run")
    text = (folder / "metrics.jsonl").read_text()
    cut = text[: round(share * len(text))]
    (folder / "metrics.jsonl").write_text(cut)
    run = read_run(folder)
    assert cut.count("\n") <= len(run.steps) <= cut.count("\n") + 1
    Page(report([run]))


def test_a_folder_that_is_no_run_ends_in_one_line_with_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert main([str(folder), "--output", str(tmp_path / "report.html")]) == 2
        said = capsys.readouterr().err
        assert re.fullmatch(rf"error: run_dir must be the output folder of a run, .*, got '{folder}'\n", said)
    assert not (tmp_path / "report.html").exists()


def test_the_report_of_one_run_is_written_into_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run")
    assert main([str(folder)]) == 0
    assert capsys.readouterr().out == f"report: {folder / 'report.html'}\n"
    Page((folder / "report.html").read_text())


def test_an_output_that_cannot_be_written_ends_in_one_line_with_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(write_run(tmp_path / "run")), "--output", str(tmp_path)]) == 2
    assert re.fullmatch(r"error: output must be a file that can be written .*\n", capsys.readouterr().err)


def test_help_needs_neither_torch_nor_ray() -> None:
    code = (
        "import sys\n"
        "from lsp_ray.report.__main__ import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'ray', 'transformers', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "run_dir" in done.stdout


@given(text=st.text())
def test_any_text_comes_back_as_it_was(text: str) -> None:
    page = Page(element("p", text, title=text))
    shown = text.replace("\r\n", "\n")
    assert "".join(page.texts).replace("\r\n", "\n") == shown
    assert page.tags[0][1]["title"].replace("\r\n", "\n") == shown


@given(
    low=st.floats(-1e6, 1e6),
    extent=st.floats(1e-3, 1e6),
    about=st.integers(2, 12),
)
def test_ticks_are_round_and_within_the_axis(low: float, extent: float, about: int) -> None:
    axis = Axis(low=low, high=low + extent, start=0, end=100)
    ticks = axis.ticks(about)
    assert all(-1e-3 <= axis.at(tick) <= 100 + 1e-3 for tick in ticks)
    assert about / 3 <= len(ticks) + 1 <= about + 2


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_chromium_reads_the_same_figures(tmp_path: Path) -> None:
    output = tmp_path / "report.html"
    assert main([str(write_run(tmp_path / "run")), "--output", str(output)]) == 0
    options = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom")
    done = subprocess.run(
        ["chromium", *options, output.as_uri()], capture_output=True, text=True, timeout=60, check=True
    )
    assert len(Page(done.stdout.strip()).of_class("bar")) == len(Page(output.read_text()).of_class("bar"))
