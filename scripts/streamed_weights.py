"""Weights that come up from main memory against weights on the device: bits, memory, and the simulator's word.

One process with threads in the actors' place; a slowed-down link stands for a real one. The simulator is given what
blocks, updates and copies took in the run that it is compared with, so what differs is the order of things.

    PYTHONPATH=. python scripts/streamed_weights.py
    PYTHONPATH=. python scripts/streamed_weights.py --emulate rtx4090-threadripper

With --emulate it is a llama-7B scaled down, and the link as slow beside the compute as that machine's; both homes of
the weights run in turn, some steps each, with the same link.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import get_args

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from lsp_ray.config import LspConfig, RunConfig, RuntimeConfig, Weights
from lsp_ray.hardware import MACHINES, EmulatedMachine
from lsp_ray.methods.units import full_payload_sizes
from lsp_ray.models.layers import find_layers
from lsp_ray.models.load import load_skeleton
from lsp_ray.output_folder import INTERNALS
from lsp_ray.runtime.actors.thread_workers import ThreadWorkers
from lsp_ray.runtime.actors.throttle import Throttle, emulating
from lsp_ray.runtime.fine_tune import Summary, fine_tune
from lsp_ray.runtime.prepare.job import Job, prepare_job
from lsp_ray.runtime.prepare.model_shape import model_shape
from lsp_ray.schedule.block_ring import FEWEST_BUFFERS
from lsp_ray.schedule.policy import POLICIES
from lsp_ray.sim.costs import LayerCosts, StepCosts
from lsp_ray.sim.simulation import SimulatedStep
from lsp_ray.sim.simulator import Simulator
from lsp_ray.trace import StepMetrics
from lsp_ray.trace_file import Trace, TracedSpan, read_trace
from scripts.live_session import LiveSession
from tests.tiny import VOCAB_SIZE, tiny_tokenizer, write_tiny_jsonl

_WITHOUT_RECOMPUTING = 3 / 4  # of a step whose blocks' forward runs twice
WARM_UP = 2  # the first step, and the one whose memory is measured


class Quiet:
    """Keeps the steps."""

    def __init__(self) -> None:
        self.steps: list[StepMetrics] = []

    def note(self, text: str) -> None:
        """See `Listener`."""

    def phase(self, text: str) -> None:
        """See `Listener`."""

    def step(self, metrics: StepMetrics) -> None:
        """See `Listener`."""
        self.steps.append(metrics)

    def saved(self, checkpoint: Path) -> None:
        """See `Listener`."""

    def has_enough(self) -> bool:
        """See `Listener`."""
        return False


def run(job: Job, folder: Path) -> tuple[Summary, list[StepMetrics], Trace]:
    """Train on threads; returns what came of it."""
    gc.collect()
    folder.mkdir()
    workers, listener = ThreadWorkers(job), Quiet()
    try:
        summary = fine_tune(job, workers, folder, listener, str)
    finally:
        workers.close()
    return summary, listener.steps, read_trace(folder / INTERNALS / "trace.json")


def costs_of(trace: Trace, num_layers: int, num_micro_batches: int, *, streams: bool, num_pieces: int = 0) -> StepCosts:
    """What each layer took, medians over the traced steps, without the waits for weights that fall into it.

    Pieces of the output embedding, and the loss, are traced as the last layer's, a norm.
    """
    waits = [span for span in trace.spans if span.cause == "weights"]
    steps = [step for step in trace.steps if step >= WARM_UP]

    def took(layer: int, kind: str) -> float:
        seconds = []
        for step in steps:
            spans = [span for span in trace.spans if (span.category, span.layer, span.step) == (kind, layer, step)]
            own_s = sum(span.end_s - span.start_s for span in spans)
            seconds.append(own_s - sum(_overlap_s(wait, span) for span in spans for wait in waits))
        return max(0.0, median(seconds))

    def each(layer: int, kind: str) -> float:
        lengths = [span.end_s - span.start_s for span in trace.spans if (span.category, span.layer) == (kind, layer)]
        return median(lengths) if lengths else 0.0

    last = num_layers - 1 if num_pieces else num_layers
    return StepCosts(
        layers=tuple(
            LayerCosts(
                forward_s=took(layer, "forward") / num_micro_batches if layer != last else 0.0,
                backward_s=took(layer, "backward") / num_micro_batches,
                apply_s=took(layer, "apply"),
                d2h_s=each(layer, "d2h"),
                cpu_s=each(layer, "cpu"),
                h2d_s=each(layer, "h2d"),
                weights_s=each(layer, "weights") if layer != last else 0.0,
            )
            for layer in range(num_layers)
        ),
        loss_s=took(last, "forward") / num_micro_batches if num_pieces else 0.0,
        pieces_s=(each(last, "weights"),) * num_pieces,
        num_micro_batches=num_micro_batches,
        num_buffers=FEWEST_BUFFERS if streams else 0,
    )


def num_pieces_of(job: Job) -> int:
    """Of the output embedding, where they come up."""
    if not job.config.streams:
        return 0
    skeleton = load_skeleton(job.model_folder, task=job.task)
    return len(model_shape(skeleton, find_layers(skeleton)).head_pieces)


def simulated(job: Job, costs: StepCosts) -> SimulatedStep:
    """A step on these costs."""
    owners = job.layout.shard_of_unit
    return Simulator(costs, POLICIES[job.config.policy](owners, room=job.delta_room), owners).run().typical


def _overlap_s(one: TracedSpan, other: TracedSpan) -> float:
    return max(0.0, min(one.end_s, other.end_s) - max(one.start_s, other.start_s))


def _typical(steps: Sequence[StepMetrics], of: Callable[[StepMetrics], float]) -> float:
    return median(of(step) for step in steps[WARM_UP:])


def write_scaled_llama_7b(folder: Path) -> RunConfig:
    """Write a llama-7B of an eighth of the width and a quarter of the depth, and its data; returns their run."""
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        max_position_embeddings=256,
        pad_token_id=0,
    )
    AutoModelForCausalLM.from_config(shape).save_pretrained(folder / "model")
    tiny_tokenizer("llama").save_pretrained(folder / "model")
    write_tiny_jsonl(folder / "data.jsonl", "prompt_completion", 4000)
    return RunConfig(
        model_name_or_path=str(folder / "model"), dataset=str(folder / "data.jsonl"), packing=True, max_seq_length=256
    )


def emulated(machine: EmulatedMachine, folder: Path, num_steps: int, rounds: int, bits: int) -> None:
    """Print a step with weights in main memory over one with weights on the device, at the machine's proportions."""
    config = replace(
        write_scaled_llama_7b(folder),
        output_dir="unused",
        max_steps=(rounds + 1) * (num_steps + 1),
        max_eval_samples=4,
        load_in_4bit=bits == 4,
        bf16=True,
        gradient_checkpointing=True,
        lsp=LspConfig(subspace_dim=128, delta="apart", check_every=0, fit="random"),  # as 1024 is to a llama-7B
        runtime=RuntimeConfig(device="cpu", num_shards=1, device_threads=1, shard_threads=1),
    )
    homes: tuple[Weights, ...] = get_args(Weights)
    jobs = [prepare_job(replace(config, runtime=replace(config.runtime, weights=home)), _unheard) for home in homes]
    layers = find_layers(load_skeleton(jobs[0].model_folder, task=jobs[0].task))
    sessions = [LiveSession(job, ThreadWorkers) for job in jobs]
    try:
        free, _ = [session.run("layerwise", Throttle(), num_steps) for session in sessions]
        # the paper's compute has no second forward
        compute_s = (free.step_s - median(free.waits_s)) * _WITHOUT_RECOMPUTING
        throttle = emulating(MACHINES[machine], compute_s=compute_s, full_numel=sum(full_payload_sizes(layers)))
        slow = Throttle(link_gbps=throttle.link_gbps)
        blocks = [[session.run("layerwise", slow, num_steps) for session in sessions] for _ in range(rounds)]
    finally:
        for session in sessions:
            session.close()
    ratios = [host.step_s / device.step_s for device, host in blocks]
    waits = [median(host.waits_s) / host.step_s for _, host in blocks]
    figures = {
        "emulates": machine,
        "bits": bits,
        "link_gbps": round(slow.link_gbps or 0.0, 4),
        "step_s": [[round(block.step_s, 3) for block in pair] for pair in blocks],
        "host_over_device": round(median(ratios), 3),
        "of_rounds": [round(ratio, 3) for ratio in sorted(ratios)],
        "exposed": round(median(waits), 4),
    }
    print(json.dumps(figures), flush=True)


