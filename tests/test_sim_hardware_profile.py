from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lsp_ray.errors import ConfigError
from lsp_ray.sim.hardware_profile import figure_names, hardware_names, load_hardware, parse_hardware

COMPLETE: dict[str, dict[str, object]] = {name: {"value": 1, "source": "a test"} for name in figure_names()}


CARDS_GB = {
    4: ["a1000-laptop"],
    8: ["rtx4060"],
    12: ["rtx3060", "rtx4070"],
    16: ["rtx4080", "t4"],
    24: ["a10", "l4", "rtx3090", "rtx4090", "rtx4090-threadripper"],
    32: ["rtx5090"],
    80: ["a100", "h100", "h100-pcie"],
}


def test_the_machines_of_the_paper_and_a_dozen_cards_have_profiles_with_the_memory_on_their_box() -> None:
    found = {name: load_hardware(name).device_memory_bytes for name in hardware_names()}
    assert found == {name: size_gb * 1e9 for size_gb, names in CARDS_GB.items() for name in names}


@pytest.mark.parametrize("name", hardware_names())
def test_every_profile_is_complete_and_in_plausible_units(name: str) -> None:
    hardware = load_hardware(name)
    assert hardware.name == name
    assert 1e9 < hardware.d2h_bytes_per_s < hardware.device_bytes_per_s
    assert hardware.core_bytes_per_s < hardware.host_bytes_per_s < hardware.device_bytes_per_s
    assert hardware.block_flops < hardware.device_float32_flops <= hardware.device_bf16_flops
    assert hardware.bf16_pays == (name != "t4")
    assert hardware.device_memory_bytes < hardware.host_memory_bytes


def test_the_workstations_memory_explains_the_papers_update_of_a_llama_7b_layer() -> None:
    parameters = 4 * 4096**2 + 3 * 4096 * 11008
    assert 28 * parameters / load_hardware("rtx4090-threadripper").host_bytes_per_s == pytest.approx(0.060, rel=1e-2)


def test_an_unknown_machine_is_answered_with_those_that_are_known() -> None:
    with pytest.raises(ConfigError, match=r"^hardware must be one of a10, .*, got 'gtx970'$"):
        load_hardware("gtx970")


def test_a_card_may_be_written_as_on_its_box() -> None:
    assert load_hardware("RTX 4090") == load_hardware("rtx4090")


def test_a_machine_can_be_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("\n".join(f'{name} = {{ value = 1, source = "a test" }}' for name in figure_names()))
    assert load_hardware(str(file)) == parse_hardware(str(file), COMPLETE)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"\xff\xfe", "hardware must be a readable TOML file, got "),
        (b"hop_s =", "hardware must be a readable TOML file, got "),
        (b"hop_s = 1", "hardware.device_memory_bytes must have a number as value and a source in .*, got None"),
        (b"", "hardware.device_memory_bytes must have a number as value and a source in .*, got None"),
    ],
)
def test_a_file_that_is_no_profile_is_refused(tmp_path: Path, content: bytes, line: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"^{line}"):
        load_hardware(str(file))


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
