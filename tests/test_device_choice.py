"""The type of the weights: as asked, else what the processor is fast at."""

from __future__ import annotations

from itertools import count

import pytest
import torch

from lsp_ray.config import RunConfig, RuntimeConfig
from lsp_ray.errors import ConfigError
from lsp_ray.runtime.prepare.device_choice import (
    BF16_PAYS,
    bf16_over_float32,
    choose_bf16,
    choose_device,
    device_bytes,
)
from lsp_ray.runtime.prepare.machines import Machine


@pytest.mark.parametrize(
    ("asked", "ratio", "expected"),
    [
        (None, 0.15, True),
        (None, BF16_PAYS, True),
        (None, 0.9, False),
        (None, 30.0, False),
        (True, 30.0, True),
        (True, 0.5, True),
    ],
)
def test_a_cpu_computes_in_bfloat16_where_asked_or_clearly_faster(
    asked: bool | None, ratio: float, expected: bool
) -> None:
    assert choose_bf16(RunConfig(bf16=asked), "cpu", lambda _line: None, measure=lambda: ratio) is expected


def test_a_type_that_was_asked_for_and_is_fast_is_no_news_and_float32_is_not_even_measured() -> None:
    notes: list[str] = []
    assert choose_bf16(RunConfig(bf16=True), "cpu", notes.append, measure=lambda: 0.5)
    assert not choose_bf16(RunConfig(bf16=False), "cpu", notes.append, measure=lambda: 1 / 0)
    assert notes == []


def test_a_slow_choice_is_warned_of_and_a_measured_one_is_told_with_its_figure() -> None:
    notes: list[str] = []
    choose_bf16(RunConfig(bf16=True), "cpu", notes.append, measure=lambda: 12.0)
    choose_bf16(RunConfig(), "cpu", notes.append, measure=lambda: 0.5)
    assert notes == [
        "bf16: products take 12 times as long as float32's on this CPU; --bf16 false is faster",
        "bf16: products take 0.50 of float32's time on this CPU, so weights are bfloat16",
    ]


def test_the_ratio_is_the_median_of_pairs_and_threads_are_left_as_they_were() -> None:
    before = torch.get_num_threads()
    warm_up = [100.0, 100.0]
    pairs = [(2.0, 4.0)] * 4 + [(90.0, 1.0)] * 3  # three pairs met something else that the machine did
    spans = iter([*warm_up, *(span_s for pair in pairs for span_s in pair)])
    now_s, calls = 0.0, count()

    def clock() -> float:
        nonlocal now_s
        if next(calls) % 2:
            now_s += next(spans)
        return now_s

    assert bf16_over_float32(clock) == 0.5
    assert torch.get_num_threads() == before


def test_a_real_processor_has_a_ratio() -> None:
    assert 0.001 < bf16_over_float32() < 1000


def test_a_run_starts_on_a_machine_that_has_a_gpu_where_others_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    there = [Machine(name=name, num_gpus=size, cores=4, has_bf16=True) for name, size in (("head", 0), ("other", 1))]
    config = RunConfig(runtime=RuntimeConfig(address="auto"))
    assert choose_device(config, there) == "cuda"
    with pytest.raises(ConfigError, match=r"^runtime.address must be a cluster that .* on a machine with a GPU"):
        device_bytes(config, "cuda")
