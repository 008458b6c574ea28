"""Progress: what a log file gets, what a terminal shows, and what must never end a run."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from lsp_ray.report.duration import format_duration
from lsp_ray.report.progress import Progress, stream_shares
from lsp_ray.trace import StepMetrics

STEP = StepMetrics(
    step=1,
    loss=3.25,
    grad_norm=1.0,
    learning_rate=1e-4,
    num_tokens=512,
    tokens_per_second=256.4,
    step_time_s=2.0,
    gpu_busy_s=1.94,
    d2h_busy_s=0.02,
    cpu_busy_s=0.46,
    h2d_busy_s=0.0,
    exposed_d2h_s=0.0,
    exposed_cpu_s=0.0,
    exposed_h2d_s=0.0,
    bytes_d2h=1,
    bytes_h2d=1,
)


class BrokenStream(io.StringIO):
    """A terminal that went away: every use of it fails."""

    encoding = "utf-8"

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str, /) -> int:
        raise self.error

    def flush(self) -> None:
        raise self.error

    def isatty(self) -> bool:
        return True


@pytest.fixture
def log() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def plain(log: io.StringIO, now: list[float]) -> Progress:
    return Progress(40, Console(file=log, force_terminal=False, width=20), clock=lambda: now[0])


@pytest.fixture
def now() -> list[float]:
    return [100.0]


@pytest.fixture
def screen() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def live(screen: io.StringIO, now: list[float]) -> Iterator[Progress]:
    console = Console(file=screen, force_terminal=True, width=120, height=20, _environ={"TERM": "xterm"})
    with Progress(40, console, clock=lambda: now[0]) as progress:
        yield progress


def run_everything(progress: Progress) -> None:
    with progress:
        progress.phase("fitting projectors")
        progress.note("answer: naïve – 你好 🚀")
        progress.step(STEP)
        progress.phase("saving")


def test_a_log_gets_one_line_per_step_however_narrow(plain: Progress, log: io.StringIO) -> None:
    with plain:
        plain.step(STEP)
        plain.step(replace(STEP, step=2))
    assert log.getvalue().splitlines() == [
        "step 1/40  loss 3.2500  lr 1.00e-04  256 tokens/s  ETA 1:18  gpu 97 %  down 1 %  shards 23 %  up 0 %",
        "step 2/40  loss 3.2500  lr 1.00e-04  256 tokens/s  ETA 1:16  gpu 97 %  down 1 %  shards 23 %  up 0 %",
    ]


def test_a_step_names_its_epoch_and_the_device_that_computed(plain: Progress, log: io.StringIO) -> None:
    plain.steps_per_epoch, plain.device = 16.0, "cpu"
    plain.step(replace(STEP, step=24))
    assert log.getvalue().startswith("step 24/40  epoch 1.50  loss 3.2500  lr 1.00e-04  ")
    assert "  cpu 97 %  down 1 %" in log.getvalue()
    assert "gpu" not in log.getvalue()


def test_one_line_in_logging_steps_is_written_and_the_first_and_the_last(plain: Progress, log: io.StringIO) -> None:
    plain.logging_steps = 15
    for step in range(1, 41):
        plain.step(replace(STEP, step=step))
    assert [line.split()[1] for line in log.getvalue().splitlines()] == ["1/40", "15/40", "30/40", "40/40"]


def test_a_log_gets_one_line_per_phase(plain: Progress, log: io.StringIO) -> None:
    with plain:
        plain.phase("fitting\n projectors")
    assert log.getvalue() == "[0:00] fitting projectors ...\n"


def test_a_phase_says_how_long_the_run_has_taken_and_the_phase(
    plain: Progress, log: io.StringIO, now: list[float]
) -> None:
    now[0] += 65.0
    plain.phase("training")
    now[0] += 12.0
    assert log.getvalue() == "[1:05] training ...\n"
    assert plain.status() == "training (0:12)"
    assert plain.elapsed == "1:17"


def test_the_phase_on_a_terminal_counts_its_seconds(live: Progress, screen: io.StringIO, now: list[float]) -> None:
    live.phase("fitting projectors")
    now[0] += 9.0
    assert live._live is not None
    live._live.refresh()
    assert "fitting projectors (0:09)" in screen.getvalue()


def test_lines_are_plain_outside_the_with_block_too(plain: Progress, log: io.StringIO) -> None:
    plain.phase("loading")
    plain.note("ready")
    plain.step(STEP)
    assert [line.split()[0] for line in log.getvalue().splitlines()] == ["[0:00]", "ready", "step"]


def test_one_slow_step_does_not_move_the_eta(plain: Progress, log: io.StringIO) -> None:
    for step, step_time_s in enumerate([60.0, 2.0, 2.0], start=1):
        plain.step(replace(STEP, step=step, step_time_s=step_time_s))
    assert "ETA 1:14" in log.getvalue().splitlines()[-1]


def test_steps_past_the_total_have_no_time_left(plain: Progress, log: io.StringIO) -> None:
    plain.step(replace(STEP, step=41))
    assert "step 41/40" in log.getvalue()
    assert "ETA 0:00" in log.getvalue()


@pytest.mark.parametrize("step_time_s", [0.0, float("nan"), float("inf")])
def test_a_step_without_a_usable_time_is_still_shown(plain: Progress, log: io.StringIO, step_time_s: float) -> None:
    plain.step(replace(STEP, loss=float("nan"), step_time_s=step_time_s))
    assert log.getvalue().startswith("step 1/40  loss nan")


def test_markup_in_a_note_is_text(plain: Progress, log: io.StringIO) -> None:
    plain.note("[bold]x[/] [/nothing] :smile:")
    assert log.getvalue() == "[bold]x[/] [/nothing] :smile:\n"


def test_control_characters_in_a_note_never_reach_the_terminal(plain: Progress, log: io.StringIO) -> None:
    plain.note("a\x1b[2Jb\x07c\r\nd")
    assert log.getvalue() == "a[2Jbc\nd\n"


@given(text=st.text())
def test_any_text_can_be_shown(text: str) -> None:
    log = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="replace")
    for is_terminal in (False, True):
        progress = Progress(1, Console(file=log, force_terminal=is_terminal))
        progress.note(text)
        progress.phase(text)


def test_a_terminal_shows_phase_bar_and_streams(live: Progress, screen: io.StringIO) -> None:
    live.phase("fitting projectors")
    assert "fitting projectors" in screen.getvalue()
    live.note("sample [answer]")
    live.step(STEP)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert "sample [answer]" in shown
    assert "step 1/40  loss 3.2500  lr 1.00e-04  256 tokens/s  ETA 1:18" in shown
    assert "gpu 97 %  down 1 %  shards 23 %  up 0 %" in shown


def test_a_step_ends_the_phase(live: Progress, screen: io.StringIO) -> None:
    live.phase("fitting projectors")
    live.step(STEP)
    screen.truncate(0)
    live.step(replace(STEP, step=2))
    assert "fitting projectors" not in screen.getvalue()
    assert "step 2/40" in screen.getvalue()


def test_an_error_inside_the_block_gives_the_terminal_back(screen: io.StringIO) -> None:
    progress = Progress(40, Console(file=screen, force_terminal=True, _environ={"TERM": "xterm"}))
    with pytest.raises(KeyError), progress:
        raise KeyError("x")
    assert screen.getvalue().endswith("\x1b[?25h")
    assert not hasattr(sys.stdout, "rich_proxied_file")


def test_a_dumb_terminal_gets_plain_lines(log: io.StringIO) -> None:
    run_everything(Progress(40, Console(file=log, force_terminal=True, _environ={"TERM": "dumb"})))
    assert "\x1b" not in log.getvalue()
    assert "step 1/40" in log.getvalue()


@pytest.mark.parametrize("width", [1, 5, 30])
def test_a_tiny_terminal_raises_nothing(screen: io.StringIO, width: int) -> None:
    environ = {"TERM": "xterm"}
    run_everything(Progress(40, Console(file=screen, force_terminal=True, width=width, height=1, _environ=environ)))


@pytest.mark.parametrize("error", [BrokenPipeError(32, "gone"), OSError(5, "gone"), ValueError("closed")])
def test_a_terminal_that_goes_away_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr(sys, "stdout", BrokenStream(error))
    run_everything(Progress(40))


def test_a_process_without_standard_output_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    run_everything(Progress(40))


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_an_encoding_lacks_becomes_a_question_mark(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, write_through=True))
    run_everything(Progress(40))
    expected = "answer: naïve – 你好 🚀".encode(encoding, "replace")
    assert expected in raw.getvalue().splitlines()


def test_a_log_file_stays_plain_when_the_environment_forces_colour(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    run_everything(Progress(40))
    shown = capsys.readouterr().out
    assert "step 1/40" in shown
    assert "\x1b" not in shown


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0:00"),
        (59.6, "1:00"),
        (61, "1:01"),
        (3661, "1:01:01"),
        (-1, "?"),
        (float("nan"), "?"),
        (float("inf"), "?"),
    ],
)
def test_durations_read_as_clock_times(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_shares_are_of_the_step_time() -> None:
    assert stream_shares(STEP, "gpu") == "gpu 97 %  down 1 %  shards 23 %  up 0 %"
    assert stream_shares(replace(STEP, step_time_s=0.0), "cpu") == "cpu ? %  down ? %  shards ? %  up ? %"


def test_where_nothing_leaves_the_device_only_its_share_is_shown() -> None:
    assert stream_shares(replace(STEP, d2h_busy_s=0.0, cpu_busy_s=0.0), "cpu") == "cpu 97 %"
