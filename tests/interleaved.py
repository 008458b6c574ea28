"""InterleavedRun: a whole training run in which a seed decides what happens when.

Compute, both directions of the link and the shards have their threads, as in ThreadWorkers, and the driver asks the
same policies; but only one runs at a time, and chance changes between them at every operation of the backend. A stream
advances when chance wants it, too. Each has a speed of its own that the seed decides: some lag far behind. Messages
order, and nothing else: launches from the driver to a thread, completions back.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from transformers import PreTrainedModel

from lsp_ray.device.host_activations import HostActivations
from lsp_ray.device.refit import Refitter
from lsp_ray.device.streamed_weights import StreamedWeights
from lsp_ray.device.unit import Unit
from lsp_ray.device.worker import DeviceWorker
from lsp_ray.models.loss import Batch
from lsp_ray.optim.codec import Codec
from lsp_ray.optim.reproject import Reprojection
from lsp_ray.optim.shard import OptimizerShard
from lsp_ray.schedule.ops import DeltaDue, Event, GradientReady, Op, OpDone
from lsp_ray.schedule.policy import Policy
from lsp_ray.trace import WorkStream
from tests.checking_backend import CheckedSlot, CheckingBackend
from tests.happens_before import Clock
from tests.host_thread import HostThread, SteppedCondition

DRIVER = "the driver"


class InterleavedRun:
    """See the module's text.

    Attributes:
        happened: Who went on, piece by piece.
        num_taken_over: Projectors renewed.

    Args:
        model: To be trained, in training mode.
        units: Of the model.
        policy: What the driver asks.
        backend: Checks.
        learning_rates: One for every step.
        seed: Of what happens when.
        shard_of_unit: Each unit's shard.
        refitter: Renews projectors.
        codec: Of what crosses the link.
        weights: Bring frozen weights up, on a thread that is one of those here; made with `changed`.
        activations: The same of blocks' inputs, both ways.
        changed: What its threads wait on.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        units: Sequence[Unit],
        policy: Policy,
        backend: CheckingBackend,
        *,
        learning_rates: Sequence[float],
        seed: int,
        shard_of_unit: Sequence[int],
        refitter: Refitter | None = None,
        codec: Codec | None = None,
        weights: StreamedWeights | None = None,
        activations: HostActivations | None = None,
        changed: SteppedCondition | None = None,
    ) -> None:
        self.happened: list[str] = []
        self.num_taken_over = 0
        self._policy, self._backend = policy, backend
        self._learning_rates = learning_rates
        self._random, self._shard_of_unit = random.Random(seed), shard_of_unit
        sizes = {unit.index: unit.numel for unit in units}
        codec = codec or Codec()
        wires = {index: codec.wire_numel(numel) for index, numel in sizes.items()}
        self._down = [CheckedSlot(backend, numel, f"down {index}", codec.dtype) for index, numel in wires.items()]
        self._up = [CheckedSlot(backend, numel, f"up {index}", codec.dtype) for index, numel in wires.items()]
        # any split over shards gives the same bits; the lanes are split
        self._shard = OptimizerShard(sizes, codec=codec)
        self._reprojections: dict[int, tuple[Reprojection, ...]] = {}
        self._news: deque[tuple[Clock, Event]] = deque()
        self._compute = HostThread("the compute thread")
        lanes = ["the d2h thread", "the h2d thread", *(f"the cpu thread {shard}" for shard in set(shard_of_unit))]
        self._launched: dict[str, deque[tuple[Clock, Op]]] = {lane: deque() for lane in lanes}
        self._threads = {lane: HostThread(lane) for lane in lanes} | {self._compute.name: self._compute}
        self._speeds: dict[str, float] = {}
        self._prefetched: Op | None = None
        self._has_come_up = [-1] * len(units)  # unit -> the last step whose delta the forward can take
        backend.about_to_submit = self._pause
        backend.about_to_wait = self._about_to_wait
        self.worker = DeviceWorker(
            model,
            units,
            backend,
            learning_rates=learning_rates,
            weight_decay=0.0,
            seed=0,
            on_gradients=self._announced,
            on_due=self._let_delta_come,
            refitter=refitter,
            measured_step=-1,
            staleness=policy.staleness,
            codec=codec,
            weights=weights,
            activations=activations,
        )
        if changed is not None:
            changed.pause = self._pause
        if weights is not None:
            self._copy("the weights thread", weights.bring_all)
        if activations is not None:
            self._copy("the activations thread", activations.copy_all)

    def _copy(self, name: str, task: Callable[[], None]) -> None:
        self._threads[name] = HostThread(name)
        self._threads[name].begin(task)

    def train(self, micro_batches: Sequence[Sequence[Batch]]) -> None:
        """Run every step and add what came of them."""
        try:
            for step, batches in enumerate(micro_batches):
                self._compute_until_done(partial(self.worker.run_step, step, batches))
            if self._policy.room is not None:
                self._compute_until_done(self.worker.drain)
            while self._happens_next():
                pass
            self._compute_until_done(self.worker.flush)
        finally:
            for thread in self._threads.values():
                thread.end()

    def _compute_until_done(self, task: Callable[[], object]) -> None:
        self._compute.begin(task)
        while not self._compute.is_idle:
            assert self._happens_next(), "everybody waits for somebody"

    def _announced(self, ready: GradientReady | DeltaDue) -> None:
        self._news.append(({}, ready))  # news, no order: whoever sends waits for the fence itself

    def _let_delta_come(self, due: DeltaDue) -> None:
        if self._policy.room is not None:
            self._announced(due)
        self._pause(lambda: self._has_come_up[due.layer] >= due.step)

    def _pause(self, until: Callable[[], bool] | None = None) -> None:
        self._threads[self._backend.thread].pause(until)

    def _about_to_wait(self) -> None:
        if self._backend.thread == "the h2d thread" and self._prefetched is not None:
            # the delta has been left for the forward before its copy is waited for
            self._has_come_up[self._prefetched.layer] = self._prefetched.step
        self._pause()

    def _happens_next(self) -> bool:
        """Let one of those who have something to do go on; False if there is none."""
        able: dict[str, Callable[[], None]] = {}
        for stream in self._backend.lagging():
            able[f"the {stream} stream"] = partial(self._backend.advance, stream)
        for name, thread in self._threads.items():
            if thread.is_idle and self._launched.get(name):
                thread.begin(partial(self._act, name, *self._launched[name].popleft()))
            if thread.can_go_on:
                able[name] = partial(self._resume, thread)
        if self._news:
            able[DRIVER] = self._decide
        if not able:
            return False
        speeds = [self._speeds.setdefault(name, 10.0 ** self._random.uniform(-2, 0)) for name in able]
        who = self._random.choices(list(able), speeds)[0]
        self.happened.append(who)
        able[who]()
        return True

    def _resume(self, thread: HostThread) -> None:
        self._backend.thread = thread.name
        thread.resume()
        self._backend.check()

    def _decide(self) -> None:
        told, event = self._news.popleft()
        self._backend.order.learn(DRIVER, told)
        for action in self._policy.handle(event):
            op = action.op
            shard = f" {self._shard_of_unit[op.layer]}" if op.stream is WorkStream.CPU else ""
            self._launched[f"the {op.stream} thread{shard}"].append((self._backend.order.tell(DRIVER), op))

    def _act(self, lane: str, told: Clock, op: Op) -> None:
        self._backend.order.learn(lane, told)
        acts = {WorkStream.D2H: self._send, WorkStream.CPU: self._update, WorkStream.H2D: self._prefetch}
        acts[op.stream](op)
        self._news.append((self._backend.order.tell(lane), OpDone(op=op)))

    # the same calls as those of GpuActor, ShardActor and ThreadWorkers

    def _send(self, op: Op) -> None:
        slot = self._down[op.layer]
        _, self._reprojections[op.layer] = self.worker.send(op.step, op.layer, slot.to_write())
        self.num_taken_over += len(self._reprojections[op.layer])
        slot.publish(op.step)

    def _update(self, op: Op) -> None:
        gradient, up = self._down[op.layer].to_read(op.step), self._up[op.layer]
        self._shard.carry_over(op.layer, self._reprojections[op.layer])
        self._shard.update(op.layer, [gradient], up.to_write(), learning_rate=self._learning_rates[op.step])
        up.publish(op.step)

    def _prefetch(self, op: Op) -> None:
        self._prefetched = op
        self.worker.prefetch(op.step, op.layer, self._up[op.layer].to_read(op.step))
        self._has_come_up[op.layer] = op.step
