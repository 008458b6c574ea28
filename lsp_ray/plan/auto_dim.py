"""`lsp.subspace_dim auto`: the largest D whose traffic and updates a run hides on this machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from lsp_ray.config import PolicyName, RunConfig
from lsp_ray.errors import ConfigError
from lsp_ray.hardware import MACHINES
from lsp_ray.models.resolve import resolve_config
from lsp_ray.plan.measure import measure
from lsp_ray.plan.skeleton import quantized_bits, shape_of
from lsp_ray.plan.typical_batch import typical_batch
from lsp_ray.runtime.actors.throttle import Throttle, emulating
from lsp_ray.runtime.prepare.device_choice import Device, choose_bf16, choose_device, choose_gpus
from lsp_ray.runtime.prepare.layout import divide_cores
from lsp_ray.runtime.prepare.machines import Machine, place
from lsp_ray.sim.advice import DIM_STEP, largest_dim, largest_hidden_dim
from lsp_ray.sim.cluster import Cluster
from lsp_ray.sim.cost_model import CostModel
from lsp_ray.sim.forecast import simulate
from lsp_ray.sim.hardware_profile import HardwareProfile
from lsp_ray.sim.model_shape import ModelShape
from lsp_ray.sim.workload import Workload
from lsp_ray.trace import Exposed

_BUDGET_S = 0.1  # of each rate measured: some seconds in all


def with_subspace_dim(config: RunConfig, note: Callable[[str], None], machines: Sequence[Machine] = ()) -> RunConfig:
    """Return the run with a number in place of `lsp.subspace_dim auto`; any other run as it is.

    The machine is measured, slowed down to the link or the machine that the run asks for, and steps of the data set's
    typical micro-batches are simulated on it. The type of the weights is decided on the way and kept.

    Args:
        config: What was asked for.
        note: Told, a line at a time, what was chosen and why.
        machines: Of the cluster, this one first; none: this one alone.

    Raises:
        ConfigError: The model is too small for a choice, model or data set cannot be used, or GPUs are elsewhere.
    """
    if config.method != "lsp" or config.lsp.subspace_dim != "auto":
        return config
    device = choose_device(config, machines)
    cluster = cluster_of(config, device, machines)
    config = replace(config, bf16=choose_bf16(config, device, note, machines))
    dim, reason = _choose(config, device, cluster, note)
    note(f"lsp.subspace_dim auto: {dim}, {reason}")
    return replace(config, lsp=replace(config.lsp, subspace_dim=dim))


def cluster_of(config: RunConfig, device: Device, machines: Sequence[Machine] = ()) -> Cluster:
    """Return the GPUs of this machine that are to share a step, each with as many parts as the one that has most.

    Raises:
        ConfigError: There are GPUs on other machines, too, or fewer than asked for.
    """
    decided = choose_gpus(config, device, lambda _line: None, machines)  # the run itself says what it chooses
    num_gpus = decided.runtime.num_gpus
    assert num_gpus != "auto", "is decided by now"
    if machines and any(own is not machines[0] for own in place(num_gpus, machines, on_gpu=device == "cuda")):
        bound = "be a number where GPUs of other machines compute, as nobody has measured the network"
        raise ConfigError("lsp.subspace_dim", bound, "auto", hint="lsp-ray plan recommends one for each network")
    return Cluster(gpus_per_node=num_gpus, parts_per_gpu=-(-decided.replicas // num_gpus))


def _choose(config: RunConfig, on: Device, cluster: Cluster, note: Callable[[str], None]) -> tuple[int, str]:
    """The largest hidden D, and why it is no larger."""
    folder = resolve_config(config.model_name_or_path, log=note)
    model = shape_of(folder)
    device = torch.device(on)
    cores = divide_cores(
        replace(config.runtime, num_gpus=cluster.gpus_per_node),
        num_units=len(model.layers),
        cores=len(os.sched_getaffinity(0)),
        on_gpu=device.type == "cuda",
    )
    batch = typical_batch(
        config.dataset,
        folder,
        batch_size=config.per_device_train_batch_size,
        max_seq_length=config.asked_length,
        seed=config.seed,
        packing=config.packing,
        groups_by_length=config.train_sampling_strategy == "group_by_length",
    )
    work = Workload(
        method="lsp",
        batch_size=config.per_device_train_batch_size,
        seq_length=batch.max_length,
        typical_length=batch.padded_length,
        typical_targets=batch.num_targets,
        num_micro_batches=config.gradient_accumulation_steps,
        bf16=bool(config.bf16),
        bits=config.bits or quantized_bits(folder),
        apart=config.lsp.is_apart or config.streams,
        weights="host" if config.streams else "device",
        activations=config.runtime.activations,
        gradient_checkpointing=config.recomputes,
        nnz_per_row=config.lsp.nnz_per_row,
        num_shards=cores.num_shards,
        shard_threads=cores.shard_threads,
        payload_dtype=config.runtime.payload_dtype,
        cluster=cluster,
    )
    measured = measure(folder, model, work, device=device, device_threads=cores.device_threads, budget_s=_BUDGET_S)
    machine = throttled(measured, _throttle(config, model, work, measured), work.update_bytes)
    dim = largest_hidden_dim(model, work, machine, config.policy)
    return dim, why_no_larger(model, replace(work, subspace_dim=dim), machine, config.policy)


def why_no_larger(model: ModelShape, work: Workload, machine: HardwareProfile, policy: PolicyName) -> str:
    """Say what bounds the D of `work`, which is the largest hidden one."""
    if work.subspace_dim == largest_dim(model):
        return "half the small side of the largest matrix, which is the most there is"
    wider = work.subspace_dim + DIM_STEP
    step = simulate(model, replace(work, subspace_dim=wider), machine, policy).typical
    waits = f"{step.exposed.total_s:.3g} s of a simulated step of {step.step_s:.3g} s"
    return f"the largest that is hidden: {wider} would expose {waits}, mostly {_cause(step.exposed)}"


def throttled(machine: HardwareProfile, throttle: Throttle, update_bytes: float) -> HardwareProfile:
    """Return the machine with its link and updates slowed down; a throttle never makes a part faster.

    `update_bytes` are those that a shard moves for an element.
    """
    link = float("inf") if throttle.link_gbps is None else throttle.link_gbps * 1e9
    updates = float("inf") if throttle.updates_per_s is None else throttle.updates_per_s * update_bytes
    return replace(
        machine,
        d2h_bytes_per_s=min(machine.d2h_bytes_per_s, link),
        h2d_bytes_per_s=min(machine.h2d_bytes_per_s, link),
        host_bytes_per_s=min(machine.host_bytes_per_s, updates),
    )


def _throttle(config: RunConfig, model: ModelShape, work: Workload, machine: HardwareProfile) -> Throttle:
    """As the run will have it; the compute that an emulated machine is scaled to is simulated here."""
    runtime = config.runtime
    if runtime.emulate is None:
        return Throttle(link_gbps=runtime.link_gbps)
    plain = CostModel(
        model=model,
        workload=replace(work, method="zero_offload", bits=None, weights="device", activations="device"),
        hardware=machine,
    ).step()
    return emulating(MACHINES[runtime.emulate], compute_s=plain.both_ways_s, full_numel=model.num_trained)


def _cause(waiting: Exposed) -> str:
    by_cause = {
        "the way down": waiting.d2h_s,
        "updates": waiting.cpu_s,
        "the way up": waiting.h2d_s,
        "weights on their way up": waiting.weights_s,
        "activations on their way": waiting.activations_s,
    }
    return max(by_cause, key=lambda cause: by_cause[cause])
