"""DeviceWorker: runs steps on the device and exchanges payloads with slots. Knows nothing of Ray.

Three threads call it: compute (`run_step`, `flush` and everything else), d2h (`send`) and h2d (`prefetch`).
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel

from lsp_ray.device.backend import Backend, Fence
from lsp_ray.device.compute_trace import ComputeTrace
from lsp_ray.device.mailbox import ArrivedDelta, DeltaMailbox
from lsp_ray.device.memory import LiveStorage, peak_of
from lsp_ray.device.refit import BiasReport, Refitter
from lsp_ray.device.rounding import Rounding, mixed
from lsp_ray.device.token_bucket import TokenBucket
from lsp_ray.device.unit import Target, Unit, Update
from lsp_ray.errors import LspRayError, NonFiniteLossError
from lsp_ray.models.loss import Batch, num_targets, num_tokens, summed_loss
from lsp_ray.optim.shard import OptimizerShard
from lsp_ray.projection.reproject import Reprojection
from lsp_ray.schedule.ops import GradientReady
from lsp_ray.trace import ComputeSpan, Phase, Span, Wait, WorkStream, is_traced

DELTA_TIMEOUT_S = 600.0  # only a hang lasts so long: a dead actor is noticed by the driver at once


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What the compute stream did in one step; `loss` is the mean over the step's targets.

    `forward_s` is the first micro-batch's forward without its waits, `backward_s` the last one's backward: between
    them lie the deadlines and the arrivals of a step. `grad_square_sum` is filled where gradients never leave the
    device; elsewhere the shards count it.
    """

    step: int
    loss: float
    num_tokens: int
    start_s: float
    end_s: float
    forward_s: float
    backward_s: float
    waits: tuple[Wait, ...]
    grad_square_sum: float
    peak_device_bytes: int | None
    bias: BiasReport | None
    compute: tuple[ComputeSpan, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Payload:
    gradient: torch.Tensor
    fence: Fence


class DeviceWorker:
    """Forward, backward and compression of a model's units; deltas are added before the forward that reads them.

    Args:
        model: On the backend's device, in training mode, its targets in place.
        units: The trained layers, shallowest first.
        backend: Copies and fences.
        learning_rates: One for every step.
        weight_decay: Decoupled decay of matrices.
        seed: Of dropout and rounding.
        on_gradients: Told, on any thread, that a unit's payload is ready to be sent.
        local_shard: Optimizer state on the device (native): gradients then go nowhere else.
        refitter: Renews projectors while training.
        measured_step: The step over which `peak_device_bytes` is measured.
        staleness: The delta of step t is added before the forward of step t + 1 + staleness.
        link: Slows copies down, in bytes, each direction by itself; default: none does.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        units: Sequence[Unit],
        backend: Backend,
        *,
        learning_rates: Sequence[float],
        weight_decay: float,
        seed: int,
        on_gradients: Callable[[GradientReady], None],
        local_shard: OptimizerShard | None = None,
        refitter: Refitter | None = None,
        measured_step: int = 1,
        staleness: int = 0,
        link: Mapping[WorkStream, TokenBucket] | None = None,
    ) -> None:
        self.model = model
        self.units = units
        self._on_gradients = on_gradients
        self._backend = backend
        self._link = link or {}
        self._learning_rates = learning_rates
        self._weight_decay = weight_decay
        self._seed = seed
        self._rounding = Rounding(seed, backend.device)
        self._local_shard = local_shard
        self._refitter = refitter
        self._reprojections: dict[tuple[int, int], tuple[Reprojection, ...]] = {}
        self._measured_step = measured_step
        self._live: LiveStorage | None = None
        self._mailbox = DeltaMailbox()
        self._payloads: dict[tuple[int, int], _Payload] = {}
        self._payloads_lock = threading.Lock()
        self._step = -1
        self._staleness = staleness
        self._unapplied: list[deque[int]] = [deque() for _ in units]  # unit -> steps whose deltas it has not got yet
        self._missing: list[set[int]] = []  # unit -> positions of targets whose gradient is incomplete; empty: unarmed
        self._waits: list[Wait] = []
        self._trace = ComputeTrace(backend, is_on=False)
        self._add_hooks()

    def run_step(
        self, step: int, micro_batches: Sequence[Batch], host_slots: Sequence[torch.Tensor] = ()
    ) -> StepReport:
        """Run forward and backward of one optimizer update; gradients are announced as they complete.

        Args:
            step: Number of the update, counted from 0.
            micro_batches: Their gradients add up to that of one large batch.
            host_slots: Host memory that does not count as the device's.

        Raises:
            NonFiniteLossError: The loss is NaN or infinite.
            DeadlineError: A delta that this step's forward reads did not come.
        """
        if step != self._measured_step:
            return self._run_step(step, micro_batches)
        with peak_of(self._backend.device, host_slots) as live:
            self._live = live
            report = self._run_step(step, micro_batches)
            self._live = None
        return replace(report, peak_device_bytes=live.peak_bytes)

    def send(self, step: int, unit: int, slot: torch.Tensor) -> tuple[Span, tuple[Reprojection, ...]]:
        """Copy the unit's payload of `step` into the host slot; called on the d2h thread.

        With the span come the matrices that this payload is the first of in a new subspace: their moments must follow
        before the update.
        """
        with self._payloads_lock:
            payload = self._payloads.pop((step, unit))
            reprojections = self._reprojections.pop((step, unit), ())
        payload.fence.synchronize()  # the span then holds the copy alone, not the compute before it
        start_s = time.monotonic()
        self._backend.wait(WorkStream.D2H, payload.fence)
        self._backend.copy_async(WorkStream.D2H, slot, payload.gradient)
        self._backend.record(WorkStream.D2H).synchronize()  # the shard may read the slot, and the payload be freed
        self._slow_down(WorkStream.D2H, slot, start_s)
        span = Span(stream=WorkStream.D2H, step=step, layer=unit, start_s=start_s, end_s=time.monotonic())
        return span, reprojections

    def prefetch(self, step: int, unit: int, slot: torch.Tensor) -> Span:
        """Copy the unit's delta of `step` from the host slot to the device; called on the h2d thread."""
        start_s = time.monotonic()
        delta = self._backend.empty(WorkStream.H2D, slot.numel())
        live = self._live
        if live is not None:
            live.watch(delta)
        self._backend.copy_async(WorkStream.H2D, delta, slot)
        fence = self._backend.record(WorkStream.H2D)
        if WorkStream.H2D in self._link:  # the forward must not get it before its time
            fence.synchronize()
            self._slow_down(WorkStream.H2D, slot, start_s)
        self._mailbox.put(step, unit, ArrivedDelta(delta=delta, fence=fence))
        fence.synchronize()  # on return the slot may be written again
        return Span(stream=WorkStream.H2D, step=step, layer=unit, start_s=start_s, end_s=time.monotonic())

    def _slow_down(self, direction: WorkStream, slot: torch.Tensor, start_s: float) -> None:
        if direction in self._link:
            self._link[direction].take(slot.nbytes, start_s=start_s)

    def abandon(self, error: LspRayError) -> None:
        """Let a forward that waits for a delta, now or later, fail with this error: nobody will bring it."""
        self._mailbox.fail(error)

    def flush(self) -> None:
        """Wait for and add every delta that is still out."""
        for unit in self.units:
            self._apply_pending(unit, up_to=self._step)

    def _run_step(self, step: int, micro_batches: Sequence[Batch]) -> StepReport:
        start_s = time.monotonic()
        self._step = step
        self._waits = []
        self._trace = trace = ComputeTrace(self._backend, is_on=is_traced(step, len(self._learning_rates)))
        if self._refitter is not None:
            self._refitter.before_step(step)
        torch.manual_seed(mixed(self._seed, step))  # dropout depends on the step alone, not on what ran before
        total_targets = max(1, sum(num_targets(batch) for batch in micro_batches))
        mean_loss = forward_s = 0.0
        for position, batch in enumerate(micro_batches):
            forward_start_s = time.monotonic()
            loss = summed_loss(self.model, self._on_device(batch)) / total_targets
            mean_loss += self._checked(float(loss.detach()))  # also waits for the device
            backward_start_s = time.monotonic()
            if position == 0:
                forward_s = backward_start_s - forward_start_s - sum(wait.end_s - wait.start_s for wait in self._waits)
            if position == len(micro_batches) - 1 and self._local_shard is None:
                self._missing = [set(range(len(unit.targets))) for unit in self.units]
            trace.begin_backward()
            loss.backward()
            trace.end_backward()
        grad_square_sum = 0.0
        if self._local_shard is None:
            self._announce_rest()
        else:
            grad_square_sum = self._update_in_place(self._local_shard)
        trace_end = trace.end()
        # without it the next forward's waiting would hold what the device still computes; the first layer's delta
        # needs the end of this backward anyway
        self._backend.record(WorkStream.GPU).synchronize()
        end_s = time.monotonic()
        return StepReport(
            step=step,
            loss=mean_loss,
            num_tokens=sum(num_tokens(batch) for batch in micro_batches),
            start_s=start_s,
            end_s=end_s,
            forward_s=forward_s,
            backward_s=end_s - backward_start_s,
            waits=tuple(self._waits),
            grad_square_sum=grad_square_sum,
            peak_device_bytes=None,
            bias=self._refitter.after_step(step) if self._refitter else None,
            compute=trace.spans(step, trace_end, end_s),
        )

    def _on_device(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {name: tensor.to(self._backend.device) for name, tensor in batch.items()}

    def _checked(self, loss: float) -> float:
        """Stop before the backward: a gradient that is not finite must never reach the optimizer's state."""
        if not math.isfinite(loss):
            learning_rate = self._learning_rates[self._step]
            raise NonFiniteLossError(f"loss of step {self._step} is {loss}; learning_rate was {learning_rate:g} there")
        return loss

    # gradients on their way down

    def _add_hooks(self) -> None:
        for unit in self.units:
            for position, target in enumerate(unit.targets):
                target.leaf.register_post_accumulate_grad_hook(self._note_gradient(unit, position))
            for reader in unit.readers:
                reader.register_forward_pre_hook(self._before_forward(unit))

    def _note_gradient(self, unit: Unit, position: int) -> Callable[[torch.Tensor], None]:
        def note(_leaf: torch.Tensor) -> None:
            if self._missing:  # else an earlier micro-batch: the sum goes on
                missing = self._missing[unit.index]
                missing.discard(position)
                if not missing:
                    self._announce(unit)
            self._trace.gradient_done(unit.index)

        return note

    def _announce(self, unit: Unit) -> None:
        """Gather the unit's gradients into one payload and tell that it is ready."""
        gradient = torch.cat([_taken_gradient(target) for target in unit.targets])
        payload = _Payload(gradient=gradient, fence=self._backend.record(WorkStream.GPU))
        with self._payloads_lock:
            self._payloads[self._step, unit.index] = payload
        unapplied = self._unapplied[unit.index]
        assert len(unapplied) <= self._staleness, f"unit {unit.name} has not got its delta of step {unapplied[0]}"
        unapplied.append(self._step)
        ready = GradientReady(step=self._step, layer=unit.index)
        self._backend.when_passed(payload.fence, lambda: self._on_gradients(ready))

    def _announce_rest(self) -> None:
        """Units that this step's forward did not use in full send zeros for what is missing.

        Adam's moments of such a unit decay, where torch would skip a parameter without a gradient.
        """
        for unit in reversed(self.units):
            if self._missing[unit.index]:
                self._apply_due(unit)  # no forward has asked for it
                self._announce(unit)
        self._missing = []

    # deltas on their way in

    def _before_forward(self, unit: Unit) -> Callable[[nn.Module, object], None]:
        def apply(_module: nn.Module, _args: object) -> None:
            self._apply_due(unit)
            self._trace.begin(Phase.FORWARD, unit.index)

        return apply

    def _apply_due(self, unit: Unit) -> None:
        """Add what the forward of this step must see; once a step, however often the forward runs."""
        switches = self._refitter is not None and self._refitter.has_new(unit.index)
        # deltas made for the old projectors mean nothing to the new ones: none may stay behind
        self._apply_pending(unit, up_to=self._step - 1 - (0 if switches else self._staleness))
        if switches:
            self._switch(unit)

    def _apply_pending(self, unit: Unit, *, up_to: int) -> None:
        """Wait for the unit's deltas of steps ≤ `up_to` and add them in order."""
        unapplied = self._unapplied[unit.index]
        while unapplied and unapplied[0] <= up_to:
            self._apply(unit, unapplied.popleft())

    def _apply(self, unit: Unit, step: int) -> None:
        self._trace.pause()
        ready = self._mailbox.has(step, unit.index)
        start_s = time.monotonic()
        arrived = self._mailbox.take(step, unit.index, timeout_s=DELTA_TIMEOUT_S)
        if not ready:
            self._waits.append(Wait(step=step, layer=unit.index, start_s=start_s, end_s=time.monotonic()))
        self._backend.wait(WorkStream.GPU, arrived.fence)
        self._trace.begin(Phase.APPLY, unit.index)
        self._backend.hand_over(arrived.delta, WorkStream.GPU)
        with torch.no_grad():
            unit.apply(arrived.delta, self._update(step))

    def _switch(self, unit: Unit) -> None:
        """Let new projectors take over: the gradient of the step under way is the first in theirs."""
        assert self._refitter is not None
        reprojections = self._refitter.switch(unit.index)
        with self._payloads_lock:
            self._reprojections[self._step, unit.index] = reprojections

    def _update_in_place(self, shard: OptimizerShard) -> float:
        """Native's update after the backward, one unit at a time; returns the sum of squares of the gradients."""
        square_sum = torch.zeros((), device=self._backend.device)
        update = self._update(self._step)
        with torch.no_grad():
            for unit in self.units:
                self._trace.begin(Phase.APPLY, unit.index)
                gradient = torch.cat([_taken_gradient(target) for target in unit.targets])
                delta = torch.empty_like(gradient)
                square_sum += shard.update(unit.index, gradient, delta, learning_rate=update.learning_rate)
                unit.apply(delta, update)
        return float(square_sum)

    def _update(self, step: int) -> Update:
        return Update(
            step=step,
            learning_rate=self._learning_rates[step],
            weight_decay=self._weight_decay,
            rounding=self._rounding,
        )


def _taken_gradient(target: Target) -> torch.Tensor:
    """The leaf's gradient as flat float32, removed from the leaf; zeros where the forward did not use it."""
    gradient = target.leaf.grad
    target.leaf.grad = None
    if gradient is None:
        return torch.zeros(target.leaf.numel(), device=target.leaf.device)
    return gradient.detach().reshape(-1).float()
