#!/usr/bin/env python3
"""Times a step of lsp_ray's methods and of their peers on a card that is there for minutes: no network needed.

    python scripts/gpu_bench.py --minutes 6 [--json PATH] [--models 1b,7b,3b] [--only lsp,native,hf] [--ray]
    python scripts/gpu_bench.py --profile [--models 1b] [--only lsp,native,hf]

A line is printed, and the JSON written, after every measurement, so that a run that is cut off keeps its figures. What
would not end in time, does not fit or is not installed is left out, and said so. Models are Llamas of random weights,
made on the card. Our shards are threads; with --ray lsp runs on Ray's actors besides, where nobody traces. `host` is
the time in which the launching threads did not wait, while CUDA's calls were traced; `forecast` is the planner's, from
rates measured on this machine. --profile prints where the host's time goes instead.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a bare machine has nothing of ours installed

from lsp_ray.errors import ConfigError, LspRayError
from scripts.gpu_bench_parts.settings import NAMES, OURS, SIZES, Setting, Size, settings_of

if TYPE_CHECKING:  # --help is answered before torch is imported
    from lsp_ray.sim.forecast import Forecast
    from lsp_ray.sim.hardware_profile import HardwareProfile
    from lsp_ray.sim.workload import Workload
    from scripts.gpu_bench_parts.measured import Figures

PROFILED = ("lsp", "native", "hf")
SECONDS_A_STEP = 0.5  # where no forecast tells
RATES_S = 60.0  # at most, of the machine's rates with a model
UPDATED_BYTES_PER_S = 2e9  # of optimizer state that zero_offload's first steps must make on the host
HEADER = (
    f"{'model':<5} {'method':<14} {'step ms':>8} {'tokens/s':>9} {'peak GB':>8} {'host ms':>8} {'kernels':>8} "
    f"{'launches':>8} {'syncs':>6} {'exposed':>8} {'forecast ms':>11} {'GB':>6}"
)


def main(argv: Sequence[str] | None = None, clock: Callable[[], float] = time.monotonic) -> int:
    """Run the command line; returns the exit code."""
    options = _parser().parse_args(argv)
    try:
        sizes = _chosen(options.models, list(SIZES), "models")
        only = _chosen(options.only, list(NAMES), "only")
        if options.json is not None and not options.json.absolute().parent.is_dir():
            raise ConfigError("json", "be a file in a folder that is there", str(options.json))
        with tempfile.TemporaryDirectory(prefix="lsp_ray-gpu-bench-") as folder:
            bench = _Bench(options, Path(folder), clock)
            if options.profile:
                names = [name for name in only if name in PROFILED] if options.only == ",".join(NAMES) else only
                return bench.profile(settings_of(sizes[:1], names))
            return bench.measure(settings_of(sizes, only, on_ray=options.ray))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python scripts/gpu_bench.py",
        description="Time a step of lsp_ray's methods and of their peers on this GPU.",
        allow_abbrev=False,
    )
    parser.add_argument("--minutes", type=float, default=6.0, help="End by then; default: 6.")
    parser.add_argument("--models", default="1b,7b,3b", help=f"Of {', '.join(SIZES)}; default: 1b,7b,3b.")
    parser.add_argument("--only", default=",".join(NAMES), help=f"Of {', '.join(NAMES)}; default: all.")
    parser.add_argument("--steps", type=int, default=10, help="Timed, after three that warm up; default: 10.")
    parser.add_argument("--json", type=Path, metavar="PATH", help="Written anew after every measurement.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu is for trying the script out.")
    parser.add_argument("--ray", action="store_true", help="Time lsp on Ray's actors as well, beside threads.")
    parser.add_argument("--profile", action="store_true", help="Print where the host's time goes, and time nothing.")
    return parser


def _chosen(given: str, known: Sequence[str], field: str) -> list[str]:
    names = given.split(",")
    for name in names:
        if name not in known:
            raise ConfigError(field, f"be of {', '.join(known)}", name)
    return names


@dataclass(slots=True, kw_only=True)
class _Model:
    """A size on this machine: its folder, and what forecasts are made from."""

    folder: Path
    hardware: HardwareProfile | None


class _Bench:
    """Measures one setting after the other.

    Args:
        options: Of the command line.
        folder: For the models' configurations.
        clock: Seconds, monotonic.
    """

    def __init__(self, options: argparse.Namespace, folder: Path, clock: Callable[[], float]) -> None:
        self._options, self._folder, self._clock = options, folder, clock
        self._end_s = clock() + 60.0 * options.minutes
        self._models: dict[str, _Model] = {}
        self._written: dict[str, Any] = {"machine": "", "measurements": [], "profiles": {}}

    def measure(self, settings: Sequence[Setting]) -> int:
        """Print a line for each; returns 1 if there is not one figure."""
        from scripts.gpu_bench_parts.measured import Failed, apart, measure_setting

        self._tell_machine()
        print(HEADER, flush=True)
        num_measured = 0
        for setting in settings:
            if setting.missing is not None:
                self._left_out(setting, f"{setting.missing} is not installed", None)
                continue
            model = self._model(setting)
            foreseen = _forecast(setting, model)
            why = self._refused(setting, foreseen)
            if why is not None:
                self._left_out(setting, why, foreseen)
                continue
            args = (setting, model.folder, self._options.device, self._options.steps)
            found = apart(measure_setting, *args, timeout_s=self._left_s())
            if isinstance(found, Failed):
                self._left_out(setting, found.why, foreseen)
                print(found.trace, file=sys.stderr, flush=True)
            else:
                num_measured += 1
                self._measured(setting, found, foreseen)
        return 0 if num_measured else 1

    def profile(self, settings: Sequence[Setting]) -> int:
        """Print the profile of each, of lsp's in one subspace; returns 1 if one failed."""
        from scripts.gpu_bench_parts.measured import Failed, apart, profile_setting

        self._tell_machine()
        failed = False
        for setting in settings:
            if setting.dim not in (None, SIZES[setting.size].dims[0]):
                continue
            folder = self._new_folder(setting.size)
            found = apart(profile_setting, setting, folder, self._options.device, timeout_s=self._left_s())
            failed |= isinstance(found, Failed)
            lines = [found.why, found.trace] if isinstance(found, Failed) else found
            print(f"== {setting.size} {setting.title}", *lines, sep="\n", flush=True)
            self._written["profiles"][f"{setting.size} {setting.title}"] = lines
            self._write()
        return 1 if failed else 0

    def _tell_machine(self) -> None:
        from scripts.gpu_bench_parts.measured import machine_in_words

        self._written["machine"] = machine_in_words(self._options.device)
        print(self._written["machine"], flush=True)

    def _model(self, setting: Setting) -> _Model:
        """The size's folder, and the machine's rates with it."""
        from scripts.gpu_bench_parts.measured import Failed, apart, measured_rates

        if setting.size not in self._models:
            folder = self._new_folder(setting.size)
            hardware = None
            if self._options.device == "cuda":  # a CPU's would take a minute, and nobody asks
                work, timeout_s = _workload(setting), min(RATES_S, self._left_s())
                found = apart(measured_rates, folder, work, timeout_s=timeout_s)
                if isinstance(found, Failed):
                    print(f"{setting.size}: no forecasts, as the machine's rates: {found.why}", flush=True)
                else:
                    hardware = found
            self._models[setting.size] = _Model(folder=folder, hardware=hardware)
        return self._models[setting.size]

    def _new_folder(self, size: str) -> Path:
        from scripts.gpu_bench_parts.random_model import write_folder

        folder = self._folder / size
        return folder if folder.is_dir() else write_folder(folder, SIZES[size])

    def _refused(self, setting: Setting, foreseen: Forecast | None) -> str | None:
        """Why it is not worth trying."""
        if foreseen is not None and foreseen.misfits:
            return str(foreseen.misfits[0])
        needed_s = _needed_s(setting, foreseen, self._options.steps)
        left_s = self._left_s()
        return f"needs about {needed_s:.0f} s, {left_s:.0f} are left" if needed_s > left_s else None

    def _left_s(self) -> float:
        left_s: float = self._end_s - self._clock()
        return max(0.0, left_s)

    def _measured(self, setting: Setting, found: Figures, foreseen: Forecast | None) -> None:
        tokens_per_s = SIZES[setting.size].tokens / found.step_s
        print(_line(setting, found, tokens_per_s, foreseen), flush=True)
        entry = {**asdict(found), "tokens_per_s": tokens_per_s, **_foreseen(foreseen)}
        self._written["measurements"].append({**asdict(setting), **entry})
        self._write()

    def _left_out(self, setting: Setting, why: str, foreseen: Forecast | None) -> None:
        print(f"{setting.size:<5} {setting.title:<14} left out: {why}", flush=True)
        self._written["measurements"].append({**asdict(setting), "left_out": why, **_foreseen(foreseen)})
        self._write()

    def _write(self) -> None:
        path: Path | None = self._options.json
        if path is not None:
            aside = path.with_name(f"{path.name}.new")
            aside.write_text(json.dumps(self._written, indent=2) + "\n", encoding="utf-8")
            aside.replace(path)


