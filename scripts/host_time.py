#!/usr/bin/env python3
"""Times, on a CPU, what a step takes the thread that launches it: lsp beside transformers' and torch's own.

    python scripts/host_time.py [--graphs] [--bf16] [--rounds 9]

A Llama of 22 layers so narrow that operators cost hardly more than their call. CPU seconds of the one thread, so that
nothing else on the machine is in them; lsp as on a GPU, its own kernels as calls that do nothing. With --graphs a graph
is one call that does nothing. Rounds of both alternate in one run; steps of a round are added up.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from lsp_ray.models.layers import find_layers
from scripts.gpu_bench_parts.ours import run_ours
from scripts.gpu_bench_parts.phases import Phase, Unwatched
from scripts.gpu_bench_parts.random_model import random_examples, random_model, write_folder
from scripts.gpu_bench_parts.settings import SIZES, Setting, Size
from scripts.launches import CPU, LaunchCount, as_on_a_gpu

NUM_LAYERS, STEPS = 22, 3  # steps of a round
WARM_UP = 6  # graphs are recorded after the second


class Round:
    """Times a round of ours, then one of theirs, on the thread that launches."""

    def __init__(self, theirs: Callable[[], None]) -> None:
        self._theirs, self._start_s = theirs, 0.0
        self.ours_s, self.theirs_s = 0.0, 0.0

    def start(self) -> None:
        """See `Watch`."""
        self._start_s = time.thread_time()

    def stop(self) -> None:
        """See `Watch`."""
        end_s = time.thread_time()
        for _ in range(STEPS):
            self._theirs()
        self.ours_s, self.theirs_s = (end_s - self._start_s) / STEPS, (time.thread_time() - end_s) / STEPS


def rounds(num: int, *, graphs: bool, bf16: bool) -> list[Round]:
    """Time so many rounds."""
    tiny = SIZES["tiny"]
    size = replace(tiny, shape={**tiny.shape, "num_hidden_layers": NUM_LAYERS}, gradient_checkpointing=False)
    with tempfile.TemporaryDirectory() as folder:
        made = write_folder(Path(folder) / "model", size)
        step = plain_step(made, size, torch.bfloat16 if bf16 else torch.float32)
        timed = [Round(step) for _ in range(num)]
        phases = [Phase(num_steps=WARM_UP, watch=Unwatched())]
        phases += [Phase(num_steps=STEPS, watch=each) for each in timed]
        with as_on_a_gpu(LaunchCount(), recorded if graphs else None, short_norm):
            run_ours(Setting(size="tiny", name="lsp", dim=64), size, made, CPU, phases, bf16=bf16)
    return timed


def short_norm(input_TN: torch.Tensor, _shape: Sequence[int], weight_N: torch.Tensor, _eps: float) -> torch.Tensor:
    """About as many operators, forward and backward, as the fused norm that a CPU does not have."""
    return input_TN * weight_N


def recorded(run: Callable[[], None]) -> Callable[[], None]:
    """What was recorded has run: its results stay where a graph would leave them."""
    run()
    return lambda: None


def plain_step(folder: Path, size: Size, dtype: torch.dtype) -> Callable[[], None]:
    """Transformers' forward, its backward and torch's fused AdamW."""
    model = random_model(folder, dtype, CPU)
    find_layers(model)  # freezes the embeddings, as ours does
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], fused=True)
    examples = random_examples(size)[: size.batch_size]
    batch = {name: torch.stack([example[name] for example in examples]) for name in examples[0]}

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    description = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python scripts/host_time.py", description=description, allow_abbrev=False)
    parser.add_argument("--graphs", action="store_true", help="Launch blocks as graphs, each a call that does nothing.")
    parser.add_argument("--bf16", action="store_true", help="In bfloat16, whose operators cost a CPU more than calls.")
    parser.add_argument("--rounds", type=int, default=9, help="Of both, in turn (default: 9).")
    options = parser.parse_args(argv)
    timed = rounds(options.rounds, graphs=options.graphs, bf16=options.bf16)
    ratios = [each.ours_s / each.theirs_s for each in timed]
    for name, figures in (
        ("lsp ms", [1e3 * each.ours_s for each in timed]),
        ("hf ms", [1e3 * each.theirs_s for each in timed]),
        ("lsp / hf", ratios),
    ):
        print(f"{name:<9} {statistics.median(figures):7.2f}  ({min(figures):.2f} to {max(figures):.2f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
