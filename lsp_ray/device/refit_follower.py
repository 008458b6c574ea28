"""RefitFollower: new projectors on GPUs that do not learn them: those that the first GPU did, at the same step."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from lsp_ray.device.switch import Switch, Takeover, takes_over
from lsp_ray.device.unit import Unit
from lsp_ray.errors import DeadlineError

TIMEOUT_S = 600.0  # only a hang lasts so long: the first GPU comes to the same step


class RefitFollower(Switch):
    """Has `Refitter`'s methods; waits, where projectors may take over, for what `take` is given.

    Args:
        units: The trained layers.
        check_every: Steps of a period.
    """

    def __init__(self, units: Sequence[Unit], check_every: int) -> None:
        super().__init__(units, check_every)
        self._given: queue.SimpleQueue[Takeover] = queue.SimpleQueue()

    def take(self, takeover: Takeover) -> None:
        """Called on any thread."""
        self._given.put(takeover)

    def before_step(self, step: int) -> None:
        """See `Refitter`.

        Raises:
            DeadlineError: Nothing was given in time.
        """
        if not takes_over(step, self._check_every):
            return
        try:
            takeover = self._given.get(timeout=TIMEOUT_S)
        except queue.Empty:
            raise DeadlineError(f"no projectors for step {step} within {TIMEOUT_S:.0f} s") from None
        assert takeover.step == step, f"projectors of step {takeover.step} in step {step}"
        self.take_over(takeover.projectors)

    def looking_away(self) -> AbstractContextManager[None]:
        """See `Refitter`."""
        return nullcontext()

    def after_step(self, _step: int) -> None:
        """See `Refitter`: nothing is measured here."""
