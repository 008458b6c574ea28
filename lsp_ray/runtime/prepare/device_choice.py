"""Where the model runs and in which type: what was asked for, else what this machine has and is fast at."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median
from typing import Literal

import torch
from transformers import PreTrainedModel

from lsp_ray.config import RunConfig
from lsp_ray.errors import ConfigError
from lsp_ray.runtime.prepare.machines import Machine

Device = Literal["cpu", "cuda"]

GRAPH_LENGTHS = 64
BF16_PAYS = 0.75  # CPUs with units for bfloat16 take 0.15 to 0.6 of float32's time, others 10 times it: a wide gap
_TOKENS, _SIDE = 256, 512  # of the product that is timed: some milliseconds
_NUM_PAIRS = 7


def choose_device(config: RunConfig, machines: Sequence[Machine] = ()) -> Device:
    """Return the device asked for; auto takes the GPU if there is one, here or on one of the cluster's machines.

    Raises:
        ConfigError: A GPU is asked for and there is none.
    """
    asked = config.runtime.device
    has_gpu = any(machine.num_gpus for machine in machines) if machines else torch.cuda.is_available()
    if asked == "auto":
        return "cuda" if has_gpu else "cpu"
    if asked == "cuda" and not has_gpu:
        raise ConfigError("runtime.device", "be cpu or auto where torch finds no GPU", asked)
    return asked


def device_bytes(config: RunConfig, device: Device) -> int | None:
    """Return what the run may take of a device's memory; None: a CPU's, of which it was not said how much.

    Raises:
        ConfigError: More is asked for than there is, or other machines of a cluster have GPUs and this one has none.
    """
    if device == "cuda" and config.runtime.address is not None and not torch.cuda.is_available():
        bound = "be a cluster that the run is started in on a machine with a GPU, as others there have"
        raise ConfigError("runtime.address", bound, config.runtime.address)
    asked_gb = config.runtime.device_memory_gb
    asked = None if asked_gb is None else int(asked_gb * 1e9)
    # all of a GPU's: to ask what is free would take some of it for this process
    there = torch.cuda.get_device_properties(0).total_memory if device == "cuda" else None
    if asked is not None and there is not None and asked > there:
        raise ConfigError("runtime.device_memory_gb", f"be at most {there / 1e9:.2f}, all of the GPU's", asked_gb)
    return asked or there


def choose_gpus(
    config: RunConfig, device: Device, note: Callable[[str], None], machines: Sequence[Machine] = ()
) -> RunConfig:
    """Return the run with its GPUs and replicas as numbers. On a CPU, actors that have GPUs' work count as such.

    Args:
        config: What was asked for.
        device: Where the model runs.
        note: Told of GPUs that are there and not used.
        machines: Of the cluster; none: this one alone.

    Raises:
        ConfigError: More are asked for than there are.
    """
    there = None
    if device == "cuda":
        there = sum(machine.num_gpus for machine in machines) if machines else torch.cuda.device_count()
    asked = config.runtime.num_gpus
    if asked == "auto":
        num_there = there or max(1, len(machines))
        most = config.num_replicas or num_there
        num_gpus = min(num_there, most) if config.offloads else 1
        if there is not None and there > num_gpus:
            why = f"method {config.method} trains on one" if not config.offloads else f"num_replicas is {most}"
            note(f"{num_gpus} of {there} GPUs computes, as {why}")
    else:
        num_gpus = asked
        if there is not None and num_gpus > there:
            raise ConfigError(
                "runtime.num_gpus",
                f"be at most {there}, the GPUs of {'the cluster' if machines else 'this machine'}",
                num_gpus,
            )
    runtime = replace(config.runtime, num_gpus=num_gpus)
    return replace(config, runtime=runtime, num_replicas=config.num_replicas or num_gpus)


def choose_bf16(
    config: RunConfig,
    device: Device,
    note: Callable[[str], None],
    machines: Sequence[Machine] = (),
    *,
    measure: Callable[[], float] | None = None,
) -> bool:
    """Return whether weights and activations are bfloat16: as asked, else where it is faster.

    Args:
        config: What was asked for.
        device: Where the model runs.
        note: Told what a CPU was measured to be fast at.
        machines: Of the cluster; none: this one alone.
        measure: Times the CPU; default: `bf16_over_float32`.
    """
    if config.bf16 is False:
        return False
    if device == "cuda":
        if config.bf16 is None and machines:
            return all(machine.has_bf16 for machine in machines if machine.num_gpus)
        return config.bf16 or torch.cuda.is_bf16_supported(including_emulation=False)
    ratio = (measure or bf16_over_float32)()
    if config.bf16:
        if ratio > 1.0:
            note(f"bf16: products take {ratio:.0f} times as long as float32's on this CPU; --bf16 false is faster")
        return True
    pays = ratio <= BF16_PAYS
    chosen = "bfloat16" if pays else "float32"
    note(f"bf16: products take {ratio:.2f} of float32's time on this CPU, so weights are {chosen}")
    return pays


def bf16_over_float32(clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the time of bfloat16's matrix products on one core over float32's.

    A linear's forward and input gradient are timed in turn in both types, and the median of the ratios is taken: what
    else the machine does meets both.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for dtype in (torch.bfloat16, torch.float32):
            _product_s(dtype, clock)  # the first one loads the kernels
        return median(_product_s(torch.bfloat16, clock) / _product_s(torch.float32, clock) for _ in range(_NUM_PAIRS))
    finally:
        torch.set_num_threads(num_threads)


def _product_s(dtype: torch.dtype, clock: Callable[[], float]) -> float:
    input_TN, weight_MN = torch.ones(_TOKENS, _SIDE, dtype=dtype), torch.ones(_SIDE, _SIDE, dtype=dtype)
    start_s = clock()
    with torch.inference_mode():
        (input_TN @ weight_MN.t()) @ weight_MN
    return clock() - start_s


def length_multiple(skeleton: PreTrainedModel, config: RunConfig, device: Device) -> int | None:
    """Return what the length of every batch is a multiple of; None: nothing.

    A graph is recorded for every length: of few lengths there are few graphs.
    """
    longest = -(-config.seq_length // GRAPH_LENGTHS) * GRAPH_LENGTHS
    fits = longest <= getattr(skeleton.config.get_text_config(), "max_position_embeddings", longest)
    return GRAPH_LENGTHS if device == "cuda" and config.uses_graphs and fits else None
