from __future__ import annotations

import math
import re
import time
import urllib.request
from dataclasses import fields, replace
from typing import Any

import pytest
import ray

from lsp_ray.runtime.watch.live_metrics import COUNTERS, GAUGES, PREFIX, LiveMetrics
from lsp_ray.trace import StepMetrics

IN_NO_METRIC = {"step", "bias", "bias_by_layer", "computed_s_by_gpu"}  # counted by itself; made from these


def test_every_number_of_metrics_jsonl_has_a_metric() -> None:
    assert {field.name for field in fields(StepMetrics)} - IN_NO_METRIC == set(GAUGES) | set(COUNTERS)


def step(number: int) -> StepMetrics:
    values: dict[str, Any] = dict.fromkeys((*GAUGES, *COUNTERS), number)
    return StepMetrics(step=number, bias=0.5, bias_by_layer={"3": 0.25}, computed_s_by_gpu={"gpu-1@b": 0.75}, **values)


def scraped() -> dict[str, float]:
    """What Prometheus would read from this node, of ours, by name and layer or GPU."""
    port = ray.nodes()[0]["MetricsExportPort"]  # type: ignore[no-untyped-call]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found = {}
    for name, labels, value in re.findall(rf"^ray_{PREFIX}(\w+)\{{(.*)\}} (\S+)$", text, flags=re.MULTILINE):
        label = re.search(r'(?:layer|gpu)="([^"]+)"', labels)
        found[f"{name}.{label[1]}" if label else name] = float(value)
    return found


@pytest.mark.usefixtures("cluster")
def test_prometheus_reads_the_last_step_and_the_sums_and_no_loss_of_a_skipped_step() -> None:
    LiveMetrics().step(step(2))
    skipped = replace(step(3), loss=math.nan, grad_norm=math.inf)
    LiveMetrics().step(skipped)  # another one, as after the loss of an actor
    expected: dict[str, float] = dict.fromkeys(GAUGES, 3.0)
    expected |= {f"{name}_total": 5.0 for name in COUNTERS}
    expected |= {"steps_total": 2.0, "bias_relative": 0.5}
    expected |= {"layer_bias_relative.3": 0.25, "gpu_computed_s.gpu-1@b": 0.75}
    expected |= {"loss": 2.0, "grad_norm": 2.0}
    deadline_s = time.monotonic() + 60
    while (found := scraped()) != expected and time.monotonic() < deadline_s:  # Ray exports every few seconds
        time.sleep(0.5)
    assert found == expected