def _line(setting: Setting, found: Figures, tokens_per_s: float, foreseen: Forecast | None) -> str:
    def shown(value: float | None, factor: float, digits: int) -> str:
        return "–" if value is None else f"{factor * value:.{digits}f}"

    exposed = "–" if found.exposed is None else f"{found.exposed:.1%}"
    forecast_ms = shown(None if foreseen is None else foreseen.step_s, 1e3, 1)
    forecast_gb = shown(None if foreseen is None else foreseen.device.peak_bytes, 1e-9, 2)
    return (
        f"{setting.size:<5} {setting.title:<14} {1e3 * found.step_s:8.1f} {tokens_per_s:9.0f} "
        f"{found.peak_bytes / 1e9:8.2f} {shown(found.host_s, 1e3, 1):>8} {shown(found.kernel_s, 1e3, 1):>8} "
        f"{shown(found.launches, 1, 0):>8} {shown(found.syncs, 1, 0):>6} {exposed:>8} {forecast_ms:>11} "
        f"{forecast_gb:>6} {found.note}".rstrip()
    )


def _foreseen(forecast: Forecast | None) -> dict[str, float]:
    if forecast is None:
        return {}
    return {"forecast_step_s": forecast.step_s, "forecast_peak_bytes": forecast.device.peak_bytes}


