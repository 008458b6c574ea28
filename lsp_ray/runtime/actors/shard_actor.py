"""ShardActor: owns the optimizer state of some units; AdamW from slot to slot.

The state lives in slots too, so that it outlives the actor. A unit's state slot carries the number of its updates as
its generation, and none while an update is under way; before, the state goes into an undo slot. So an actor
that takes a dead one's place finds every unit's state whole, or puts it back to what it was before the update, and an
update that is asked for again is made once. Where updates are speculative every unit has an undo slot of its own: an
update that is asked for with scaled gradients, after it was made with plain ones, begins from what was kept there.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
import torch

from lsp_ray.device.token_bucket import TokenBucket
from lsp_ray.errors import WorkerLostError
from lsp_ray.optim.moments_file import load_moments, save_moments
from lsp_ray.optim.reproject import Reprojection
from lsp_ray.optim.shard import OptimizerShard
from lsp_ray.process import keep_loaded
from lsp_ray.runtime.actors.numa_nodes import run_on
from lsp_ray.runtime.actors.throttle import Throttle
from lsp_ray.runtime.checkpoints.checkpoint import STATE, writing
from lsp_ray.runtime.checkpoints.saved_run import SavedRun, reading
from lsp_ray.runtime.cluster.malloc_arenas import give_back_free
from lsp_ray.runtime.drive.ledger import OpReport
from lsp_ray.runtime.transport.lanes import UPDATES, connect, serve
from lsp_ray.runtime.transport.line import Lines, Way
from lsp_ray.runtime.transport.network import Address
from lsp_ray.runtime.transport.unit_slots import UnitSlots, state_in
from lsp_ray.trace import Span, WorkStream


class ShardActor:
    """Thin shell over OptimizerShard.

    Args:
        slots: Of the units this shard owns.
        undo: By unit, a slot for a state to go back to; several units may share one that is large enough for each.
        num_threads: Threads of torch's operators here.
        weight_decay: Of updates that are added up here.
        index: Of this shard; Ray's dashboard names it by that.
        cores: That it keeps to; none: it runs where it may.
        way: To the clock of the driver's machine, by which all times are told; None: it is this one's.
    """

    def __init__(
        self,
        slots: Sequence[UnitSlots],
        undo: Mapping[int, ray.ObjectRef[Any]],
        num_threads: int,
        index: int,
        weight_decay: float = 0.0,
        cores: Collection[int] = (),
        way: Way | None = None,
    ) -> None:
        keep_loaded()
        self._index = index
        self._way, self._lines, self._offset_s, self._last_step = way, Lines(), 0.0, -1
        run_on(cores)
        torch.set_num_threads(num_threads)
        self._opened = {own.unit: own.open() for own in slots}
        self._states = {own.unit: own.open_state() for own in slots}
        self._undo = {own.unit: own.open_undo(undo[own.unit]) for own in slots}
        self._numel = {own.unit: own.numel for own in slots}
        sums = {own.unit: own.sums for own in slots if own.sums is not None}
        states = {
            unit: state_in(slot.payload, self._numel[unit], summed=unit in sums) for unit, slot in self._states.items()
        }
        self._shard = OptimizerShard(
            self._numel,
            states=states,
            codec=slots[0].codec,
            sums=sums or None,
            weight_decay=weight_decay,
            parts=slots[0].parts,
        )
        self._bucket: TokenBucket | None = None
        for unit, slot in self._states.items():
            if slot.generation is None:
                self._put_back(unit)

    def __repr__(self) -> str:
        return f"shard-{self._index}"

    def serve(self, address: str | Address) -> None:
        """Carry out the driver's orders for as long as it lives."""
        serve(connect(address, UPDATES), self)

    def keep_to(self, throttle: Throttle, num_shards: int) -> None:
        """Between two steps: keep to this shard's part of the throttle from now on."""
        self._bucket = throttle.shard(num_shards)

    def load(self, saved: SavedRun) -> None:
        """Take the moments of a checkpoint."""
        with reading(saved.folder):
            load_moments(saved.moments, self._shard.states, num_updates=saved.step)
        for slot in self._states.values():
            slot.publish(saved.step)

    def save(self, folder: str, shard_index: int) -> None:
        """Write this shard's part of a checkpoint."""
        with writing(Path(folder)):
            save_moments(Path(folder) / STATE / f"moments-{shard_index}.safetensors", self._shard.states)
        give_back_free()

    def update(
        self,
        step: int,
        unit: int,
        learning_rate: float,
        reprojections: Sequence[Reprojection] = (),
        grad_scale: float = 1.0,
    ) -> OpReport:
        """Read the unit's gradients of `step` from its down-slots, write the delta into its up-slot."""
        self._look_at_clock(step)
        start_s = time.monotonic()
        own, slot = self._opened[unit], self._states[unit]
        gradients = own.gradients(step)
        if slot.generation == step + 1 and grad_scale == 1.0:  # made by an actor that died before it could say so
            return self._report(step, unit, start_s, self._shard.square_sum(unit, gradients))
        if slot.generation == step + 1:  # made before the step was judged
            self._put_back(unit)
        self._keep(unit, step)
        self._shard.carry_over(unit, reprojections)
        delta = own.up.to_write()
        squares = self._shard.update(unit, gradients, delta, learning_rate=learning_rate, grad_scale=grad_scale)
        if self._bucket is not None:
            self._bucket.take(self._numel[unit], start_s=start_s)
        own.up.publish(step)
        slot.publish(step + 1)
        return self._report(step, unit, start_s, squares)

    def _report(self, step: int, unit: int, start_s: float, squares: float | None) -> OpReport:
        begin_s, end_s = start_s + self._offset_s, time.monotonic() + self._offset_s
        span = Span(stream=WorkStream.CPU, step=step, layer=unit, start_s=begin_s, end_s=end_s)
        return OpReport(span=span, square_sum=squares)

    def _look_at_clock(self, step: int) -> None:
        if self._way is None or step == self._last_step:
            return
        self._last_step = step
        with suppress(WorkerLostError):  # whose payloads it would bring will say so
            self._offset_s = self._lines.ask(self._way.keeper, "offset_s")

    def _keep(self, unit: int, step: int) -> None:
        """Copy a state so that `_put_back` can undo what happens to it from now on."""
        slot, undo = self._states[unit], self._undo[unit]
        kept = slot.to_read(step)
        undo.to_write().copy_(kept)
        undo.publish(step)
        slot.to_write()

    def _put_back(self, unit: int) -> None:
        slot, undo = self._states[unit], self._undo[unit]
        step = undo.generation
        assert step is not None, "a state was changed before it was kept"
        slot.to_write().copy_(undo.payload)
        slot.publish(step)
