#!/usr/bin/env python3
"""What several machines bring: efficiency by payload and network, the simulator's error, and losses of actors.

    python scripts/bench_scaling.py [--quick] [--json PATH]

Two raylets on this machine, one CPU actor in a GPU's place on each, whose layers sleep as long as a GPU would compute;
payloads, slots, updates and connections are real, and the product's own throttle makes the network as slow as asked.

efficiency: the part of a step in which the GPU that waits longest computes, as the planner's; pace_over_step: the asked
step over the measured one. simulator_error: it is given a block without a throttle and predicts the others.
replica_kill: actors of either machine are killed at random, and all must end with the bits of a run left alone.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from tests.machines import machines

if TYPE_CHECKING:  # Ray reads its settings when it is imported
    from lsp_ray.runtime.prepare.job import Job
    from lsp_ray.runtime.prepare.machines import Machine
    from scripts.live_session import Block

NUM_BLOCKS, HIDDEN = 32, 192
STORE_BYTES = 700 << 20
KILL_STEPS, NUM_KILLS = 60, 20
SHARES = {"GpuActor": 0.3, "NodeKeeper": 0.2, "ShardActor": 0.5}  # of the kills


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """So many bytes of payload each way a GPU and step, over a network of this rate."""

    payload_mb: int
    gbit: float

    def __str__(self) -> str:
        return f"{self.payload_mb} MB at {self.gbit:g} Gbit/s"


SETTINGS = [
    Setting(payload_mb=size, gbit=gbit)
    for size, rates in ((15, (1, 4)), (30, (1, 4, 10)), (61, (1, 4, 10)))
    for gbit in rates
]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write the figures; 0 if no kill cost a step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of 5 steps in place of three of 10")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(argv)
    rounds, num_steps = (1, 5) if options.quick else (3, 10)
    with tempfile.TemporaryDirectory() as text, _joined() as there:
        from scripts.paced_gpu import STEP_S

        folder = Path(text)
        blocks = _blocks(folder, there, rounds, num_steps)
        figures = {
            "step_s": {str(setting): round(median(_steps(found)), 4) for setting, found in blocks.items()},
            "efficiency": {str(setting): _efficiency(found) for setting, found in blocks.items()},
            "pace_over_step": {
                str(setting): round(STEP_S / median(_steps(found)), 3) for setting, found in blocks.items()
            },
            "simulator_error": {str(setting): _error(setting, found) for setting, found in blocks.items()},
            "replica_kill": _killed(folder, there),
        }
    print(json.dumps(figures, indent=2))
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    kills = figures["replica_kill"]
    return 0 if kills["identical"] and not kills["lost"] else 1


@contextmanager
def _joined() -> Iterator[list[Machine]]:
    """Both machines, which this process has joined."""
    with machines(2, store_bytes=STORE_BYTES) as (cluster, _):
        os.environ.update(cluster.environment)
        from lsp_ray.runtime.cluster import nodes
        from lsp_ray.runtime.cluster.joined_cluster import joined_cluster

        with joined_cluster(cluster.address) as there:
            yield nodes.machines(there)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A setting's block, the one without a throttle in the same round, and the sizes of the layers' payloads."""

    block: Block
    free: Block
    sizes: tuple[int, ...]


def _blocks(folder: Path, there: Sequence[Machine], rounds: int, num_steps: int) -> Mapping[Setting, Sequence[Found]]:
    from lsp_ray.runtime.actors.throttle import Throttle
    from scripts.live_session import LiveSession
    from scripts.paced_gpu import LongPacedWorkers

    found = defaultdict(list)
    for size in sorted({setting.payload_mb for setting in SETTINGS}):
        own = [setting for setting in SETTINGS if setting.payload_mb == size]
        job = _job(folder, there, size, rounds * (1 + len(own)) * (1 + num_steps))
        session = LiveSession(job, LongPacedWorkers)
        try:
            for _ in range(rounds):
                free = session.run("layerwise", Throttle(), num_steps)
                for setting in own:
                    block = session.run("layerwise", Throttle(network_gbps=setting.gbit / 8), num_steps)
                    found[setting].append(Found(block=block, free=free, sizes=session.payload_sizes))
                    print(f"{setting}: {block.step_s:.3f} s, without a throttle {free.step_s:.3f} s", flush=True)
        finally:
            session.close()
    return found


def _steps(found: Sequence[Found]) -> list[float]:
    return [step_s for one in found for step_s in one.block.step_times_s]


def _efficiency(found: Sequence[Found]) -> float:
    waits_s = median(wait_s for one in found for wait_s in one.block.waits_s)
    return round(1.0 - waits_s / median(_steps(found)), 3)


def _error(setting: Setting, found: Sequence[Found]) -> float:
    """Relative: what the simulator says of the step over what it was."""
    predicted_s = median(_predicted_s(setting, one) for one in found)
    return round(predicted_s / median(_steps(found)) - 1.0, 3)


