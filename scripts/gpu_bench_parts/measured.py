"""One measurement, in a process of its own that ends with it: an error or a hang there takes nothing else along.

The process is forked from a server that has imported torch and transformers and never touched a GPU.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

from lsp_ray.errors import ConfigError
from lsp_ray.sim.hardware_profile import HardwareProfile
from lsp_ray.sim.workload import Workload
from scripts.gpu_bench_parts.settings import OURS, SIZES, Setting

WARM_UP, TRACED = 3, 2  # steps: memory is watched in the second, and the allocator has settled after the third
PROFILED = 3
MEASURE_BUDGET_S = 0.1  # of each rate of the machine
ROOT = Path(__file__).resolve().parents[2]
PRELOADED = ["scripts.gpu_bench_parts.ours", "scripts.gpu_bench_parts.peers", "transformers.trainer", "peft"]
START_S = 120.0  # at most, of the first process, which imports everything
_start = {"method": "forkserver"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What a measurement found, of a step.

    Attributes:
        step_s: Median.
        peak_bytes: Of the device.
        host_s: Until the host had launched everything, without its waits, while CUDA's calls were traced.
        kernel_s: Sum of the kernels' times.
        launches: Kernels and graphs launched.
        syncs: Calls that made the host wait for the device.
        exposed: Share of the time in which the device waited for deltas; None where nothing is sent.
        last_loss: Of the last step.
        note: What a reader should know.
    """

    step_s: float
    peak_bytes: int
    host_s: float | None
    kernel_s: float | None
    launches: float | None
    syncs: float | None
    exposed: float | None
    last_loss: float
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """Why there are no figures, on one line, and where it happened."""

    why: str
    trace: str = ""


def apart(action: Callable[..., Any], *args: Any, timeout_s: float) -> Any:
    """Return what the action returns in a process of its own, or `Failed`."""
    context: Any = multiprocessing.get_context(_start["method"])
    context.set_forkserver_preload(PRELOADED)
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([str(ROOT), *sys.path]))  # the server looks nowhere else
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # else who asks for a GPU before a fork spoils it for the forked
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(there, action, args), daemon=True)
    process.start()
    there.close()
    try:
        return here.recv() if here.poll(timeout_s) else Failed(why=f"cut off after {timeout_s:.0f} s")
    except EOFError:
        process.join()
        return Failed(why=f"its process ended with {process.exitcode}")
    finally:
        process.kill()
        process.join()


def _run(there: Connection, action: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        result = action(*args)
    except BaseException as error:  # noqa: BLE001  # whatever it is, the others go on
        lines = str(error).strip().splitlines() or [""]
        result = Failed(why=f"{type(error).__name__}: {lines[0]}"[:200], trace=traceback.format_exc())
    there.send(result)
    there.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads that still wait for something must not keep it


def measure_setting(setting: Setting, folder: Path, device_name: str, num_steps: int) -> Figures:
    """Warm up, time, and trace some steps."""
    from scripts.gpu_bench_parts.activity import Tracer
    from scripts.gpu_bench_parts.phases import Phase

    tracer = Tracer(TRACED)
    phases = [Phase(num_steps=WARM_UP), Phase(num_steps=num_steps), Phase(num_steps=TRACED, watch=tracer)]
    ran = _ran(setting, folder, device_name, phases)
    timed_s = ran.step_s[1]
    waited_s = ran.exposed_s or [[0.0]] * len(phases)
    seen = tracer.activity
    traced_s, traced_exposed_s = sum(ran.step_s[2]) / TRACED, sum(waited_s[2]) / TRACED
    return Figures(
        step_s=median(timed_s),
        peak_bytes=ran.peak_bytes,
        host_s=None if seen is None else max(0.0, traced_s - traced_exposed_s - seen.waits_s),
        kernel_s=None if seen is None else seen.kernel_s,
        launches=None if seen is None else seen.launches,
        syncs=None if seen is None else seen.syncs,
        exposed=None if ran.exposed_s is None else sum(waited_s[1]) / sum(timed_s),
        last_loss=ran.last_loss,
        note=ran.note,
    )


def profile_setting(setting: Setting, folder: Path, device_name: str) -> list[str]:
    """Profile some steady steps: operators, then Python's functions; returns lines to print."""
    from scripts.gpu_bench_parts.host_profile import FunctionProfile, OperatorProfile
    from scripts.gpu_bench_parts.phases import Phase

    operators, functions = OperatorProfile(PROFILED), FunctionProfile(PROFILED)
    phases = [
        Phase(num_steps=WARM_UP),
        Phase(num_steps=PROFILED),
        Phase(num_steps=PROFILED, watch=operators),
        Phase(num_steps=PROFILED, watch=functions),
    ]
    ran = _ran(setting, folder, device_name, phases)
    plain = f"a step unwatched: {1e3 * median(ran.step_s[1]):.1f} ms"
    return [plain, *operators.lines, *functions.lines]


def measured_rates(folder: Path, work: Workload) -> HardwareProfile:
    """The planner's rates of this machine and its GPU with the folder's model."""
    import torch

    from lsp_ray.plan.measure import measure
    from lsp_ray.plan.skeleton import shape_of

    device = torch.device("cuda", 0)
    return measure(folder, shape_of(folder), work, device=device, device_threads=2, budget_s=MEASURE_BUDGET_S)


def machine_in_words(device_name: str) -> str:
    """The machine, as a process of its own sees it; where a forked one cannot use the GPU, later ones are none.

    Raises:
        ConfigError: Torch finds no GPU.
    """
    found = apart(_described, device_name, timeout_s=START_S)
    if isinstance(found, Failed) and device_name == "cuda":
        _start["method"] = "spawn"
        found = apart(_described, device_name, timeout_s=START_S)
    if isinstance(found, Failed):
        raise ConfigError(
            "device", "be cpu, to try the script out, where torch finds no GPU", device_name, hint=found.why
        )
    return str(found)


def _described(device_name: str) -> str:
    import torch
    import transformers

    torch.zeros(1, device=device_name)
    name = torch.cuda.get_device_name() if device_name == "cuda" else "CPU"
    return (
        f"{name}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )


def _ran(setting: Setting, folder: Path, device_name: str, phases: Any) -> Any:
    import torch
    from transformers.utils import logging

    from scripts.gpu_bench_parts.ours import run_ours
    from scripts.gpu_bench_parts.peers import run_peer

    logging.set_verbosity_error()
    warnings.simplefilter("ignore")  # of names that transformers is about to change
    device = torch.device(device_name, 0) if device_name == "cuda" else torch.device(device_name)
    run = run_ours if setting.name in OURS else run_peer
    return run(setting, SIZES[setting.size], folder, device, phases)
