from __future__ import annotations

from dataclasses import replace

import pytest

from lsp_ray.errors import ConfigError
from lsp_ray.sim.hardware_profile import figure_names, hardware_names, load_hardware, parse_hardware

COMPLETE: dict[str, dict[str, object]] = {name: {"value": 1, "source": "a test"} for name in figure_names()}


def test_the_machines_of_the_paper_and_two_others_have_profiles() -> None:
    assert hardware_names() == ["a1000-laptop", "h100-pcie", "rtx3060", "rtx4090-threadripper"]


@pytest.mark.parametrize("name", hardware_names())
def test_every_profile_is_complete_and_in_plausible_units(name: str) -> None:
    hardware = load_hardware(name)
    assert hardware.name == name
    assert 1e9 < hardware.d2h_bytes_per_s < hardware.device_bytes_per_s
    assert hardware.core_bytes_per_s < hardware.host_bytes_per_s < hardware.device_bytes_per_s
    assert hardware.block_flops < hardware.device_float32_flops < hardware.device_bf16_flops
    assert hardware.device_memory_bytes < hardware.host_memory_bytes


def test_the_workstations_memory_explains_the_papers_update_of_a_llama_7b_layer() -> None:
    parameters = 4 * 4096**2 + 3 * 4096 * 11008
    assert 28 * parameters / load_hardware("rtx4090-threadripper").host_bytes_per_s == pytest.approx(0.060, rel=1e-2)


def test_an_unknown_machine_is_answered_with_those_that_are_known() -> None:
    with pytest.raises(ConfigError, match=r"^hardware must be one of a1000-laptop, .*, got 'gtx970'$"):
        load_hardware("gtx970")


def test_a_figure_without_source_is_refused() -> None:
    assert parse_hardware("mine", COMPLETE).num_cores == 1
    without: dict[str, dict[str, object]] = {**COMPLETE, "hop_s": {"value": 1}}
    with pytest.raises(ConfigError, match=r"^hardware.hop_s must have a number as value and a source in mine, got "):
        parse_hardware("mine", without)


def test_an_unknown_figure_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^hardware.horse_power must be one of device_memory_bytes, "):
        parse_hardware("mine", {**COMPLETE, "horse_power": {"value": 1, "source": "a test"}})


def test_figures_out_of_range_are_named() -> None:
    hardware = parse_hardware("mine", COMPLETE)
    with pytest.raises(ConfigError, match=r"^hardware.d2h_bytes_per_s must be a finite number above 0, got 0$"):
        replace(hardware, d2h_bytes_per_s=0)
    with pytest.raises(ConfigError, match=r"^hardware.pageable_fraction must be at most 1, got 2$"):
        replace(hardware, pageable_fraction=2)
