"""Busy time of a stream and the split of waiting by its cause."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lsp_ray.trace import Exposed, Span, StepMetrics, Wait, WorkStream, busy_s, exposed

TIMES = st.integers(min_value=0, max_value=30)


def span(stream: WorkStream, start_s: float, end_s: float, *, step: int = 0, layer: int = 0) -> Span:
    return Span(stream=stream, step=step, layer=layer, start_s=start_s, end_s=end_s)


def wait(start_s: float, end_s: float, *, step: int = 0, layer: int = 0) -> Wait:
    return Wait(step=step, layer=layer, start_s=start_s, end_s=end_s)


def test_overlapping_spans_of_a_stream_count_once() -> None:
    spans = [span(WorkStream.GPU, 1, 4), span(WorkStream.GPU, 3, 6), span(WorkStream.GPU, 8, 9)]
    assert busy_s(spans, WorkStream.GPU, 0, 10) == 6


def test_a_span_inside_another_adds_nothing() -> None:
    assert busy_s([span(WorkStream.GPU, 1, 9), span(WorkStream.GPU, 2, 3)], WorkStream.GPU, 0, 10) == 8


def test_spans_are_clipped_to_the_window() -> None:
    spans = [span(WorkStream.D2H, 0, 3), span(WorkStream.D2H, 7, 20), span(WorkStream.D2H, 8, 30)]
    assert busy_s(spans, WorkStream.D2H, 2, 10) == 4


def test_spans_outside_the_window_do_not_count() -> None:
    assert busy_s([span(WorkStream.D2H, 0, 2), span(WorkStream.D2H, 10, 12)], WorkStream.D2H, 2, 10) == 0


def test_another_streams_spans_do_not_count() -> None:
    assert busy_s([span(WorkStream.CPU, 1, 4), span(WorkStream.H2D, 2, 4)], WorkStream.H2D, 0, 10) == 2


@settings(deadline=None)
@given(pairs=st.lists(st.tuples(TIMES, TIMES), max_size=8), window=st.tuples(TIMES, TIMES))
def test_busy_time_is_the_number_of_covered_unit_intervals(
    pairs: list[tuple[int, int]], window: tuple[int, int]
) -> None:
    start, end = sorted(window)
    spans = [span(WorkStream.CPU, *sorted(pair)) for pair in pairs]
    covered = {unit for pair in pairs for unit in range(*sorted(pair))} & set(range(start, end))
    assert busy_s(spans, WorkStream.CPU, start, end) == len(covered)


def test_a_wait_is_split_by_what_the_delta_still_lacked() -> None:
    spans = [span(WorkStream.D2H, 8, 12), span(WorkStream.CPU, 13, 17), span(WorkStream.H2D, 18, 20)]
    assert exposed([wait(10, 20)], spans) == Exposed(d2h_s=2, cpu_s=5, h2d_s=3)


def test_a_wait_that_starts_after_the_update_is_all_h2ds() -> None:
    spans = [span(WorkStream.D2H, 1, 2), span(WorkStream.CPU, 3, 4), span(WorkStream.H2D, 9, 12)]
    assert exposed([wait(10, 12)], spans) == Exposed(h2d_s=2)


def test_a_wait_that_starts_during_the_update_blames_no_d2h() -> None:
    spans = [span(WorkStream.D2H, 1, 2), span(WorkStream.CPU, 3, 11), span(WorkStream.H2D, 11, 12)]
    assert exposed([wait(10, 12)], spans) == Exposed(cpu_s=1, h2d_s=1)


def test_a_wait_is_blamed_on_its_own_layer_and_step_only() -> None:
    spans = [
        span(WorkStream.D2H, 0, 14, layer=1),
        span(WorkStream.CPU, 0, 15, step=1),
        span(WorkStream.D2H, 9, 11),
        span(WorkStream.CPU, 11, 13),
    ]
    assert exposed([wait(10, 16)], spans) == Exposed(d2h_s=1, cpu_s=2, h2d_s=3)


def test_the_parts_of_several_waits_add_up() -> None:
    spans = [span(WorkStream.D2H, 0, 2), span(WorkStream.CPU, 2, 3), span(WorkStream.D2H, 3, 7, layer=1)]
    waits = [wait(1, 4), wait(6, 9, layer=1)]
    assert exposed(waits, spans) == Exposed(d2h_s=2, cpu_s=1, h2d_s=3)


def test_what_other_gpus_payloads_were_waited_for_is_the_peers() -> None:
    parts = [replace(span(WorkStream.D2H, 5, end_s), part=part) for part, end_s in enumerate((11, 12, 15))]
    spans = [*parts, span(WorkStream.CPU, 15, 17)]
    assert exposed([wait(10, 20)], spans, own_parts=[0, 1]) == Exposed(d2h_s=2, peers_s=3, cpu_s=2, h2d_s=3)
    assert exposed([wait(10, 20)], spans, own_parts=[2]) == Exposed(d2h_s=5, cpu_s=2, h2d_s=3)
    assert exposed([wait(10, 20)], spans) == Exposed(d2h_s=5, cpu_s=2, h2d_s=3)


def test_without_a_wait_nothing_is_exposed() -> None:
    assert exposed([], [span(WorkStream.D2H, 0, 2)]) == Exposed()


@settings(deadline=None)
@given(
    ends=st.dictionaries(
        st.tuples(st.sampled_from([WorkStream.D2H, WorkStream.CPU, WorkStream.H2D]), st.integers(0, 2)), TIMES
    ),
    waits=st.lists(st.tuples(st.integers(0, 2), TIMES, TIMES), max_size=6),
)
def test_the_causes_of_a_wait_are_never_negative_and_sum_to_it(
    ends: dict[tuple[WorkStream, int], int], waits: list[tuple[int, int, int]]
) -> None:
    spans = [span(stream, 0, end, layer=layer) for (stream, layer), end in ends.items()]
    records = [wait(min(first, last), max(first, last), layer=layer) for layer, first, last in waits]
    parts = exposed(records, spans)
    assert min(parts.d2h_s, parts.cpu_s, parts.h2d_s) >= 0
    assert parts.total_s == sum(record.end_s - record.start_s for record in records)


def test_a_steps_exposed_time_is_the_sum_of_its_three_causes() -> None:
    metrics = StepMetrics(
        step=3,
        loss=2.5,
        grad_norm=1.0,
        learning_rate=1e-4,
        num_tokens=512,
        tokens_per_second=256.0,
        step_time_s=2.0,
        gpu_busy_s=1.5,
        d2h_busy_s=0.5,
        cpu_busy_s=0.5,
        h2d_busy_s=0.5,
        exposed_d2h_s=0.125,
        exposed_cpu_s=0.25,
        exposed_h2d_s=0.5,
        bytes_d2h=1024,
        bytes_h2d=1024,
    )
    assert metrics.exposed_s == pytest.approx(0.875, abs=0)
