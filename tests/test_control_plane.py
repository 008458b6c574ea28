"""scripts/control_plane.py: what it counts, on times made by hand, and that it runs."""

from __future__ import annotations

import pytest

from lsp_ray.trace import Cause, ComputeSpan, Phase, Span, Timeline, WaitPart, WorkStream
from scripts.control_plane import _gaps, _idle_waits_s, main

D2H, CPU, H2D = WorkStream.D2H, WorkStream.CPU, WorkStream.H2D


def op(stream: WorkStream, layer: int, start_s: float, end_s: float) -> Span:
    return Span(stream=stream, step=0, layer=layer, start_s=start_s, end_s=end_s)


def timeline(ops: list[Span], waits: list[tuple[float, float]]) -> Timeline:
    compute = [ComputeSpan(phase=Phase.BACKWARD, step=0, layer=n, start_s=0.0, end_s=2.0 - n) for n in (1, 0)]
    parts = [WaitPart(cause=Cause.CPU, step=0, layer=0, start_s=start_s, end_s=end_s) for start_s, end_s in waits]
    return Timeline(step=0, start_s=0.0, end_s=9.0, compute=tuple(compute), ops=tuple(ops), waits=tuple(parts))


def test_only_waits_in_which_no_lane_works_are_controls() -> None:
    before = timeline([op(D2H, 0, 0.0, 2.5), op(CPU, 0, 2.0, 3.0)], [(0.0, 1.0)])
    now = timeline([op(H2D, 0, 3.5, 4.0)], [(2.0, 5.0), (6.0, 6.25)])
    assert _idle_waits_s([before, now]) == pytest.approx(0.5 + 1.0 + 0.25)


def test_an_operation_is_late_from_when_its_input_is_there_and_its_lane_free() -> None:
    ops = [op(D2H, 1, 1.25, 3.0), op(D2H, 0, 3.5, 4.0), op(CPU, 1, 3.125, 3.25), op(CPU, 0, 4.0, 5.0)]
    assert _gaps(iter([timeline(ops, [])])) == [[0.25, 0.5], [0.125, 0.0], []]


def test_it_prints_a_line_for_each_policy(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--threads", "--layers", "2", "--steps", "8", "--policies", "layerwise,delayed"]) == 0
    units, _, *lines = capsys.readouterr().out.splitlines()
    assert units == "3 units, 9 operations a step, event log of 8 of 8 steps"  # the last norm is one
    assert [line.split()[0] for line in lines] == ["layerwise", "delayed"]
    assert all(float(line.split()[1]) > 0 for line in lines)


@pytest.mark.usefixtures("cluster")
def test_several_gpus_are_paced_and_the_drivers_time_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--gpus", "2", "--layers", "2", "--steps", "8", "--policies", "layerwise"]) == 0
    units, _, line = capsys.readouterr().out.splitlines()
    assert units.startswith("3 units, 15 operations a step, ")
    _, step_ms, _, _, driver_ms, *_ = line.split()
    assert float(step_ms) >= 2 * 3 * 2.0  # three units, forward and backward
    assert 0.0 < float(driver_ms) < float(step_ms)
