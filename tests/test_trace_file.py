"""trace.json: what Perfetto is given, what is read back, and what a run that was killed leaves."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lsp_ray.trace import Cause, ComputeSpan, Phase, Span, Timeline, WaitPart, WorkStream, is_traced
from lsp_ray.trace_file import Trace, TraceFile, read_trace, trace_file


def timeline(step: int) -> Timeline:
    """A step of one second with one layer: everything once."""
    zero = 100.0 + step

    def op(stream: WorkStream, start_s: float) -> Span:
        return Span(stream=stream, step=step, layer=0, start_s=zero + start_s, end_s=zero + start_s + 0.125)

    return Timeline(
        step=step,
        start_s=zero,
        end_s=zero + 1,
        compute=(
            ComputeSpan(phase=Phase.FORWARD, step=step, layer=0, start_s=zero + 0.25, end_s=zero + 0.5),
            ComputeSpan(phase=Phase.BACKWARD, step=step, layer=0, start_s=zero + 0.5, end_s=zero + 1),
        ),
        ops=(op(WorkStream.D2H, 1.0), op(WorkStream.CPU, 1.125), op(WorkStream.H2D, 1.25)),
        waits=(WaitPart(cause=Cause.CPU, step=step - 1, layer=0, start_s=zero, end_s=zero + 0.25),),
    )


def written(path: Path, *steps: int) -> Trace:
    with trace_file(path, [0], num_steps=100) as trace:
        for step in steps:
            trace.write(timeline(step))
    return read_trace(path)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    trace = written(tmp_path / "trace.json", 0, 1)
    assert trace.rows == ("GPU", "GPU waits", "down-link", "CPU shard 0", "up-link")
    assert trace.steps == {0: (0.0, 1.0), 1: (1.0, 2.0)}
    assert trace.is_complete
    second = trace.spans[len(trace.spans) // 2 :]
    assert [(span.row, span.category, span.start_s, span.end_s) for span in second] == [
        ("GPU", "forward", 1.25, 1.5),
        ("GPU", "backward", 1.5, 2.0),
        ("down-link", "d2h", 2.0, 2.125),
        ("CPU shard 0", "cpu", 2.125, 2.25),
        ("up-link", "h2d", 2.25, 2.375),
        ("GPU waits", "wait", 1.0, 1.25),
    ]
    assert (second[-1].step, second[-1].cause) == (0, "cpu")


def test_every_event_has_what_the_trace_event_format_asks_for(tmp_path: Path) -> None:
    written(tmp_path / "trace.json", 0)
    events = json.loads((tmp_path / "trace.json").read_text())
    assert {event["ph"] for event in events} == {"M", "b", "e", "X"}
    for event in events:
        assert {"name", "ph", "pid", "tid", "args"} <= set(event)
        assert event["ph"] == "M" or event["ts"] >= 0
        assert event["ph"] != "X" or (event["dur"] > 0 and event["cat"])
        assert event["ph"] not in "be" or event["id"] == 1
    named = {event["tid"] for event in events if event["name"] == "thread_name"}
    assert 0 not in named  # Perfetto would show it in the row of another
    assert {event["tid"] for event in events} <= named


def test_each_of_several_gpus_has_rows_of_its_own(tmp_path: Path) -> None:
    one = timeline(0)
    ops = (replace(one.ops[0], part=2), one.ops[1], replace(one.ops[2], part=1))
    with trace_file(tmp_path / "trace.json", [0], num_steps=1, gpu_of_part=(0, 0, 1)) as trace:
        trace.write(replace(one, ops=ops, compute=(replace(one.compute[0], gpu=1), one.compute[1])))
    read = read_trace(tmp_path / "trace.json")
    links = [f"{way}-link {gpu}" for way in ("down", "up") for gpu in (0, 1)]
    assert list(read.rows) == ["GPU 0", "GPU 1", "GPU waits", *links[:2], "CPU shard 0", *links[2:]]
    assert [span.row for span in read.spans] == [
        *("GPU 1", "GPU 0", "down-link 1", "CPU shard 0", "up-link 1", "GPU waits")
    ]


def test_each_shard_has_a_row_of_its_own() -> None:
    file = io.StringIO()
    TraceFile(file, [0, 2, 1], num_steps=1)
    assert [f'"CPU shard {index}"' in file.getvalue() for index in range(4)] == [True, True, True, False]


def test_without_anything_sent_there_are_only_the_gpus_rows(tmp_path: Path) -> None:
    with trace_file(tmp_path / "trace.json", [], num_steps=1):
        pass
    assert read_trace(tmp_path / "trace.json").rows == ("GPU", "GPU waits")


def test_a_run_that_fails_leaves_a_whole_trace_of_the_steps_before(tmp_path: Path) -> None:
    def fail() -> None:
        with trace_file(tmp_path / "trace.json", [0], num_steps=100) as trace:
            trace.write(timeline(0))
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        fail()
    assert len(json.loads((tmp_path / "trace.json").read_text())) > 6
    assert list(read_trace(tmp_path / "trace.json").steps) == [0]


def test_a_killed_runs_steps_are_on_disk_before_the_file_is_closed(tmp_path: Path) -> None:
    with trace_file(tmp_path / "trace.json", [0], num_steps=100) as trace:
        trace.write(timeline(0))
        trace.write(timeline(1))
        left = read_trace(tmp_path / "trace.json")
    assert list(left.steps) == [0, 1]
    assert not left.is_complete


@given(share=st.floats(0, 1))
def test_a_trace_cut_anywhere_is_read_up_to_there(tmp_path_factory: pytest.TempPathFactory, share: float) -> None:
    folder = tmp_path_factory.mktemp("cut")
    whole = written(folder / "trace.json", 0, 1)
    text = (folder / "trace.json").read_text()
    (folder / "trace.json").write_text(text[: round(share * len(text))])
    cut = read_trace(folder / "trace.json")
    assert cut.spans == whole.spans[: len(cut.spans)]
    assert set(cut.steps.items()) <= set(whole.steps.items())


def test_a_long_run_traces_its_first_steps_and_as_many_in_its_middle(tmp_path: Path) -> None:
    with trace_file(tmp_path / "trace.json", [0], num_steps=10_000) as trace:
        for step in range(10_000):
            trace.write(timeline(step))
    assert list(read_trace(tmp_path / "trace.json").steps) == [*range(5), *range(4997, 5002)]


@given(num_steps=st.integers(1, 10))
def test_a_short_run_is_traced_without_a_gap(num_steps: int) -> None:
    traced = [step for step in range(num_steps) if is_traced(step, num_steps)]
    assert len(traced) >= min(num_steps, 5)
    assert traced == list(range(len(traced)))
