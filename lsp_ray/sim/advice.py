"""Advice: the options of LSP that suit a model and a machine."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace

from lsp_ray.config import PolicyName
from lsp_ray.errors import ConfigError
from lsp_ray.sim.forecast import Forecast, forecast, simulate
from lsp_ray.sim.hardware_profile import HardwareProfile
from lsp_ray.sim.model_shape import ModelShape
from lsp_ray.sim.simulator import SimulatedStep
from lsp_ray.sim.workload import Workload

DIM_STEP = 32
HIDDEN = 0.02  # of a step that traffic and updates may expose and still count as hidden
_DEVICE_THREADS = 2  # of the host, for launches and copies
_ADVISED: tuple[PolicyName, ...] = ("layerwise", "earliest_deadline", "layerwise_fcfs", "sequential")


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """Options of a run, and the forecast for them."""

    subspace_dim: int
    nnz_per_row: int
    num_shards: int
    shard_threads: int
    policy: PolicyName
    forecast: Forecast


def largest_dim(model: ModelShape) -> int:
    """Return the largest D of interest, a multiple of 32; 0 where there is none.

    It is at most half of min(M, N) of the linear where that is largest: no linear would use more.
    """
    return model.largest_small_side // 2 // DIM_STEP * DIM_STEP


def largest_hidden_dim(
    model: ModelShape, workload: Workload, hardware: HardwareProfile, policy: PolicyName = "layerwise"
) -> int:
    """Return the largest D, a multiple of 32, whose traffic and updates the compute hides; at least 32.

    Hidden means that at most 2 % of a simulated step is exposed, beside what is exposed at 32, which is messages. That
    it grows with D is taken for granted.

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

    messages_s = simulated(DIM_STEP).exposed.total_s

    def is_exposed(multiple: int) -> bool:
        step = simulated(multiple * DIM_STEP)
        return step.exposed.total_s - messages_s > HIDDEN * step.step_s

    candidates = range(2, bound // DIM_STEP + 1)
    return DIM_STEP * (1 + bisect_left(candidates, True, key=is_exposed))


def advise(model: ModelShape, workload: Workload, hardware: HardwareProfile) -> Advice:
    """Return the largest hidden D for the workload's R, and shards, threads and policy of the fastest step with it.

    A larger R costs the device compute and lowers the bias less than a larger D does (docs/benchmarks/projection.md).
    Among what is as fast within 1 % the fewest shards and the default policy win. `delayed` is never advised: it is
    stale.
    """
    base = replace(workload, method="lsp")
    divisions = _divisions(hardware)
    widest = replace(base, num_shards=divisions[0][0], shard_threads=divisions[0][1])
    base = replace(base, subspace_dim=largest_hidden_dim(model, widest, hardware))
    options = [
        forecast(model, replace(base, num_shards=num_shards, shard_threads=threads), hardware, name)
        for num_shards, threads in divisions
        for name in _ADVISED
    ]
    fastest_s = min(option.step_s for option in options)
    best = next(option for option in options if option.step_s <= 1.01 * fastest_s)
    assert best.policy is not None, "lsp always has a policy"
    return Advice(
        subspace_dim=best.workload.subspace_dim,
        nnz_per_row=best.workload.nnz_per_row,
        num_shards=best.workload.num_shards,
        shard_threads=best.workload.shard_threads,
        policy=best.policy,
        forecast=best,
    )


def _divisions(hardware: HardwareProfile) -> list[tuple[int, int]]:
    """(shards, threads of each), fewest shards first, that divide the cores which the device leaves."""
    left = max(1, hardware.num_cores - (_DEVICE_THREADS if hardware.on_gpu else 1))
    counts = [2**power for power in range(4) if 2**power <= max(1, left // 2)]
    return [(count, left // count) for count in counts]
