"""Plan: what every method needs on one machine, and what to choose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

from lsp_ray.config import Bits, Method, PolicyName, RuntimeConfig, Weights
from lsp_ray.plan.options import SHORTEST, PlanConfig
from lsp_ray.plan.typical_batch import TypicalBatch
from lsp_ray.runtime.prepare.layout import GPU_HOST_THREADS, divide_cores
from lsp_ray.sim.advice import Advice, Choices, advise, why_nothing_fits
from lsp_ray.sim.forecast import Forecast, forecast
from lsp_ray.sim.hardware_profile import HardwareProfile
from lsp_ray.sim.hiding import LinkAdvice, link_advice
from lsp_ray.sim.longest import Longest, longest
from lsp_ray.sim.memory import HostMemory
from lsp_ray.sim.model_shape import ModelShape
from lsp_ray.sim.workload import ON_QUANTIZED, Workload

_METHODS: tuple[Method, ...] = ("native", "zero_offload", "lsp", "galore", "lora")
_BATCH_SIZE, _LENGTH = 4, 128  # a run's own
_HALVINGS = 2  # of the length, where nothing fits


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What was found.

    Attributes:
        model: What is trained.
        hardware: Where.
        advice: A forecast for each method, and the one to take.
        refused: Methods without one, as they change weights, and all that may be chosen are quantised.
        found_bits: Those of a model that is quantised already.
        link: What hides the link, where a row that fits streams weights.
        positions: Tokens of an example that the model reads at most; None: any number.
    """

    model: ModelShape
    hardware: HardwareProfile
    advice: Advice
    refused: tuple[Method, ...] = ()
    found_bits: Bits | None = None
    link: LinkAdvice | None = None
    positions: int | None = None

    @property
    def longest(self) -> Longest | None:
        """From which length on blocks' inputs in main memory pay; None where nothing fits, or there is one memory."""
        best = self.advice.recommended
        if best is None or not self.hardware.on_gpu:
            return None
        return longest(self.model, best, self.hardware, self.positions)

    @property
    def reason(self) -> str | None:
        """Why nothing fits; None where something does."""
        if self.advice.recommended is not None:
            return None
        return why_nothing_fits(self.advice, self.hardware)

    def by_policy(self) -> list[Forecast]:
        """Forecast the same methods and options under every policy."""
        return [
            forecast(self.model, row.workload, self.hardware, policy)
            for row in self.advice.rows
            for policy in ((None,) if row.workload.stays_on_device else get_args(PolicyName))
        ]

    def as_json(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        best = self.advice.recommended
        return {
            "fits": best is not None,
            "reason": self.reason,
            "hardware": asdict(self.hardware),
            "num_parameters": self.model.num_parameters,
            "num_trained": self.model.num_trained,
            "recommended": None if best is None else _forecast_json(best),
            "link_hidden_from": None if self.link is None else _link_json(self.link),
            "longest": None if (found := self.longest) is None else asdict(found),
            "methods": [_forecast_json(row) for row in self.advice.rows],
            "refused": list(self.refused),
            "by_policy": [_forecast_json(entry) for entry in self.by_policy()],
        }


def make_plan(
    model: ModelShape,
    work: Workload,
    hardware: HardwareProfile,
    choices: Choices,
    typical: Callable[[Workload], Workload] | None = None,
    found_bits: Bits | None = None,
    positions: int | None = None,
) -> Plan:
    """Find what fits for every method, and which to take.

    Args:
        model: What is trained.
        work: A step; what `choices` hold of it is replaced.
        hardware: Where.
        choices: What may be varied.
        typical: Sets the typical micro-batch for a workload's length and batch; default: the longest there can be.
        found_bits: Of a model that is quantised already.
        positions: That the model has; None: any number.

    Raises:
        ConfigError: d is to be chosen, and every linear is too small for one.
    """
    refused = tuple(method for method in choices.methods if None not in choices.bases and method not in ON_QUANTIZED)
    methods = tuple(method for method in choices.methods if method not in refused)
    advice = advise(model, work, hardware, replace(choices, methods=methods), typical)
    streaming = [row for row in advice.rows if row.workload.streams and not row.misfits]
    links = [link_advice(model, row, hardware, typical or (lambda work: work)) for row in streaming]
    return Plan(
        model=model,
        hardware=hardware,
        advice=advice,
        refused=refused,
        found_bits=found_bits,
        link=links[0] if links else None,  # lsp's: no other method streams
        positions=positions,
    )


def choices_of(config: PlanConfig, *, found_bits: Bits | None = None, keep: bool = True) -> Choices:
    """Return what the options leave open; with `keep` false all of it, but for the examples in an update.

    Where a model is quantised already, `found_bits` says to how many bits.
    """
    batch_size, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    batches, is_open = [(batch_size or _BATCH_SIZE, accumulation or 1)], batch_size is None and accumulation is None
    if not keep or is_open:
        batches = _divisions(batches[0][0] * batches[0][1], largest=batches[0][0])
    asked = config.gradient_checkpointing if keep else None
    methods = _METHODS if config.method is None or not keep else (config.method,)
    bases: tuple[Bits | None, ...] = (None, 4)
    if found_bits or (keep and (config.bits or config.keeps_dense)):
        bases = (found_bits or config.bits,)
    return Choices(
        methods=methods,
        homes=_homes(config, keep=keep),
        inputs=_inputs(config, keep=keep),
        bases=bases,
        batches=tuple(batches),
        checkpointing=(False, True) if asked is None else (asked,),
        lengths=_lengths(config.max_seq_length, keep),
        auto_dim=config.lsp.subspace_dim == "auto" or not keep,
        auto_dtype=config.runtime.payload_dtype is None or not keep,
        hides_link=is_open,
    )


def _homes(config: PlanConfig, *, keep: bool) -> tuple[Weights, ...]:
    """Where weights may live: in main memory only if updates may be apart, with checkpointing, and not in 8 bits."""
    asked = config.runtime.weights
    if asked is not None and keep:
        return (asked,)
    is_refused = config.lsp.delta == "merged" or config.load_in_8bit or config.gradient_checkpointing is False
    return ("device",) if is_refused and keep else ("device", "host")


def _inputs(config: PlanConfig, *, keep: bool) -> tuple[Weights, ...]:
    asked = config.runtime.activations
    if asked is not None and keep:
        return (asked,)
    return ("device",) if config.gradient_checkpointing is False and keep else ("device", "host")


def _lengths(asked: int | None, keep: bool) -> tuple[int, ...]:
    """The length asked for; where it may be less, halves of it as well."""
    if asked is not None and keep:
        return (asked,)
    longest = asked or _LENGTH
    return tuple(longest >> halvings for halvings in range(_HALVINGS + 1) if longest >> halvings >= SHORTEST)


def _divisions(examples: int, largest: int) -> list[tuple[int, int]]:
    """Examples in a micro-batch and micro-batches, by division without rest."""
    return [(size, examples // size) for size in range(largest, 0, -1) if examples % size == 0]


def workload_of(
    config: PlanConfig,
    *,
    num_units: int,
    cores: int,
    on_gpu: bool,
    bf16: bool = True,
    found_bits: Bits | None = None,
) -> Workload:
    """Return LSP's step with these options, the first of what may be chosen; shards and threads are a run's."""
    asked = RuntimeConfig(num_shards=config.runtime.num_shards, shard_threads=config.runtime.shard_threads)
    others = GPU_HOST_THREADS * (config.num_gpus - 1)
    shares = divide_cores(asked, num_units=num_units, cores=max(1, cores - others), on_gpu=on_gpu)
    choices = choices_of(config, found_bits=found_bits)
    dim = config.lsp.subspace_dim
    return Workload(
        method="lsp",
        batch_size=choices.batches[0][0],
        seq_length=choices.lengths[0],
        num_micro_batches=choices.batches[0][1],
        bf16=bf16,
        bits=choices.bases[0],
        apart=config.lsp.delta == "apart",
        gradient_checkpointing=choices.checkpointing[0],
        subspace_dim=256 if dim == "auto" else dim,
        nnz_per_row=config.lsp.nnz_per_row,
        lora_rank=config.lora.r,
        galore_rank=config.galore.rank,
        num_shards=shares.num_shards,
        shard_threads=shares.shard_threads,
        shard_by=config.runtime.shard_by,
        payload_dtype=config.runtime.payload_dtype or RuntimeConfig.payload_dtype,
        pinned=config.runtime.pinned,
        speculates=config.max_grad_norm > 0 or config.on_nonfinite == "skip",
        cluster=config.cluster,
    )


def with_batch(work: Workload, batch: TypicalBatch) -> Workload:
    """Return the workload with a data set's typical micro-batch."""
    return replace(work, typical_length=batch.padded_length, typical_targets=batch.num_targets)


def _forecast_json(entry: Forecast) -> dict[str, Any]:
    work = entry.workload
    return {
        "method": work.method,
        "policy": entry.policy,
        "subspace_dim": work.subspace_dim if work.method == "lsp" else None,
        "bits": work.bits,
        "weights": work.weights,
        "activations": work.activations,
        "delta": None if work.method != "lsp" else "apart" if work.is_apart else "merged",
        "per_device_train_batch_size": work.batch_size,
        "gradient_accumulation_steps": work.num_micro_batches,
        "gradient_checkpointing": work.gradient_checkpointing,
        "max_seq_length": work.seq_length,
        "num_gpus": work.cluster.num_gpus,
        "num_nodes": work.cluster.num_nodes,
        "network_gbit": work.cluster.network_gbit if work.cluster.num_nodes > 1 else None,
        "bf16": work.bf16,
        "step_s": entry.step_s,
        "tokens_per_s": entry.tokens_per_s,
        "efficiency": entry.efficiency,
        "bottleneck": entry.bottleneck,
        "bound": entry.bound,
        "busy_s": {**entry.busy_s, "network": entry.network_s, "driver": entry.driver_s},
        "exposed_s": {**asdict(entry.exposed), "of_it_network_s": entry.crossing_s},
        "payload_dtype": None if work.stays_on_device else work.payload_dtype,
        "bytes_each_way": entry.bytes_each_way,
        "device_bytes": {**asdict(entry.device), "peak": entry.device.peak_bytes, "longest": entry.longest_bytes},
        "host_bytes": _host_json(entry.host),
        "host_bytes_elsewhere": None if entry.elsewhere is None else _host_json(entry.elsewhere),
        "misfits": list(map(str, entry.misfits)),
    }


def _link_json(link: LinkAdvice) -> dict[str, Any]:
    return {
        "per_device_train_batch_size": link.batch_size,
        "tokens": link.tokens,
        "fits": link.fits,
        "same_examples": None if link.divided is None else _forecast_json(link.divided),
    }


def _host_json(host: HostMemory) -> dict[str, float]:
    return {**asdict(host), "total": host.total_bytes}
