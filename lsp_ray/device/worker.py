"""DeviceWorker: runs steps on the device and exchanges payloads with slots. Knows nothing of Ray.

Three threads call it: compute (`run_step`, `flush` and everything else), d2h (`send`) and h2d (`prefetch`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import chain

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from lsp_ray.device.backend import Backend, Stamp
from lsp_ray.device.block_graphs import BlockGraphs
from lsp_ray.device.compute_trace import ComputeTrace
from lsp_ray.device.deltas import Deltas
from lsp_ray.device.host_activations import HostActivations
from lsp_ray.device.judge import Judge, Verdict
from lsp_ray.device.link import Link
from lsp_ray.device.local_updates import judged, update_in_place
from lsp_ray.device.memory import LiveStorage, peak_of
from lsp_ray.device.payloads import Payloads
from lsp_ray.device.refit import Refitter
from lsp_ray.device.refit_follower import RefitFollower
from lsp_ray.device.rounding import Rounding, mixed
from lsp_ray.device.step_report import StepReport
from lsp_ray.device.streamed_weights import StreamedStep, StreamedWeights
from lsp_ray.device.token_bucket import TokenBucket
from lsp_ray.device.unit import Unit, Update
from lsp_ray.errors import LspRayError
from lsp_ray.models.loss import Batch, num_targets, num_tokens, summed_loss
from lsp_ray.optim.codec import Codec
from lsp_ray.optim.reproject import Reprojection
from lsp_ray.optim.shard import OptimizerShard
from lsp_ray.schedule.ops import DeltaDue, GradientReady
from lsp_ray.trace import Phase, Span, WorkStream, is_traced


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
        on_due: Told, on the compute thread, of every delta that is to be added now; default: nobody is.
        local_shard: Optimizer state on the device (native): gradients then go nowhere else.
        refitter: Renews projectors while training.
        judge: Clips and skips; default: does neither, and a step that is not finite is an error.
        measured_step: The step over which `peak_device_bytes` is measured.
        staleness: The delta of step t is added before the forward of step t + 1 + staleness.
        codec: Of what crosses the link; default: float32 as it is.
        graphs: Whether blocks are launched as graphs where they can be.
        num_parts: Equal parts of a step, each of which is sent by itself.
        own_parts: Those that are computed here, in order; default: all.
        weights: The blocks' frozen weights, where they come up behind the compute; default: they are on the device.
        limit_bytes: On a CPU, of tensors that may be alive in a step; default: any number.
        activations: The blocks' inputs, where they wait in main memory, on the link of `weights`; default: likewise.
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
        on_due: Callable[[DeltaDue], None] | None = None,
        local_shard: OptimizerShard | None = None,
        refitter: Refitter | RefitFollower | None = None,
        judge: Judge | None = None,
        measured_step: int = 1,
        staleness: int = 0,
        codec: Codec | None = None,
        graphs: bool = False,
        num_parts: int = 1,
        own_parts: range | None = None,
        weights: StreamedWeights | None = None,
        limit_bytes: int | None = None,
        activations: HostActivations | None = None,
    ) -> None:
        self.model, self.units = model, units
        self._backend = backend
        self._learning_rates = learning_rates
        self._weight_decay = weight_decay
        self._seed = seed
        self._rounding = Rounding(seed, backend.device)
        self._local_shard = local_shard
        self._refitter = refitter
        self._judge = judge or Judge(units)
        self._reprojections: dict[int, tuple[Reprojection, ...]] = {}  # unit -> what its next payload brings
        self._measured_step = measured_step
        self._limit_bytes = limit_bytes
        self._live: LiveStorage | None = None
        self._on_due = on_due
        self._codec = codec = codec or Codec()
        self.weights, self.activations = weights, activations
        self._moved = [each for each in (weights, activations) if each is not None]
        self._up_link = weights.link if weights is not None else activations.up if activations is not None else Link()
        self._down_link = Link() if activations is None else activations.down
        due = self._moved[0].delta_due if self._moved else lambda _step, _unit: 0
        self._deltas = Deltas(
            units,
            backend,
            codec,
            update_of=self._update,
            staleness=staleness,
            on_due=on_due,
            link=self._up_link,
            due=due,
        )
        self._payloads = Payloads(
            backend,
            on_gradients,
            codec,
            self._rounding,
            self._judge.see,
            link=self._down_link,
            due=lambda made, unit: due(made + 1 + staleness, unit),  # when its delta is
        )
        self._num_parts = num_parts
        self._own_parts = range(num_parts) if own_parts is None else own_parts
        self._step, self._part = -1, 0
        self._staleness = staleness
        self._missing: list[set[int]] = []  # unit -> positions of targets whose gradient is incomplete; empty: unarmed
        self._trace = ComputeTrace(backend, is_on=False)
        self._hooks = self._add_hooks()
        self._graphs = BlockGraphs(units, backend, self._take_gradients) if graphs else None

    def slow_down(self, link: Mapping[WorkStream, TokenBucket]) -> None:
        """While nothing is copied: slow down later copies, in bytes, each direction that is named by itself."""
        self._down_link.bucket = link.get(WorkStream.D2H)
        self._up_link.bucket = link.get(WorkStream.H2D)

    def run_step(
        self, step: int, micro_batches: Sequence[Batch], host_slots: Sequence[torch.Tensor] = ()
    ) -> StepReport:
        """Run forward and backward of one optimizer update; gradients are announced as they complete.

        Args:
            step: Number of the update, counted from 0.
            micro_batches: Of the whole step: all parts' in order, as many each. Their gradients add up to that of one
                large batch.
            host_slots: Host memory that does not count as the device's.

        Raises:
            NonFiniteLossError: The loss is NaN or infinite, and the judge does not skip; noticed after the backward.
            NonFiniteGradientError: The same of a gradient.
            DeadlineError: A delta that this step's forward reads did not come.
            torch.OutOfMemoryError: The device's memory, or what may be taken of it, is full.
        """
        if step != self._measured_step and self._limit_bytes is None:
            return self._run_step(step, micro_batches)
        on_host = [*host_slots, *chain.from_iterable(moved.host_bytes for moved in self._moved)]
        with peak_of(self._backend.device, on_host, self._limit_bytes) as live:
            self._live = live
            report = self._run_step(step, micro_batches)
            self._live = None
        return replace(report, peak_device_bytes=live.peak_bytes) if step == self._measured_step else report

    def send(self, step: int, unit: int, slot: torch.Tensor, part: int = 0) -> tuple[Span, tuple[Reprojection, ...]]:
        """Copy the unit's payload of a part of `step` into the host slot; called on the d2h thread.

        With the span come the matrices that this payload is the first of in a new subspace: their moments must follow
        before the update.
        """
        return self._payloads.send(step, unit, slot, part)

    def prefetch(self, step: int, unit: int, slot: torch.Tensor, *, is_void: bool = False) -> Span:
        """Copy the unit's delta of `step` from the host slot to the device; called on the h2d thread.

        Void is what comes of a step that is skipped: it is not added, and weights do not decay.
        """
        live = self._live
        return self._deltas.prefetch(step, unit, slot, live.watch if live is not None else None, is_void=is_void)

    def abandon(self, error: LspRayError) -> None:
        """Let a forward that waits for a delta, now or later, fail with this error: nobody will bring it."""
        self._deltas.abandon(error)

    def flush(self) -> None:
        """Wait for and add every delta that is still out."""
        for unit in self.units:
            self._deltas.apply(unit, up_to=self._step)

    def drain(self) -> None:
        """After a step that no other follows for now: let all deltas come up, and add what the next forward would."""
        for unit in self.units:
            self._deltas.apply(unit, up_to=self._step - self._staleness)
        if self._staleness and self._on_due is not None:
            self._on_due(DeltaDue(step=self._step, layer=len(self.units) - 1))

    def is_before(self, step: int) -> bool:
        """Whether the gradients of `step` have all been sent, and none of its deltas is added."""
        return self._deltas.is_before(step)

    def settle(self) -> dict[tuple[int, int], torch.Tensor]:
        """Between two steps: add what the next forward would add first; return a copy of what it would not add yet.

        By (step, unit): the deltas that a stale policy keeps back, as they came up, on the CPU; empty for a skipped
        step, of which nothing is to be added.
        """
        for unit in self.units:
            self._deltas.apply(unit, up_to=self._step - self._staleness)
        return self._deltas.kept_back()

    def resume(self, step: int, kept_back: Mapping[tuple[int, int], torch.Tensor]) -> None:
        """Before the first step: go on at `step`, with what `settle` returned."""
        self._step = step - 1
        for (made, index), delta in sorted(kept_back.items()):
            if not delta.numel():
                continue
            self._deltas.expect(made, self.units[index])
            self.prefetch(made, index, delta)

    def close(self) -> None:
        """Take the hooks off the model: Python's collector does not see those of parameters, so they keep it alive."""
        for hook in self._hooks:
            hook.remove()
        if self._graphs is not None:
            self._graphs.close()
        for moved in self._moved:
            moved.close()

    def _run_step(self, step: int, micro_batches: Sequence[Batch]) -> StepReport:
        start_s = time.monotonic()
        self._step = step
        self._trace = trace = ComputeTrace(self._backend, is_on=is_traced(step, len(self._learning_rates)))
        waits = self._deltas.begin_step(trace)
        if self._refitter is not None:
            self._refitter.before_step(step)
        total_targets = max(1, sum(num_targets(batch) for batch in micro_batches))
        size = len(micro_batches) // self._num_parts
        for moved in self._moved:
            moved.begin_step(step, size * len(self._own_parts), trace)
        parts = {part: micro_batches[part * size : (part + 1) * size] for part in self._own_parts}
        forward: tuple[Stamp, float] | None = None
        began = self._backend.stamp()
        for part, batches in parts.items():
            with self._begun(part):
                for position, batch in enumerate(batches):
                    forward_end = self._pass(batch, size, total_targets, is_last=position == size - 1)
                    forward = forward or (forward_end, sum(wait.end_s - wait.start_s for wait in waits))
                self._announce_rest()
        assert forward is not None, "a step has parts, and a part micro-batches"
        verdict = self._conclude()
        trace_end = trace.end()
        # without it the next forward's waiting would hold what the device still computes; the first layer's delta
        # needs the end of this backward anyway
        self._backend.record(WorkStream.GPU).synchronize()
        self._payloads.settle()
        end_s = time.monotonic()
        weights, activations = (
            StreamedStep() if moved is None else moved.end_step(step, trace_end, end_s)
            for moved in (self.weights, self.activations)
        )
        return StepReport(
            step=step,
            losses=verdict.losses,
            num_tokens=sum(num_tokens(batch) for batches in parts.values() for batch in batches),
            start_s=start_s,
            end_s=end_s,
            forward_s=began.seconds_until(forward[0]) - forward[1],
            backward_s=forward_end.seconds_until(trace_end),
            waits=tuple(waits),
            grad_norm=verdict.grad_norm,
            grad_scale=verdict.grad_scale,
            peak_device_bytes=None,
            bias=self._refitter.after_step(step) if self._refitter else None,
            compute=trace.spans(step, trace_end, end_s),
            notes=self._graphs.refusals() if self._graphs is not None else (),
            weights=weights,
            activations=activations,
        )

    def _begun(self, part: int) -> AbstractContextManager[None]:
        """Begin a part; within the context it is computed. Projectors are measured and learned on the first alone.

        As much data as a step of one part has, and the same whoever computes the others.
        """
        self._part = part
        self._judge.begin(part)
        # dropout depends on step and part alone, not on what ran before
        torch.manual_seed(mixed(self._seed, self._step, *([part] if part else [])))
        return self._refitter.looking_away() if part and self._refitter is not None else nullcontext()

    def _pass(self, batch: Batch, size: int, total_targets: int, *, is_last: bool) -> Stamp:
        """Forward and backward of a micro-batch, of so many in a part; returns the end of the forward."""
        if self._graphs is not None:
            may_record = self._step > self._measured_step
            self._graphs.begin(batch, may_record=may_record, payload_dtype=self._flat_dtype(size))
        for moved in self._moved:
            moved.begin_pass()
        loss = summed_loss(self.model, self._on_device(batch)) / total_targets
        weight = self._judge.weigh(loss)
        forward_end = self._backend.stamp()
        if is_last:
            self._arm()
        self._trace.begin_backward()
        loss.backward(weight)
        self._trace.end_backward()
        return forward_end

    def _on_device(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {name: tensor.to(self._backend.device, non_blocking=True) for name, tensor in batch.items()}

    def _flat_dtype(self, num_micro_batches: int) -> torch.dtype | None:
        """Of gradients that a graph leaves: as they are sent, or as they are added up."""
        is_sent = num_micro_batches == 1 and self._local_shard is None and not self._codec.is_coarse
        return self._codec.dtype if is_sent else None

    def _conclude(self) -> Verdict:
        """After the last backward: judge the step, and make the updates that are made here."""
        update = self._update(self._step)
        if self._local_shard is None:
            is_whole = self._num_parts == 1
            return self._judge.verdict(self._step, update.learning_rate, is_whole=is_whole)
        verdict = judged(self._judge, self.units, update)
        scale = verdict.grad_scale
        update_in_place(self._local_shard, self.units, update, scale, self._backend, self._trace)
        return verdict

    # gradients on their way down

    def _arm(self) -> None:
        """From now on a unit's gradients are announced as they come."""
        if self._local_shard is None:
            self._missing = [set(range(len(unit.targets))) for unit in self.units]

    def _add_hooks(self) -> list[RemovableHandle]:
        hooks = []
        for unit in self.units:
            for position, target in enumerate(unit.targets):
                hooks.append(target.leaf.register_post_accumulate_grad_hook(self._note_gradient(unit, position)))
            hooks += [reader.register_forward_pre_hook(self._before_forward(unit)) for reader in unit.readers]
        return hooks

    def _note_gradient(self, unit: Unit, position: int) -> Callable[[torch.Tensor], None]:
        def note(_leaf: torch.Tensor) -> None:
            if self._missing:  # else an earlier micro-batch: the sum goes on
                missing = self._missing[unit.index]
                missing.discard(position)
                if not missing:
                    self._announce(unit)
            self._trace.gradient_done(unit.index)

        return note

    def _announce(self, unit: Unit, flat: torch.Tensor | None = None) -> None:
        """Gather the unit's gradients, at the leaves or in `flat`, into one payload and tell that it is ready."""
        if self._part == self._own_parts[0]:
            self._deltas.expect(self._step, unit)
        self._payloads.announce(self._step, unit, self._reprojections.pop(unit.index, ()), flat, self._part)

    def _take_gradients(self, unit: Unit, flat: torch.Tensor) -> None:
        """What the hooks do, for gradients that a graph left in one piece, all of the unit's at once."""
        is_whole = bool(self._missing) and all(target.leaf.grad is None for target in unit.targets)
        if not is_whole:
            unit.add_gradient(flat)
        if self._missing:
            self._missing[unit.index].clear()
            self._announce(unit, flat if is_whole else None)
        self._trace.gradient_done(unit.index)

    def _announce_rest(self) -> None:
        """Units that this part's forward did not use in full send zeros for what is missing.

        Adam's moments of such a unit decay, where torch would skip a parameter without a gradient.
        """
        for unit in reversed(self.units if self._missing else ()):
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
        self._deltas.apply(unit, up_to=self._step - 1 - (0 if switches else self._staleness))
        if switches:
            self._switch(unit)

    def _switch(self, unit: Unit) -> None:
        """Let new projectors take over: the gradient of the step under way is the first in theirs."""
        assert self._refitter is not None
        self._reprojections[unit.index] = self._refitter.switch(unit.index)

    def _update(self, step: int) -> Update:
        return Update(
            step=step,
            learning_rate=self._learning_rates[step],
            weight_decay=self._weight_decay,
            rounding=self._rounding,
        )
