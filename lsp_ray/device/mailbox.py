"""DeltaMailbox: deltas that have come up to the device, until the forward takes them."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch

from lsp_ray.device.backend import Fence
from lsp_ray.errors import DeadlineError, LspRayError


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrivedDelta:
    """A unit's encoded delta on the device, complete once `fence` is passed; void, it is not to be added."""

    delta: torch.Tensor
    fence: Fence
    is_void: bool = False


class DeltaMailbox:
    """Filled by the h2d thread, emptied by the compute thread; holds one delta a unit, where updates are stale two."""

    def __init__(self) -> None:
        self._arrived: dict[tuple[int, int], ArrivedDelta] = {}
        self._changed = threading.Condition()
        self._error: LspRayError | None = None

    def put(self, step: int, unit: int, arrived: ArrivedDelta) -> None:
        """Leave the delta that `step` made for `unit`."""
        with self._changed:
            assert (step, unit) not in self._arrived, f"delta of unit {unit} of step {step} came up twice"
            self._arrived[step, unit] = arrived
            self._changed.notify_all()

    def fail(self, error: LspRayError) -> None:
        """Make every `take` raise this error from now on."""
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def has(self, step: int, unit: int) -> bool:
        """Whether `take` would return at once."""
        with self._changed:
            return (step, unit) in self._arrived

    def waiting(self) -> dict[tuple[int, int], ArrivedDelta]:
        """What is there and not yet taken, by (step, unit)."""
        with self._changed:
            return dict(self._arrived)

    def take(self, step: int, unit: int, *, timeout_s: float) -> ArrivedDelta:
        """Wait for the delta that `step` made for `unit` and remove it.

        Raises:
            DeadlineError: It did not come within `timeout_s`.
            LspRayError: What `fail` was given.
        """
        with self._changed:
            came = self._changed.wait_for(lambda: (step, unit) in self._arrived or self._error is not None, timeout_s)
            if self._error is not None:
                raise self._error
            if not came:
                raise DeadlineError(f"no delta of step {step} for unit {unit} came up within {timeout_s:.0f} s")
            return self._arrived.pop((step, unit))