def _unheard(_line: str) -> None:
    pass


def main(argv: Sequence[str] | None = None) -> None:
    """Print a line of JSON for each run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dataset", default=RunConfig().dataset)
    parser.add_argument("--subspace_dim", type=int, default=128)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--bits", type=int, choices=(4, 16), default=4)
    parser.add_argument("--link_gbps", type=float, nargs="+", default=[0.5, 0.1])
    parser.add_argument("--emulate", choices=tuple(MACHINES))
    parser.add_argument("--rounds", type=int, default=8)
    asked = parser.parse_args(argv)
    if asked.emulate is not None:
        with tempfile.TemporaryDirectory() as folder:
            emulated(asked.emulate, Path(folder), 2, asked.rounds, asked.bits)
        return
    config = RunConfig(
        model_name_or_path=asked.model,
        dataset=asked.dataset,
        output_dir="unused",
        max_steps=asked.steps,
        max_seq_length=asked.tokens,
        max_eval_samples=4,
        load_in_4bit=asked.bits == 4,
        bf16=True,
        gradient_checkpointing=True,
        lsp=LspConfig(subspace_dim=asked.subspace_dim, delta="apart", check_every=0, fit="random"),
        runtime=RuntimeConfig(device="cpu", num_shards=1, device_threads=1, shard_threads=1, weights="device"),
    )
    losses: list[float] | None = None
    with tempfile.TemporaryDirectory() as folder:
        for link_gbps in (None, *asked.link_gbps):
            home: Weights = "device" if link_gbps is None else "host"
            runtime = replace(config.runtime, weights=home, link_gbps=link_gbps)
            job = prepare_job(replace(config, runtime=runtime), lambda _line: None)
            summary, steps, trace = run(job, Path(folder) / f"{home}-{link_gbps}")
            found = [step.loss for step in steps]
            losses = losses or found
            costs = costs_of(
                trace, len(job.payload_sizes), 1, streams=link_gbps is not None, num_pieces=num_pieces_of(job)
            )
            step = simulated(job, costs)
            step_s = _typical(steps, lambda metrics: metrics.step_time_s)
            waited_s = _typical(steps, lambda metrics: metrics.exposed_weights_s)
            line = {
                "weights": home,
                "link_gbps": link_gbps,
                "same_losses": found == losses,
                "peak_device_MB": round((summary.peak_device_bytes or 0) / 1e6, 1),
                "streamed_MB": round(job.streamed_bytes / 1e6, 1),
                "step_s": round(step_s, 3),
                "simulated_step_s": round(step.step_s, 3),
                "exposed_weights": round(waited_s / step_s, 3),
                "simulated_exposed_weights": round(step.exposed.weights_s / step.step_s, 3),
                "exposed": round(_typical(steps, lambda metrics: metrics.exposed_s) / step_s, 3),
                "simulated_exposed": round(step.exposed.total_s / step.step_s, 3),
                "block_ms": [
                    round(1e3 * median(getattr(layer, name) for layer in costs.layers), 1)
                    for name in ("forward_s", "backward_s", "weights_s")
                ],
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
