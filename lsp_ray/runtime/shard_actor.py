"""ShardActor: owns the optimizer state of some units; AdamW from slot to slot."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch

from lsp_ray.device.token_bucket import TokenBucket
from lsp_ray.methods.lsp_shard import carry_over, whiten
from lsp_ray.optim.shard import OptimizerShard
from lsp_ray.projection.reproject import Reprojection
from lsp_ray.projection.sparse_projector import SparseProjector
from lsp_ray.runtime.slots import Slot
from lsp_ray.runtime.throttle import Throttle
from lsp_ray.trace import Span, WorkStream


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotPair:
    """One unit's slots: object references of the way down and the way up, and the payload's length."""

    unit: int
    numel: int
    down: ray.ObjectRef[Any]
    up: ray.ObjectRef[Any]

    def open(self) -> OpenPair:
        """Map both slots into this process."""
        down, up = ray.get([self.down, self.up])
        return OpenPair(down=Slot(down, self.numel, f"down {self.unit}"), up=Slot(up, self.numel, f"up {self.unit}"))


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenPair:
    """A unit's slots, mapped."""

    down: Slot
    up: Slot


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardReport:
    """An update's span and the sum of squares of the gradient it read."""

    span: Span
    grad_square_sum: float


class ShardActor:
    """Thin shell over OptimizerShard.

    Args:
        pairs: The units this shard owns.
        num_threads: Threads of torch's operators here.
    """

    def __init__(self, pairs: Sequence[SlotPair], num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        self._pairs: Mapping[int, OpenPair] = {pair.unit: pair.open() for pair in pairs}
        self._shard = OptimizerShard({pair.unit: pair.numel for pair in pairs})
        self._bucket: TokenBucket | None = None

    def ready(self) -> int:
        """Bytes of optimizer state, once the constructor is done."""
        return self._shard.state_bytes

    def slow_down(self, throttle: Throttle, num_shards: int) -> None:
        """Keep to this shard's part of the throttle from now on."""
        self._bucket = throttle.shard(num_shards)

    def whiten(self, projectors: Mapping[int, Sequence[tuple[int, SparseProjector]]]) -> None:
        """Take Adam's steps of this shard's matrices in whitened coordinates; projectors by unit, of all units."""
        for unit in self._pairs:
            whiten(self._shard, unit, projectors[unit])

    def update(
        self, step: int, unit: int, learning_rate: float, reprojections: Sequence[Reprojection] = ()
    ) -> ShardReport:
        """Read the unit's gradient of `step` from its down-slot, write the delta into its up-slot."""
        start_s = time.monotonic()
        pair = self._pairs[unit]
        gradient = pair.down.to_read(step)
        carry_over(self._shard, unit, reprojections)
        square_sum = self._shard.update(unit, gradient, pair.up.to_write(), learning_rate=learning_rate)
        if self._bucket is not None:
            self._bucket.take(gradient.numel(), start_s=start_s)
        pair.up.publish(step)
        span = Span(stream=WorkStream.CPU, step=step, layer=unit, start_s=start_s, end_s=time.monotonic())
        return ShardReport(span=span, grad_square_sum=float(square_sum))
