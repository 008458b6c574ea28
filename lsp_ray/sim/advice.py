"""Advice: which method fits a machine, with which options, and which of them to take."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

from lsp_ray.config import Bits, Method, PolicyName, Weights
from lsp_ray.errors import ConfigError
from lsp_ray.sim.cluster import NARROWEST, ONE_GPU
from lsp_ray.sim.forecast import HIDDEN, Forecast, forecast, needs_of, simulate
from lsp_ray.sim.hardware_profile import RESERVE_BYTES, HardwareProfile
from lsp_ray.sim.hiding import hiding_batch
from lsp_ray.sim.memory import device_memory, host_memory, host_memory_elsewhere
from lsp_ray.sim.model_shape import ModelShape
from lsp_ray.sim.simulation import SimulatedStep
from lsp_ray.sim.workload import ON_QUANTIZED, Workload

DIM_STEP = 32
_PREFERRED: tuple[Method, ...] = ("native", "lsp", "zero_offload", "galore", "lora")
_EXACT_IS_WORTH = 1.5  # times lsp's step that zero_offload, full fine-tuning itself, may take to be preferred to it
_SAME = 1.01  # steps within 1 % are as fast: the default policy stays
# `delayed` is never advised: it is stale
_ADVISED: tuple[PolicyName, ...] = ("layerwise", "earliest_deadline", "layerwise_fcfs", "sequential")


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What may be chosen, each from what is best to what needs least; what a person gave stands alone.

    Attributes:
        methods: In the order in which they are shown.
        bases: Bits to which a base is quantised, None where it is not; methods that change weights have None alone.
        batches: Examples in a micro-batch, and micro-batches in an update; their product is always the same.
        checkpointing: Whether the backward runs each block's forward again.
        homes: Where weights that stay as they are live; main memory for lsp alone, with checkpointing.
        inputs: Where blocks' inputs wait for the backward; main memory with checkpointing.
        lengths: Tokens of an example at most; a shorter one is tried where no method fits.
        auto_dim: Whether D is the largest that is hidden (and fits), or the workload's.
        auto_dtype: Whether int8 may be sent in bfloat16's place: between nodes, where that hides too small a D.
        hides_link: Whether more examples than those of `batches` may be taken where weights come up: as many as hide
            the link, or the most that fit.
    """

    methods: tuple[Method, ...]
    bases: tuple[Bits | None, ...]
    batches: tuple[tuple[int, int], ...]
    checkpointing: tuple[bool, ...]
    lengths: tuple[int, ...]
    auto_dim: bool
    auto_dtype: bool = False
    homes: tuple[Weights, ...] = ("device",)
    hides_link: bool = False
    inputs: tuple[Weights, ...] = ("device",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """What each method needs, and the one to take.

    Attributes:
        rows: Of each method the first of the choices that fits, under its fastest policy; where none does the one that
            needs least.
        recommended: The first that fits of native; zero_offload, if its step takes at most 1.5 times lsp's; lsp;
            zero_offload; galore; lora; on a quantised base only where nothing fits without. With several GPUs those
            that use them come first. None where nothing does.
    """

    rows: tuple[Forecast, ...]
    recommended: Forecast | None


def largest_dim(model: ModelShape) -> int:
    """Return the largest D of interest, a multiple of 32; 0 where there is none.

    It is at most half of min(M, N) of the linear where that is largest: no linear would use more.
    """
    return model.largest_small_side // 2 // DIM_STEP * DIM_STEP


@lru_cache(maxsize=16)
def largest_hidden_dim(
    model: ModelShape, workload: Workload, hardware: HardwareProfile, policy: PolicyName = "layerwise"
) -> int:
    """Return the largest D, a multiple of 32, whose traffic and updates the compute hides; at least 32.

    Hidden means that at most 2 % of a simulated step is exposed, beside what is exposed at 32, which is messages; or
    that the driver of many GPUs takes longer than all of it. That it grows with D is taken for granted.

    Raises:
        ConfigError: The model's linears are too small for any.
    """
    bound = largest_dim(model)
    if bound < DIM_STEP:
        raise ConfigError(
            "lsp.subspace_dim", f"be a number where no linear has {2 * DIM_STEP} rows and columns", "auto"
        )

    def simulated(dim: int) -> SimulatedStep:
        work = replace(workload, method="lsp", subspace_dim=dim, nnz_per_row=min(workload.nnz_per_row, dim))
        return simulate(model, work, hardware, policy).typical

    driver_s = workload.cluster.driver_s(len(model.layers)) if workload.cluster.num_gpus > 1 else 0.0
    messages_s = simulated(DIM_STEP).exposed.total_s

    def is_exposed(multiple: int) -> bool:
        step = simulated(multiple * DIM_STEP)
        return step.step_s > driver_s and step.exposed.total_s - messages_s > HIDDEN * step.step_s

    candidates = range(2, bound // DIM_STEP + 1)
    return DIM_STEP * (1 + bisect_left(candidates, True, key=is_exposed))


def advise(
    model: ModelShape,
    workload: Workload,
    hardware: HardwareProfile,
    choices: Choices,
    typical: Callable[[Workload], Workload] | None = None,
) -> Advice:
    """Return what fits `hardware`, and which of it to take.

    Args:
        model: What is trained.
        workload: A step; what `choices` hold of it is replaced.
        hardware: Where.
        choices: What may be varied.
        typical: Sets the typical micro-batch for a workload's length and batch; default: the longest there can be.

    Raises:
        ConfigError: D is to be chosen, and every linear is too small for one.
    """
    search = _Search(model=model, hardware=hardware, choices=choices, typical=typical or (lambda work: work))
    for length in choices.lengths:
        works = [_placed(replace(workload, method=method, bits=None, seq_length=length)) for method in choices.methods]
        found = [search.first_fitting(work) for work in works]
        fitting = {row.workload.method: row for row in found if row}
        if fitting or length == choices.lengths[-1]:
            break
    rows = tuple(row or search.least(work) for row, work in zip(found, works, strict=True))
    plain = {method: row for method, row in fitting.items() if row.workload.bits is None}
    return Advice(rows=rows, recommended=_best(plain or fitting) if fitting else None)


def why_nothing_fits(advice: Advice, hardware: HardwareProfile) -> str:
    """Say what the least would be; `advice` recommends nothing."""
    least = min(advice.rows, key=lambda row: max(need.excess for need in row.needs))
    need = max(least.needs, key=lambda need: need.excess)
    whole_bytes = hardware.device_memory_bytes if need.where == "device" else hardware.host_memory_bytes
    whole = f"nothing fits {whole_bytes / 1e9:.4g} GB"
    weights_bytes, bits = least.device.weights + least.device.quantized, least.workload.bits
    if weights_bytes > whole_bytes and need.where != "shared":
        return f"{whole}: the weights alone are {weights_bytes / 1e9:.1f} GB{f' in {bits} bits' if bits else ''}"
    kept = "half of it shared" if need.where == "shared" else f"{RESERVE_BYTES / 1e9:g} GB of it kept free"
    kind = "GPU" if need.where == "device" else "main"
    return (
        f"{whole} of {kind} memory, {kept}: the least is {need.needed_bytes / 1e9:.1f} GB, "
        f"with method {least.workload.method}{f' in {bits} bits' if bits else ''}"
        f"{', weights in main memory' if least.workload.streams else ''}"
        f"{', activations in main memory' if least.workload.parks_inputs else ''}"
    )


def _placed(workload: Workload) -> Workload:
    """On one GPU where the method knows no more."""
    return replace(workload, cluster=ONE_GPU) if workload.stays_on_device else workload


def _best(fitting: Mapping[Method, Forecast]) -> Forecast:
    """Those that share a step among GPUs come first."""
    order = sorted(_PREFERRED, key=lambda name: name in fitting and fitting[name].workload.cluster == ONE_GPU)
    best = next(fitting[name] for name in order if name in fitting)
    exact = fitting.get("zero_offload", best)
    is_worth_it = best.workload.method == "lsp" and _example_s(exact) <= _EXACT_IS_WORTH * _example_s(best)
    return exact if is_worth_it else best


def _example_s(row: Forecast) -> float:
    """Steps may differ in their examples where weights come up."""
    return row.step_s / (row.workload.batch_size * row.workload.num_micro_batches)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Search:
    """Through the choices for one method and length; arguments as in `advise`."""

    model: ModelShape
    hardware: HardwareProfile
    choices: Choices
    typical: Callable[[Workload], Workload]

    def first_fitting(self, workload: Workload) -> Forecast | None:
        """Under its fastest policy; None where none fits."""
        for work in self._works(workload):
            if _may_fit(self.model, work, self.hardware):
                seen = self.typical(work)
                sent = self._sent(seen)
                for dim in self._dims(sent):
                    if found := _fastest(self.model, replace(sent, subspace_dim=dim), self.hardware):
                        return found
        return None

    def least(self, workload: Workload) -> Forecast:
        """The last choice, wherever blocks' inputs are, under the policy that needs least."""
        last = {work.activations: self.typical(work) for work in self._works(workload)}
        entries = [
            forecast(self.model, work, self.hardware, policy) for work in last.values() for policy in _policies(work)
        ]
        return min(entries, key=lambda entry: max(need.excess for need in entry.needs))

    def _works(self, workload: Workload) -> Iterator[Workload]:
        """Every choice with the least D of it."""
        dim = workload.subspace_dim
        if self._chooses_dim(workload):
            dim = -(-workload.nnz_per_row // DIM_STEP) * DIM_STEP
        bases = [bits for bits in self.choices.bases if bits is None or workload.method in ON_QUANTIZED]
        homes: tuple[Weights, ...] = self.choices.homes if workload.method == "lsp" else ("device",)
        for inputs, home, bits, checkpointing in product(self.choices.inputs, homes, bases, self.choices.checkpointing):
            if "host" in (home, inputs) and not checkpointing:
                continue
            work = replace(
                workload,
                bits=bits,
                weights=home,
                activations=inputs,
                apart=workload.apart or home == "host",
                gradient_checkpointing=checkpointing,
            )
            for batch_size, num_micro_batches in (*self._larger_batches(work), *self.choices.batches):
                yield replace(work, batch_size=batch_size, num_micro_batches=num_micro_batches, subspace_dim=dim)

    def _larger_batches(self, workload: Workload) -> Iterator[tuple[int, int]]:
        """What hides the link, and ever fewer examples; nothing where not even the first of the batches may fit."""
        batch_size, num_micro_batches = self.choices.batches[0]
        first = replace(workload, batch_size=batch_size, num_micro_batches=num_micro_batches)
        if not (workload.streams and self.choices.hides_link and _may_fit(self.model, first, self.hardware)):
            return
        more = hiding_batch(self.model, self.typical(first), self.hardware)
        while more > batch_size:
            yield more, num_micro_batches
            more //= 2

    def _sent(self, workload: Workload) -> Workload:
        """In int8 where the network hides less than the D asked for, or a run's own, in bfloat16."""
        nodes = workload.cluster.num_nodes
        if nodes == 1 or workload.method != "lsp" or not self.choices.auto_dtype:
            return workload
        wanted = NARROWEST if self.choices.auto_dim else workload.subspace_dim
        wanted = min(wanted, largest_dim(self.model))
        if largest_hidden_dim(self.model, workload, self.hardware) >= wanted:
            return workload
        return replace(workload, payload_dtype="int8")

    def _dims(self, workload: Workload) -> Iterator[int]:
        """The largest D that is hidden, and ever smaller ones, down to the workload's."""
        least = workload.subspace_dim
        if self._chooses_dim(workload):
            dim = largest_hidden_dim(self.model, workload, self.hardware)
            while dim > least:
                yield dim
                dim = dim // 2 // DIM_STEP * DIM_STEP
        yield least

    def _chooses_dim(self, workload: Workload) -> bool:
        return self.choices.auto_dim and workload.method == "lsp"


def _fastest(model: ModelShape, workload: Workload, hardware: HardwareProfile) -> Forecast | None:
    """Under the policies with which it fits; None where there is none."""
    if not _may_fit(model, workload, hardware):
        return None
    fitting: list[Forecast] = []
    for policy in _policies(workload):
        entry = forecast(model, workload, hardware, policy)
        if not entry.misfits:
            fitting.append(entry)
            if entry.step_s <= _SAME * (entry.step_s - entry.exposed.total_s):
                break  # nothing waits: no order is faster
    fastest_s = min((entry.step_s for entry in fitting), default=0.0)
    return next((entry for entry in fitting if entry.step_s <= _SAME * fastest_s), None)


def _policies(workload: Workload) -> list[PolicyName | None]:
    """A run's default first."""
    if workload.stays_on_device:
        return [None]
    return sorted(_ADVISED, key=lambda name: name != "sequential") if workload.method == "zero_offload" else [*_ADVISED]


def _may_fit(model: ModelShape, workload: Workload, hardware: HardwareProfile) -> bool:
    """Whether it fits without payloads on the device, of which only a simulation knows."""
    peak_bytes = device_memory(model, workload.full, 0).peak_bytes
    host = host_memory(model, workload, on_gpu=hardware.on_gpu)
    elsewhere = host_memory_elsewhere(model, workload, on_gpu=hardware.on_gpu)
    return all(need.fits for need in needs_of(hardware, peak_bytes, host, elsewhere))
