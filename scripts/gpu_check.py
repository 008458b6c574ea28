#!/usr/bin/env python3
"""Runs every CUDA path of lsp_ray on this machine's GPU, without Ray and without a network: one table, in minutes.

    python scripts/gpu_check.py [--json PATH] [--model FOLDER]

Streams, fences, page-locked slots and events; sparse products, rounding and AdamW against the CPU's; whole steps of
native, zero_offload and lsp, with peak memory against the plan's forecast. The model that is timed has SmolLM2-135M's
shape and random weights; --model takes another. Exit code 1 if a check fails, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lsp_ray.errors import ConfigError

if TYPE_CHECKING:  # --help is answered before torch is imported
    from scripts.gpu_checks.check import Bench, Check, Outcome


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parser().parse_args(argv)
    try:
        return _check(options.model, options.json)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python scripts/gpu_check.py",
        description="Run every CUDA path of lsp_ray on this GPU, without Ray, and print one table.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="Also write the outcomes there; it must be new.")
    parser.add_argument(
        "--model", help="Model that is timed: a local folder, alias or hub id; default: random weights."
    )
    return parser


def _check(model: str | None, json_path: Path | None) -> int:
    import torch

    if not torch.cuda.is_available():
        raise ConfigError("the machine", "have a GPU that torch finds", f"torch {torch.__version__} without one")
    if json_path is not None and (json_path.exists() or not json_path.absolute().parent.is_dir()):
        raise ConfigError("json", "be a new file in a folder that is there", str(json_path))

    from lsp_ray.device.cuda import CudaBackend
    from scripts.gpu_checks.check import Bench, Sizes

    bench = Bench(backend=CudaBackend(), sizes=Sizes())
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, Python {platform.python_version()}"
    with tempfile.TemporaryDirectory(prefix="lsp_ray-gpu-check-") as folder:
        checks = all_checks(bench, Path(folder), model)
        return report(checks, f"{torch.cuda.get_device_name(bench.device)}, {versions}", json_path)


def all_checks(bench: Bench, folder: Path, model: str | None) -> list[tuple[str, Check]]:
    """Every check by name; models are made in `folder`."""
    from lsp_ray.models.resolve import resolve_model
    from scripts.gpu_checks.kernels import kernel_checks
    from scripts.gpu_checks.runs import LARGE, SMALL, Load, run_checks, write_llama
    from scripts.gpu_checks.streams import stream_checks

    made = write_llama(folder / "small", **SMALL)
    small = Load(folder=made, batch_size=4, seq_length=64, subspace_dim=32, num_steps=8)
    named = write_llama(folder / "large", **LARGE) if model is None else resolve_model(model)
    large = replace(small, folder=named, seq_length=512, subspace_dim=256, num_steps=12)
    return [*stream_checks(bench), *kernel_checks(bench), *run_checks(bench, small, large)]


def report(checks: Sequence[tuple[str, Check]], machine: str, json_path: Path | None) -> int:
    """Run the checks and print the table; returns 1 if one failed, else 0."""
    from scripts.gpu_checks.check import outcomes

    print(machine, flush=True)
    found = outcomes(checks, _show)
    failed = [outcome.check for outcome in found if not outcome.passed]
    print(f"{len(found) - len(failed)} of {len(found)} checks passed{_listed(failed)}")
    if json_path is not None:
        content = {"machine": machine, "outcomes": [asdict(outcome) for outcome in found]}
        json_path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 1 if failed else 0


def _show(outcome: Outcome) -> None:
    print(f"{outcome.check:<40} {'ok' if outcome.passed else 'FAILED':<7} {outcome.figure}", flush=True)


def _listed(failed: Sequence[str]) -> str:
    return f"; failed: {', '.join(failed)}" if failed else ""


if __name__ == "__main__":
    sys.exit(main())
