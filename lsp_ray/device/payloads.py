"""Payloads: encodes each unit's gradients once they are complete and brings them down to the unit's slot.

Two threads call it: d2h (`send`) and compute (everything else).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from lsp_ray.device.backend import Backend, Fence
from lsp_ray.device.link import Link
from lsp_ray.device.rounding import Rounding
from lsp_ray.device.unit import Unit
from lsp_ray.optim.codec import Codec
from lsp_ray.optim.reproject import Reprojection
from lsp_ray.projection.block_factor import is_launched
from lsp_ray.schedule.ops import GradientReady
from lsp_ray.trace import Span, WorkStream

_UNIT_BITS = 24  # units are fewer than 2 to this


@dataclass(frozen=True, slots=True, kw_only=True)
class _Payload:
    gradient: torch.Tensor
    fence: Fence
    reprojections: tuple[Reprojection, ...]


class Payloads:
    """Holds each unit's payload between the backward that made it and the copy that takes it away.

    Args:
        backend: Copies and fences.
        on_gradients: Told, on any thread, that a payload is ready to be sent.
        codec: Of the payloads.
        rounding: Has the noise for coarse ones.
        see: Shown each unit's gradients as they are sent, on the compute stream.
        link: To take turns on; default: one for itself.
        due: The deadline on it of a unit's payload of a step; default: all are alike.
    """

    def __init__(
        self,
        backend: Backend,
        on_gradients: Callable[[GradientReady], None],
        codec: Codec,
        rounding: Rounding,
        see: Callable[[Unit, Sequence[torch.Tensor]], None],
        *,
        link: Link | None = None,
        due: Callable[[int, int], int] = lambda _step, _unit: 0,
    ) -> None:
        self._backend = backend
        self._on_gradients = on_gradients
        self._codec, self._rounding, self._see = codec, rounding, see
        self._link, self._due = link or Link(), due
        self._payloads: dict[tuple[int, int, int], _Payload] = {}  # by step, unit and part
        self._announcements: list[Future[None]] = []
        self._lock = threading.Lock()

    def announce(
        self,
        step: int,
        unit: Unit,
        reprojections: tuple[Reprojection, ...],
        flat: torch.Tensor | None = None,
        part: int = 0,
    ) -> None:
        """Gather the unit's gradients and tell that they are ready.

        Args:
            step: Whose gradients they are.
            unit: The layer.
            reprojections: The matrices of which this payload is the first in a new subspace.
            flat: The gradients, where they are not at the leaves.
            part: Of the step.
        """
        fence = self._gather(step, unit, reprojections, flat, part)
        ready = GradientReady(step=step, layer=unit.index, part=part)
        self._announcements.append(self._backend.when_passed(fence, lambda: self._on_gradients(ready)))

    def settle(self) -> None:
        """Wait until all that was announced is told, and raise what failed there: nobody else would hear of it."""
        announcements, self._announcements = self._announcements, []
        for told in announcements:
            told.result()

    def send(self, step: int, unit: int, slot: torch.Tensor, part: int = 0) -> tuple[Span, tuple[Reprojection, ...]]:
        """Copy the unit's payload of a part of `step` into the host slot; called on the d2h thread.

        With the span comes what `announce` was given: these moments must follow before the update.
        """
        with self._lock:
            payload = self._payloads.pop((step, unit, part))
        payload.fence.synchronize()  # the span then holds the copy alone, not the compute before it
        with self._link.turn(self._due(step, unit)):
            start_s = time.monotonic()
            self._backend.wait(WorkStream.D2H, payload.fence)
            self._backend.copy_async(WorkStream.D2H, slot, payload.gradient)
            fence = self._backend.record(WorkStream.D2H)
            self._link.pace(fence, slot.nbytes, start_s=start_s)
            fence.synchronize()  # the shard may read the slot, and the payload be freed
            end_s = time.monotonic()
        span = Span(stream=WorkStream.D2H, step=step, layer=unit, start_s=start_s, end_s=end_s, part=part)
        return span, payload.reprojections

    def _gather(
        self, step: int, unit: Unit, reprojections: tuple[Reprojection, ...], flat: torch.Tensor | None, part: int
    ) -> Fence:
        """Apart from `announce`: once `send` may run, `send` alone must hold the buffer and decide when it goes."""
        gradient = self._backend.empty(WorkStream.GPU, self._codec.wire_numel(unit.numel), self._codec.dtype)
        with self._backend.launch(WorkStream.GPU, writes=(gradient,)), torch.no_grad():
            if self._codec.is_coarse:
                # a key of its own: those of targets, which round weights, begin at 0
                bits = self._rounding.noise(step=step, key=-1 - unit.index - (part << _UNIT_BITS))
                whole = unit.take_gradient() if flat is None else flat
                self._codec.encode_(gradient, whole, bits)
                self._see(unit, unit.split(whole))
            else:  # rounds as it gathers: no float32 copy of all of it exists
                if flat is None:
                    unit.take_gradient(gradient)
                else:
                    gradient.copy_(flat)
                # where launches count, the norm of all of it: one, where those of its parts take three
                self._see(unit, [gradient] if is_launched(gradient) else unit.split(gradient))
        fence = self._backend.record(WorkStream.GPU)
        with self._lock:
            self._payloads[step, unit.index, part] = _Payload(
                gradient=gradient, fence=fence, reprojections=reprojections
            )
        return fence
