"""ShardPool: the shard actors, and others in the place of those that die."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import psutil
import ray
import torch

from lsp_ray.errors import WorkerLostError
from lsp_ray.optim.codec import Codec
from lsp_ray.optim.reproject import Reprojection
from lsp_ray.optim.sums import SummedPart
from lsp_ray.runtime.answers import answer
from lsp_ray.runtime.job import Job
from lsp_ray.runtime.shard_actor import ShardActor, SlotPair
from lsp_ray.runtime.slots import new_slot_buffer
from lsp_ray.runtime.throttle import Throttle
from lsp_ray.schedule.ops import Op
from lsp_ray.sim.store import payload_bytes, state_numel

START_TIMEOUT_S = 120.0  # an actor starts in seconds; past that it cannot be placed
MAX_DEATHS_IN_A_ROW = 3


class ShardPool:
    """Starts a shard for every index of the layout. A dead one's state is in its slots, see `shard_actor`.

    Args:
        job: The run.
        pairs: Slots of every unit, by index.
    """

    def __init__(self, job: Job, pairs: Sequence[SlotPair]) -> None:
        self._job = job
        self._pairs = [[pairs[unit] for unit in job.layout.units_of(index)] for index in range(job.layout.num_shards)]
        self._undo = [new_undo(own, is_shared=not job.speculates) for own in self._pairs]
        self._throttle = Throttle()
        self._deaths = [0 for _ in self._pairs]
        self._shards = [self._new(index) for index in range(len(self._pairs))]
        self._pids = [self._started(index) for index in range(len(self._pairs))]

    def set_up(self, throttle: Throttle) -> None:
        """Let every shard take the checkpoint's moments, if there is one, and keep to the throttle."""
        if self._job.saved is not None:
            self._all([shard.load.remote(self._job.saved) for shard in self._shards], "loading its state")
        self.keep_to(throttle)

    def keep_to(self, throttle: Throttle) -> None:
        """Between two steps: let the shards keep to this from now on, also those that come in a dead one's place."""
        self._throttle = throttle
        self._all([self._throttled(index) for index in range(len(self._shards))], "throttle")

    def update(self, op: Op, reprojections: Sequence[Reprojection], grad_scale: float) -> ray.ObjectRef[Any]:
        """Let the unit's shard make its update, with gradients times `grad_scale`."""
        shard = self._shards[self.index_of(op)]
        ref: ray.ObjectRef[Any] = shard.update.remote(
            op.step, op.layer, self._job.learning_rates[op.step], reprojections, grad_scale
        )
        return ref

    def index_of(self, op: Op) -> int:
        """The shard that owns the unit."""
        return self._job.layout.shard_of_unit[op.layer]

    def updated(self, op: Op) -> None:
        """Note that an update is done."""
        self._deaths[self.index_of(op)] = 0

    def revive(self, index: int, error: WorkerLostError) -> None:
        """Put another actor in the place of a dead one; its updates that were under way must be asked for again.

        Raises:
            WorkerLostError: `error`, where that has not helped several times in a row.
        """
        self._deaths[index] += 1
        if self._deaths[index] >= MAX_DEATHS_IN_A_ROW:
            raise error
        ray.kill(self._shards[index])
        _wait_for_end(self._pids[index])  # two writers of one slot would be one too many
        self._shards[index] = self._new(index)
        self._pids[index] = self._started(index)
        answer(self._throttled(index), f"shard {index}: throttle")

    def save(self, folder: str) -> dict[str, ray.ObjectRef[Any]]:
        """Let every shard write its part of a checkpoint; returns the calls by what they are."""
        return {f"shard {index}: save": shard.save.remote(folder, index) for index, shard in enumerate(self._shards)}

    def close(self) -> None:
        """End the actors and give their slots back."""
        for shard in self._shards:
            ray.kill(shard)
        self._pairs, self._undo = [], []

    def _new(self, index: int) -> Any:
        actor = _actor_class().options(num_cpus=1, max_restarts=0)
        threads, decay = self._job.layout.shard_threads, self._job.config.weight_decay
        return actor.remote(self._pairs[index], self._undo[index], threads, index, decay)

    def _started(self, index: int) -> int:
        pid: int = answer(self._shards[index].ready.remote(), f"shard {index}: start", START_TIMEOUT_S)
        return pid

    def _throttled(self, index: int) -> ray.ObjectRef[Any]:
        ref: ray.ObjectRef[Any] = self._shards[index].keep_to.remote(self._throttle, len(self._shards))
        return ref

    def _all(self, calls: Sequence[ray.ObjectRef[Any]], what: str) -> None:
        for index, call in enumerate(calls):
            answer(call, f"shard {index}: {what}")


@cache
def _actor_class() -> Any:
    """Made once: what Ray makes of a class stays for as long as the process lives, and every lost shard is replaced."""
    return ray.remote(ShardActor)


def new_pair(unit: int, numel: int, codec: Codec, sums: Sequence[SummedPart] | None = None) -> SlotPair:
    """Allocate a unit's slots, for a payload of `numel` elements; `sim.store` counts them."""
    wire_bytes, state_bytes = payload_bytes(numel, codec.payload_dtype), _state_bytes(numel, codec, sums)
    down, up, state = (ray.put(new_slot_buffer(size)) for size in (wire_bytes, wire_bytes, state_bytes))
    pair = SlotPair(unit=unit, numel=numel, codec=codec, sums=sums, down=down, up=up, state=state)
    pair.open_state().publish(0)  # zeros: the state before the first update
    return pair


def new_undo(pairs: Sequence[SlotPair], *, is_shared: bool) -> dict[int, ray.ObjectRef[Any]]:
    """Allocate, for a shard's units, a slot for each one's state: the same for all, or one each."""
    sizes = [_state_bytes(pair.numel, pair.codec, pair.sums) for pair in pairs]
    if not is_shared:
        return {pair.unit: ray.put(new_slot_buffer(size)) for pair, size in zip(pairs, sizes, strict=True)}
    shared = ray.put(new_slot_buffer(max(sizes)))
    return {pair.unit: shared for pair in pairs}


def _state_bytes(numel: int, codec: Codec, sums: Sequence[SummedPart] | None) -> int:
    return torch.float32.itemsize * state_numel(numel, codec.payload_dtype, summed=sums is not None)


def _wait_for_end(pid: int) -> None:
    try:
        process = psutil.Process(pid)
        if process.status() != psutil.STATUS_ZOMBIE:
            process.wait(START_TIMEOUT_S)
    except psutil.NoSuchProcess:
        return
    except psutil.TimeoutExpired as error:
        raise WorkerLostError(f"process {pid} of a lost actor does not end") from error
