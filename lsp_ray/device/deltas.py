"""Deltas: brings what the shards answered up to the device and adds it before the forward that reads it.

Two threads call it: h2d (`prefetch`) and compute (everything else).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

import torch

from lsp_ray.device.backend import Backend
from lsp_ray.device.compute_trace import ComputeTrace
from lsp_ray.device.link import Link
from lsp_ray.device.mailbox import ArrivedDelta, DeltaMailbox
from lsp_ray.device.unit import Unit, Update
from lsp_ray.errors import LspRayError
from lsp_ray.optim.codec import Codec
from lsp_ray.schedule.ops import DeltaDue
from lsp_ray.trace import Phase, Span, Wait, WorkStream

DELTA_TIMEOUT_S = 600.0  # only a hang lasts so long: a dead actor is noticed by the driver at once


class Deltas:
    """Knows which steps' deltas each unit has not got yet.

    Args:
        units: The trained layers.
        backend: Copies and fences.
        codec: Of the deltas.
        update_of: What applying the deltas of a step needs.
        staleness: Deltas that a unit may lack when its gradient is complete, beside that gradient's own.
        on_due: Told of every delta whose turn has come, before it is waited for.
        link: To take turns on; default: one for itself.
        due: The deadline on it of a unit's delta that is added in a step's forward; default: all are alike.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        backend: Backend,
        codec: Codec,
        *,
        update_of: Callable[[int], Update],
        staleness: int,
        on_due: Callable[[DeltaDue], None] | None = None,
        link: Link | None = None,
        due: Callable[[int, int], int] = lambda _step, _unit: 0,
    ) -> None:
        self._backend, self._codec = backend, codec
        self._update_of = update_of
        self._staleness = staleness
        self._on_due = on_due
        self._link, self._due = link or Link(), due
        self._mailbox = DeltaMailbox()
        self._unapplied: list[deque[int]] = [deque() for _ in units]  # unit -> steps whose deltas it has not got yet
        self._trace = ComputeTrace(backend, is_on=False)
        self._waits: list[Wait] = []

    def begin_step(self, trace: ComputeTrace) -> list[Wait]:
        """Note the spans of adding in `trace`; returns the list that gets the waits of the step."""
        self._trace, self._waits = trace, []
        return self._waits

    def expect(self, step: int, unit: Unit) -> None:
        """Say that the gradient of `step` goes down, so that a delta will come up."""
        unapplied = self._unapplied[unit.index]
        assert len(unapplied) <= self._staleness, f"unit {unit.name} has not got its delta of step {unapplied[0]}"
        unapplied.append(step)

    def prefetch(
        self,
        step: int,
        unit: int,
        slot: torch.Tensor,
        watch: Callable[[torch.Tensor], None] | None,
        *,
        is_void: bool = False,
    ) -> Span:
        """Copy the unit's delta of `step` from the host slot to the device; called on the h2d thread.

        `watch` is shown the device's buffer. Void is what comes of a step that is skipped: nothing is added, nor lost
        to weight decay.
        """
        with self._link.turn(self._due(step + 1 + self._staleness, unit)):
            start_s = time.monotonic()
            delta = self._backend.empty(WorkStream.H2D, slot.numel(), slot.dtype)
            if watch is not None:
                watch(delta)
            self._backend.copy_async(WorkStream.H2D, delta, slot)
            fence = self._backend.record(WorkStream.H2D)
            self._link.pace(fence, slot.nbytes, start_s=start_s)  # the forward must not get it before its time
            self._mailbox.put(step, unit, ArrivedDelta(delta=delta, fence=fence, is_void=is_void))
            fence.synchronize()  # on return the slot may be written again
            return Span(stream=WorkStream.H2D, step=step, layer=unit, start_s=start_s, end_s=time.monotonic())

    def apply(self, unit: Unit, *, up_to: int) -> None:
        """Wait for the unit's deltas of steps ≤ `up_to` and add them in order.

        Raises:
            DeadlineError: One did not come.
            LspRayError: What `abandon` was given.
        """
        unapplied = self._unapplied[unit.index]
        while unapplied and unapplied[0] <= up_to:
            self._apply(unit, unapplied[0])
            unapplied.popleft()

    def is_before(self, step: int) -> bool:
        """Whether every unit expects the delta of `step` and has added it not yet."""
        return all(list(unapplied) == [step] for unapplied in self._unapplied)

    def kept_back(self) -> dict[tuple[int, int], torch.Tensor]:
        """The deltas that have come and are not added yet, by (step, unit): encoded, on the CPU; empty if void."""
        copies = {}
        for key, arrived in self._mailbox.waiting().items():
            arrived.fence.synchronize()
            with self._backend.launch(WorkStream.GPU, reads=(arrived.delta,)):
                copies[key] = arrived.delta.cpu()
            if arrived.is_void:
                copies[key] = copies[key].new_empty(0)
        return copies

    def abandon(self, error: LspRayError) -> None:
        """Let whoever waits for a delta, now or later, fail with this error: nobody will bring it."""
        self._mailbox.fail(error)

    def _apply(self, unit: Unit, step: int) -> None:
        self._trace.pause()
        if self._on_due is not None:
            self._on_due(DeltaDue(step=step, layer=unit.index))
        ready = self._mailbox.has(step, unit.index)
        start_s = time.monotonic()
        arrived = self._mailbox.take(step, unit.index, timeout_s=DELTA_TIMEOUT_S)
        if not ready:
            self._waits.append(Wait(step=step, layer=unit.index, start_s=start_s, end_s=time.monotonic()))
        self._backend.wait(WorkStream.GPU, arrived.fence)
        self._trace.begin(Phase.APPLY, unit.index)
        self._backend.hand_over(arrived.delta, WorkStream.GPU)
        if not arrived.is_void:
            with torch.no_grad(), self._backend.launch(WorkStream.GPU, reads=(arrived.delta,)):
                unit.apply(self._codec.decode(arrived.delta, unit.numel), self._update_of(step))