def _needed_s(setting: Setting, foreseen: Forecast | None, num_steps: int) -> float:
    """About what a measurement takes."""
    from scripts.gpu_bench_parts.measured import TRACED, WARM_UP

    size = SIZES[setting.size]
    step_s = SECONDS_A_STEP if foreseen is None else foreseen.step_s
    state_s = foreseen.host.total_bytes / UPDATED_BYTES_PER_S if foreseen is not None else 0.0
    return size.setup_s + (WARM_UP + num_steps + TRACED) * step_s + state_s


def _workload(setting: Setting) -> Workload:
    from lsp_ray.config import RuntimeConfig
    from lsp_ray.runtime.prepare.layout import divide_cores
    from lsp_ray.sim.workload import Workload

    size: Size = SIZES[setting.size]
    num_units = int(size.shape["num_hidden_layers"])
    cores = len(os.sched_getaffinity(0))
    shares = divide_cores(RuntimeConfig(), num_units=num_units, cores=cores, on_gpu=True)
    return Workload(
        method=OURS.get(setting.name, "lsp"),
        batch_size=size.batch_size,
        seq_length=size.seq_length,
        gradient_checkpointing=size.gradient_checkpointing,
        subspace_dim=setting.dim or size.dims[0],
        num_shards=shares.num_shards,
        shard_threads=shares.shard_threads,
    )


def _forecast(setting: Setting, model: _Model) -> Forecast | None:
    """The planner's, for methods of this project."""
    from lsp_ray.plan.skeleton import shape_of
    from lsp_ray.sim.forecast import forecast

    if model.hardware is None or setting.name not in OURS:
        return None
    work = _workload(setting)
    policy: Any = {"lsp": "layerwise", "zero_offload": "sequential"}.get(setting.name)
    try:
        return forecast(shape_of(model.folder), work, model.hardware, policy)
    except LspRayError as error:
        print(f"{setting.size} {setting.title}: no forecast: {error}", flush=True)
        return None


if __name__ == "__main__":
    sys.exit(main())
