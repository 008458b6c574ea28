"""The command line: options in, tables or JSON out."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, set_parsing_settings

from lsp_ray.errors import ConfigError, LspRayError
from lsp_ray.passive_waiting import wait_passively
from lsp_ray.plan.options import PlanConfig

if TYPE_CHECKING:  # --help and a wrong option are answered before torch is imported
    from lsp_ray.plan.typical_batch import TypicalBatch
    from lsp_ray.sim.hardware_profile import HardwareProfile
    from lsp_ray.sim.model_shape import ModelShape

_SWITCHES = ("--measure", "--bf16", "--gradient_checkpointing", "--json", "--runtime.pinned")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 2 for what a person can mend."""
    wait_passively()
    try:
        _plan(_parse(sys.argv[1:] if argv is None else argv))
    except LspRayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _parse(argv: Sequence[str]) -> PlanConfig:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)  # the text under each field is its help
    parser = ArgumentParser(
        prog="python -m lsp_ray.plan",
        description="Forecast memory and time of every method and policy on a machine; nothing is trained.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_class_arguments(PlanConfig)
    try:
        values = dict(parser.instantiate(parser.parse_args(_with_switch_values(argv))))
    except argparse.ArgumentError as error:
        raise ConfigError("options", "be those that --help lists", " ".join(str(error).split())) from error
    return PlanConfig(**values)


def _with_switch_values(argv: Sequence[str]) -> list[str]:
    """Let `--measure` alone mean `--measure true`."""
    completed: list[str] = []
    for argument, following in zip(argv, [*argv[1:], "--"], strict=True):
        completed.append(argument)
        if argument in _SWITCHES and following.startswith("--"):
            completed.append("true")
    return completed


def _plan(config: PlanConfig) -> None:
    from lsp_ray.models.resolve import resolve_config
    from lsp_ray.plan.plan import make_plan, workload_of
    from lsp_ray.plan.skeleton import shape_of
    from lsp_ray.sim.hardware_profile import load_hardware

    named = None if config.hardware is None else load_hardware(config.hardware)
    folder = resolve_config(config.model_name_or_path, log=_note)
    model = shape_of(folder)
    batch = _typical(config, folder)
    hardware = named or _measured(config, folder, model, batch)
    num_units = len(model.layers)
    work = workload_of(config, num_units=num_units, cores=hardware.num_cores, on_gpu=hardware.on_gpu, batch=batch)
    plan = make_plan(model, work, hardware, auto_dim=config.lsp.subspace_dim == "auto")
    if config.json:
        print(json.dumps(plan.as_json(), indent=2))
        return
    from rich.console import Console

    from lsp_ray.plan.table import print_plan

    width = None if sys.stdout.isatty() else 160  # a file need not fit a terminal
    print_plan(plan, Console(width=width))


def _measured(config: PlanConfig, folder: Path, model: ModelShape, batch: TypicalBatch | None) -> HardwareProfile:
    """This machine; without a GPU the device is given the cores that the shards leave, as in a run."""
    import torch

    from lsp_ray.plan.measure import measure
    from lsp_ray.plan.plan import workload_of

    cores, device = len(os.sched_getaffinity(0)), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    work = workload_of(config, num_units=len(model.layers), cores=cores, on_gpu=device.type == "cuda", batch=batch)
    device_threads = max(1, cores - work.num_shards * work.shard_threads)
    return measure(folder, model, work, device=device, device_threads=device_threads)


def _typical(config: PlanConfig, folder: Path) -> TypicalBatch | None:
    """Of the data set, if there is one."""
    if config.dataset is None:
        return None
    from lsp_ray.plan.typical_batch import typical_batch

    return typical_batch(
        config.dataset,
        folder,
        batch_size=config.per_device_train_batch_size,
        max_seq_length=config.max_seq_length,
    )


def _note(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
