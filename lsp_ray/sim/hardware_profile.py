"""HardwareProfile: a machine as figures, each with its source. Named ones are TOML files in `profiles/`."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.resources import files

from lsp_ray.errors import ConfigError

FIELD = "hardware"
_BELOW_ONE = ("pageable_fraction", "shared_link_rate")


@dataclass(frozen=True, slots=True, kw_only=True)
class HardwareProfile:
    """Rates that are reached, not those that are advertised; bytes and seconds.

    Attributes:
        name: The file's name, or `measured`.
        device_memory_bytes: Memory of the device that computes.
        device_bf16_flops: Operations a second of large bfloat16 (or float16) matrix products on the device.
        device_float32_flops: The same in float32.
        block_flops: Operations a second of products with a projector's blocks, what they read and write not counted.
        device_bytes_per_s: The device's own memory, reads and writes together.
        activation_bytes_per_s: What blocks write and read of activations, with what small operators take beside it.
        d2h_bytes_per_s: Copies from the device into page-locked memory.
        h2d_bytes_per_s: Copies from page-locked memory to the device.
        pageable_fraction: Rate of copies from and to memory that is not page-locked, relative to page-locked.
        shared_link_rate: Rate of a copy while the other direction is busy too, relative to the one it has alone.
        host_memory_bytes: Memory of the host.
        host_bytes_per_s: The host's memory with all cores, reads and writes together.
        core_bytes_per_s: The same with one core.
        num_cores: Cores of the host.
        hop_s: From an actor's end of work until the driver knows of it.
        on_gpu: Whether the device is a GPU, and not the cores of the host themselves.
    """

    name: str
    device_memory_bytes: float
    device_bf16_flops: float
    device_float32_flops: float
    block_flops: float
    device_bytes_per_s: float
    activation_bytes_per_s: float
    d2h_bytes_per_s: float
    h2d_bytes_per_s: float
    pageable_fraction: float
    shared_link_rate: float
    host_memory_bytes: float
    host_bytes_per_s: float
    core_bytes_per_s: float
    num_cores: int
    hop_s: float
    on_gpu: bool

    def __post_init__(self) -> None:
        for name in figure_names():
            value = getattr(self, name)
            low_is_fine = name == "hop_s" and value == 0
            if not (math.isfinite(value) and (value > 0 or low_is_fine)):
                raise ConfigError(f"{FIELD}.{name}", "be a finite number above 0", value)
            if name in _BELOW_ONE and value > 1:
                raise ConfigError(f"{FIELD}.{name}", "be at most 1", value)


def figure_names() -> list[str]:
    """What a profile must say."""
    return [field.name for field in fields(HardwareProfile) if field.name not in ("name", "on_gpu")]


def hardware_names() -> list[str]:
    """The machines that have a profile."""
    folder = files("lsp_ray.sim") / "profiles"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_hardware(name: str) -> HardwareProfile:
    """Return the machine of this name.

    Raises:
        ConfigError: There is no such profile.
    """
    if name not in hardware_names():
        raise ConfigError(FIELD, f"be one of {', '.join(hardware_names())}", name)
    text = (files("lsp_ray.sim") / "profiles" / f"{name}.toml").read_text(encoding="utf-8")
    return parse_hardware(name, tomllib.loads(text))


def parse_hardware(name: str, content: Mapping[str, Mapping[str, object]]) -> HardwareProfile:
    """Return the machine that a profile describes: a table `value`, `source` for every figure.

    Raises:
        ConfigError: A figure is absent, unknown, without a source, or out of range.
    """
    unknown = sorted(set(content) - set(figure_names()))
    if unknown:
        raise ConfigError(f"{FIELD}.{unknown[0]}", f"be one of {', '.join(figure_names())}", unknown[0])
    values: dict[str, float] = {}
    for figure in figure_names():
        entry = content.get(figure, {})
        value = entry.get("value")
        if not isinstance(value, int | float) or not entry.get("source"):
            raise ConfigError(f"{FIELD}.{figure}", f"have a number as value and a source in {name}", dict(entry))
        values[figure] = value
    num_cores = int(values.pop("num_cores"))
    return HardwareProfile(name=name, on_gpu=True, num_cores=num_cores, **values)