def _predicted_s(setting: Setting, found: Found) -> float:
    from lsp_ray.schedule.policy import POLICIES
    from lsp_ray.sim.costs import LayerCosts, NetworkCosts, StepCosts
    from lsp_ray.sim.simulator import Simulator
    from lsp_ray.sim.store import payload_bytes
    from scripts.overlap_prediction import HOP_S

    layers = tuple(
        LayerCosts(
            forward_s=layer.forward_s,
            backward_s=layer.backward_s,
            d2h_s=layer.d2h_s,
            cpu_s=layer.cpu_s,
            h2d_s=layer.h2d_s,
        )
        for layer in found.free.layers
    )
    crossing_s = tuple(payload_bytes(size, "bfloat16") / (setting.gbit * 1e9 / 8) for size in found.sizes)
    network = NetworkCosts(down_s=crossing_s, up_s=crossing_s, at=(0, 1))
    owners = [0] * len(layers)
    policy = POLICIES["layerwise"](owners, gpu_of_part=(0, 1))
    costs = StepCosts(layers=layers, hop_s=HOP_S, network=network)
    return Simulator(costs, policy, owners, num_steps=10).run().typical.step_s


def _killed(folder: Path, there: Sequence[Machine]) -> dict[str, Any]:
    from lsp_ray.runtime.actors.ray_workers import RayWorkers
    from lsp_ray.runtime.persistence import fine_tune_persistently
    from lsp_ray.runtime.prepare.job import prepare_job
    from lsp_ray.runtime.training import NeverStop
    from scripts.soak import Watcher
    from tests.tiny_jobs import run_on_threads, saved_weights, tiny_config

    changes: dict[str, Any] = {"num_replicas": 2, "max_steps": KILL_STEPS, "save_steps": 0}
    config = tiny_config(folder, runtime={"num_gpus": 2, "address": "auto"}, **changes)
    job = prepare_job(config, lambda _line: None, None, there)
    alone = prepare_job(tiny_config(folder, **changes), lambda _line: None)
    run_on_threads(alone, folder / "alone")
    chance = random.Random(0)
    moments = chance.sample(range(2, KILL_STEPS - 4), NUM_KILLS)
    victims = {moment: chance.choices(list(SHARES), list(SHARES.values()))[0] for moment in moments}
    watcher = Watcher(victims, seed=0)
    out = folder / "killed"
    out.mkdir()
    workers = partial(RayWorkers, note=lambda line: print(line, flush=True), shared=out)
    fine_tune_persistently(job, workers, out, watcher, str, NeverStop())
    for line in watcher.notes:
        if "starting again" in line:
            print(line)
    losses = [
        [json.loads(line)["loss"] for line in (folder / name / "metrics.jsonl").open()] for name in ("killed", "alone")
    ]
    ours, theirs = saved_weights(job, out), saved_weights(alone, folder / "alone")
    return {
        "kills": len(watcher.killed),
        "of": {name: watcher.killed.count(name) for name in SHARES},
        "lost": watcher.num_made_again,
        "identical": losses[0] == losses[1] and all(bool((ours[name] == theirs[name]).all()) for name in ours),
        "max_recovery_s": round(max(second for name in SHARES for second in watcher.recoveries_s(name)), 2),
    }


def _job(folder: Path, there: Sequence[Machine], payload_mb: int, num_steps: int) -> Job:
    """Zero-Offload of a model that has as many weights as payloads of this size have elements in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from lsp_ray.config import RunConfig, RuntimeConfig
    from lsp_ray.runtime.prepare.job import prepare_job
    from tests.tiny import VOCAB_SIZE, tiny_tokenizer, write_tiny_jsonl

    model, data = folder / f"model-{payload_mb}", folder / "data.jsonl"
    block_numel = payload_mb * 500_000 / NUM_BLOCKS
    shape = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN,
        intermediate_size=round((block_numel - 4 * HIDDEN**2) / (3 * HIDDEN)),
        num_hidden_layers=NUM_BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(shape).save_pretrained(model)
    tiny_tokenizer("llama").save_pretrained(model)
    write_tiny_jsonl(data, "prompt_completion", 64)
    config = RunConfig(
        model_name_or_path=str(model),
        dataset=str(data),
        output_dir=str(folder / "out"),
        method="zero_offload",
        max_steps=num_steps,
        num_replicas=2,
        per_device_train_batch_size=1,
        max_eval_samples=4,
        bf16=False,
        runtime=RuntimeConfig(
            device="cpu",
            num_gpus=2,
            address="auto",
            num_shards=1,
            device_threads=1,
            shard_threads=1,
            policy="layerwise",
        ),
    )
    return prepare_job(config, lambda _line: None, None, there)


if __name__ == "__main__":
    sys.exit(main())
