"""HardwareProfile: a machine as figures, each with its source. Named ones are TOML files in `profiles/`."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from lsp_ray.errors import ConfigError

FIELD = "hardware"
RESERVE_BYTES = 1e9  # of each memory: CUDA's context, the allocator's gaps, a desktop; the rest of the system
_BELOW_ONE = ("pageable_fraction", "shared_link_rate")
_BF16_PAYS = 0.75  # of float32's time that bfloat16's products take at most where it is worth it, as in a run


@dataclass(frozen=True, slots=True, kw_only=True)
class HardwareProfile:
    """Rates that are reached, not those that are advertised; bytes and seconds.

    A card of "24 GB" is taken to have 24 · 10⁹ bytes, here and wherever something has to fit; what it has beyond that,
    error correction and its driver take.

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

    @property
    def bf16_pays(self) -> bool:
        """Whether bfloat16 is faster than float32, so that a run takes it where nothing is said."""
        return self.device_float32_flops <= _BF16_PAYS * self.device_bf16_flops


def figure_names() -> list[str]:
    """What a profile must say."""
    return [field.name for field in fields(HardwareProfile) if field.name not in ("name", "on_gpu")]


def hardware_names() -> list[str]:
    """The machines that have a profile."""
    folder = files("lsp_ray.sim") / "profiles"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_hardware(name: str) -> HardwareProfile:
    """Return the machine of this name (`RTX 4090` is rtx4090), or the one that a .toml file describes.

    Raises:
        ConfigError: There is no such profile, or it cannot be read.
    """
    if name.endswith(".toml"):
        return _read(name, Path(name))
    known = name.lower().replace(" ", "")
    if known not in hardware_names():
        close = get_close_matches(known, hardware_names(), n=1, cutoff=0.8)
        hint = f"did you mean {close[0]}?" if close else ""
        raise ConfigError(FIELD, f"be one of {', '.join(hardware_names())}, or a .toml file of such", name, hint=hint)
    return _read(known, files("lsp_ray.sim") / "profiles" / f"{known}.toml")


def _read(name: str, file: Traversable) -> HardwareProfile:
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # not UTF-8 and not TOML are ValueErrors
        raise ConfigError(FIELD, "be a readable TOML file", name, hint=" ".join(str(error).split())) from error
    return parse_hardware(name, content)


def parse_hardware(name: str, content: Mapping[str, object]) -> HardwareProfile:
    """Return the machine that a profile describes: a table `value`, `source` for every figure.

    Raises:
        ConfigError: A figure is absent, unknown, without a source, or out of range.
    """
    unknown = sorted(set(content) - set(figure_names()))
    if unknown:
        raise ConfigError(f"{FIELD}.{unknown[0]}", f"be one of {', '.join(figure_names())}", unknown[0])
    values: dict[str, float] = {}
    for figure in figure_names():
        entry = content.get(figure)
        value, source = (entry.get("value"), entry.get("source")) if isinstance(entry, dict) else (None, None)
        if not isinstance(value, int | float) or not source:
            raise ConfigError(f"{FIELD}.{figure}", f"have a number as value and a source in {name}", entry)
        values[figure] = value
    num_cores = int(values.pop("num_cores"))
    return HardwareProfile(name=name, on_gpu=True, num_cores=num_cores, **values)
