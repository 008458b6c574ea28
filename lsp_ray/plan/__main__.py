"""The command line: options in, tables or JSON out."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from lsp_ray.arguments import parse_options
from lsp_ray.errors import LspRayError
from lsp_ray.plan.command import command_of
from lsp_ray.plan.options import PlanConfig
from lsp_ray.process import prepare_process, uncollected

if TYPE_CHECKING:  # --help and a wrong option are answered before torch is imported
    from lsp_ray.plan.plan import Plan
    from lsp_ray.plan.typical_batch import TypicalBatch
    from lsp_ray.sim.hardware_profile import HardwareProfile
    from lsp_ray.sim.model_shape import ModelShape
    from lsp_ray.sim.workload import Workload


def main(argv: Sequence[str] | None = None, *, prog: str = "python -m lsp_ray.plan") -> int:
    """Run the command line; returns the exit code: 0, 1 where nothing fits, or 2 for what a person can mend."""
    prepare_process()
    try:
        return _plan(_parse(sys.argv[1:] if argv is None else argv, prog))
    except LspRayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parse(argv: Sequence[str], prog: str = "python -m lsp_ray.plan") -> PlanConfig:
    return parse_options(
        PlanConfig,
        argv,
        prog=prog,
        description="Say which methods fit a machine, how fast they are and which to take; nothing is trained.",
    )


def _plan(config: PlanConfig) -> int:
    named = config.machine
    with uncollected(is_own=True):
        from lsp_ray.models.resolve import resolve_config
        from lsp_ray.plan.plan import choices_of, make_plan, workload_of
        from lsp_ray.plan.skeleton import check_length, estimate_note, positions_of, quantized_bits, shape_of

    folder = resolve_config(config.model_name_or_path, log=_note)
    check_length(folder, config.max_seq_length)
    model, typical, found_bits = shape_of(folder), _typical(config, folder), quantized_bits(folder)
    if found_bits is not None:
        config.check_on_quantized()
    estimate = estimate_note(folder)
    if estimate is not None:
        _note(estimate)
    machine = named or config.altered(_measured(config, folder, model, typical))
    work = workload_of(
        config,
        num_units=len(model.layers),
        cores=machine.num_cores,
        on_gpu=machine.on_gpu,
        bf16=machine.bf16_pays if config.bf16 is None else config.bf16,
        found_bits=found_bits,
    )
    choices, free = (choices_of(config, found_bits=found_bits, keep=keep) for keep in (True, False))
    plan = make_plan(model, work, machine, choices, typical, found_bits, positions_of(folder))
    _show(plan, config)
    if plan.reason is None:
        return 0
    freed = None if choices == free else make_plan(model, work, machine, free, typical, found_bits).advice.recommended
    _note(plan.reason)
    if freed is not None:
        _note(f"with other options this fits: {command_of(config, freed, found_bits)}")
    return 1


def _show(plan: Plan, config: PlanConfig) -> None:
    if config.json:
        best = plan.advice.recommended
        command = None if best is None else command_of(config, best, plan.found_bits)
        print(json.dumps({**plan.as_json(), "command": command}, indent=2))
        return
    from rich.console import Console

    from lsp_ray.plan.table import print_plan

    width = None if sys.stdout.isatty() else 80  # a file's reader may have no more
    print_plan(plan, config, Console(width=width))


def _measured(
    config: PlanConfig, folder: Path, model: ModelShape, typical: Callable[[Workload], Workload]
) -> HardwareProfile:
    """This machine; without a GPU the device is given the cores that the shards leave, as in a run."""
    import torch

    from lsp_ray.config import RunConfig
    from lsp_ray.plan.measure import measure
    from lsp_ray.plan.plan import workload_of
    from lsp_ray.runtime.prepare.device_choice import choose_bf16

    cores, device = len(os.sched_getaffinity(0)), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config.check_gpus(on_gpu=device.type == "cuda")
    bf16 = choose_bf16(RunConfig(bf16=config.bf16), "cuda" if device.type == "cuda" else "cpu", _note)
    work = workload_of(config, num_units=len(model.layers), cores=cores, on_gpu=device.type == "cuda", bf16=bf16)
    device_threads = max(1, cores - work.num_shards * work.shard_threads)
    return measure(folder, model, typical(work), device=device, device_threads=device_threads)


def _typical(config: PlanConfig, folder: Path) -> Callable[[Workload], Workload]:
    """Gives a workload the typical micro-batch of the data set, if there is one."""
    if config.dataset is None:
        return lambda work: work
    from lsp_ray.plan.plan import with_batch
    from lsp_ray.plan.typical_batch import typical_batch

    dataset = config.dataset

    @cache
    def batch(batch_size: int, seq_length: int) -> TypicalBatch:
        return typical_batch(dataset, folder, batch_size=batch_size, max_seq_length=seq_length)

    return lambda work: with_batch(work, batch(work.batch_size, work.seq_length))


def _note(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
