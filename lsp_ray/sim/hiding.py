"""Where weights come up from main memory: how many examples of a micro-batch hide the link.

Every micro-batch brings each block up twice, whatever it holds. So the same examples in fewer micro-batches wait less.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

from lsp_ray.config import PolicyName
from lsp_ray.sim.forecast import Forecast, forecast
from lsp_ray.sim.hardware_profile import HardwareProfile
from lsp_ray.sim.model_shape import ModelShape
from lsp_ray.sim.workload import Workload

WAITS = 0.05  # of a step that may wait for weights while the link still counts as hidden


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkAdvice:
    """What hides the link of a forecast that streams weights.

    Attributes:
        batch_size: The fewest examples of a micro-batch that do.
        tokens: Of these, padding counted.
        fits: Whether so many fit the machine.
        share: Of a step as forecast that waits for weights.
        divided: The same examples in a step, in micro-batches as large as fit; None where that is no faster.
    """

    batch_size: int
    tokens: int
    fits: bool
    share: float
    divided: Forecast | None


@lru_cache(maxsize=64)
def hiding_batch(
    model: ModelShape, workload: Workload, hardware: HardwareProfile, policy: PolicyName = "layerwise"
) -> int:
    """Return the fewest examples of a micro-batch with which at most 5 % of a simulated step waits for weights.

    The step has one micro-batch, and as many blocks are on the device as fit beside it. That the share falls with the
    examples is taken for granted; examples are padded to the same length however many they are.
    """

    def is_hidden(batch_size: int) -> bool:
        targets = workload.typical_targets and -(-workload.typical_targets * batch_size // workload.batch_size)
        work = replace(workload, batch_size=batch_size, num_micro_batches=1, typical_targets=targets)
        step = forecast(model, work, hardware, policy)
        return step.exposed.weights_s <= WAITS * step.step_s

    enough = 1
    while not is_hidden(enough):
        enough *= 2
    return 1 + enough // 2 + bisect_left(range(1 + enough // 2, enough), True, key=is_hidden)


def link_advice(
    model: ModelShape, row: Forecast, hardware: HardwareProfile, typical: Callable[[Workload], Workload]
) -> LinkAdvice:
    """Return what hides the link of `row`, which streams weights; `typical` as in `advise`."""
    work = row.workload
    assert row.policy is not None, "weights come up beside deltas"
    batch_size = hiding_batch(model, work, hardware, row.policy)

    def with_batch(size: int, num_micro_batches: int) -> Forecast:
        other = typical(replace(work.full, batch_size=size, num_micro_batches=num_micro_batches))
        return forecast(model, other, hardware, row.policy)

    examples, share = work.batch_size * work.num_micro_batches, row.exposed.weights_s / row.step_s
    larger = [size for size in range(examples, work.batch_size, -1) if examples % size == 0 and share > WAITS]
    fitting = (other for size in larger if not (other := with_batch(size, examples // size)).misfits)
    divided = next(fitting, None)
    return LinkAdvice(
        batch_size=batch_size,
        tokens=batch_size * work.padded_length,
        fits=not with_batch(batch_size, 1).misfits,
        share=share,
        divided=divided if divided is not None and divided.step_s < row.step_s else None,
    )
