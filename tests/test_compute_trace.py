"""The compute stream's own spans: on a clock of the test's, and in a worker's real steps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from lsp_ray.device.backend import CpuBackend, HostStamp
from lsp_ray.device.compute_trace import ComputeTrace
from lsp_ray.methods.units import full_units
from lsp_ray.models.layers import find_layers
from lsp_ray.trace import ComputeSpan, Phase
from tests.loopback import Loopback
from tests.test_worker import batch, square_llama


class TickingBackend(CpuBackend):
    """Every stamp is one second after the one before."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def stamp(self) -> HostStamp:
        self.now_s += 1.0
        return HostStamp(at_s=self.now_s)


def read(trace: ComputeTrace) -> list[tuple[str, int, float, float]]:
    """Phase, layer, start and end on the ticking clock."""
    end = trace.end()
    assert isinstance(end, HostStamp)
    return [(span.phase, span.layer, span.start_s, span.end_s) for span in trace.spans(0, end, end.at_s)]


def test_a_forward_lasts_until_the_next_and_a_backward_since_the_one_before() -> None:
    trace = ComputeTrace(TickingBackend(), is_on=True)  # takes the first stamp
    trace.begin(Phase.FORWARD, 0)
    trace.begin(Phase.FORWARD, 1)
    trace.begin_backward()
    trace.gradient_done(1)
    trace.gradient_done(0)
    trace.end_backward()
    assert read(trace) == [("forward", 0, 2, 3), ("forward", 1, 3, 4), ("backward", 1, 4, 5), ("backward", 0, 5, 6)]


def test_a_wait_belongs_to_no_span() -> None:
    trace = ComputeTrace(TickingBackend(), is_on=True)
    trace.begin(Phase.FORWARD, 0)
    trace.pause()
    trace.begin(Phase.APPLY, 1)
    trace.begin(Phase.FORWARD, 1)
    assert read(trace) == [("forward", 0, 2, 3), ("apply", 1, 4, 5), ("forward", 1, 5, 6)]


def test_a_units_gradients_make_one_span() -> None:
    trace = ComputeTrace(TickingBackend(), is_on=True)
    trace.begin_backward()
    for unit in (1, 1, 1, 0, 0):
        trace.gradient_done(unit)
    assert read(trace) == [("backward", 1, 2, 5), ("backward", 0, 5, 7)]


def test_a_recomputed_forward_is_part_of_the_backward() -> None:
    trace = ComputeTrace(TickingBackend(), is_on=True)
    trace.begin_backward()
    trace.begin(Phase.FORWARD, 0)
    trace.gradient_done(0)
    assert read(trace) == [("backward", 0, 2, 3)]


def test_a_step_that_is_not_traced_takes_no_stamp() -> None:
    backend = TickingBackend()
    trace = ComputeTrace(backend, is_on=False)
    trace.begin(Phase.FORWARD, 0)
    trace.begin_backward()
    trace.gradient_done(0)
    trace.end_backward()
    assert backend.now_s == 0
    assert read(trace) == []


def labels(spans: Sequence[ComputeSpan]) -> list[tuple[str, int]]:
    return [(span.phase, span.layer) for span in spans]


def test_a_worker_traces_each_layer_of_each_micro_batch_and_what_it_adds() -> None:
    model = square_llama()
    units = full_units(find_layers(model))
    run = Loopback(model, units, learning_rates=[1e-3] * 2)
    first, second = (run.step(step, [batch(step), batch(step + 2)]) for step in range(2))
    indices = [unit.index for unit in units]
    forward = [("forward", index) for index in indices]
    backward = [("backward", index) for index in reversed(indices)]
    applied = [label for index in indices for label in (("apply", index), ("forward", index))]
    assert labels(first.compute) == [*forward, *backward, *forward, *backward]
    assert labels(second.compute) == [*applied, *backward, *forward, *backward]


def test_a_workers_spans_follow_each_other_within_the_step_and_fill_most_of_it() -> None:
    model = square_llama()
    run = Loopback(model, full_units(find_layers(model)), learning_rates=[1e-3])
    report = run.step(0, [batch(0)])
    moments = [report.start_s]
    for span in report.compute:
        moments += [span.start_s, span.end_s]
    moments.append(report.end_s)
    tolerance_s = 1e-3  # between the last stamp and the step's end
    assert all(later >= earlier - tolerance_s for earlier, later in pairwise(moments))
    assert all(span.end_s > span.start_s for span in report.compute)


def test_tracing_ends_after_the_middle_of_a_long_run() -> None:
    model = square_llama()
    run = Loopback(model, full_units(find_layers(model)), learning_rates=[1e-3] * 30)
    traced = [bool(run.step(step, [batch(step)]).compute) for step in range(30)]
    assert [step for step, is_on in enumerate(traced) if is_on] == [0, 1, 2, 3, 4, 12, 13, 14, 15, 16]
