"""Uses: numbers of what the compute does with a model's blocks, through all micro-batches.

A micro-batch uses the blocks from shallow to deep, forward, the pieces of the output embedding that come up, once, and
the blocks back again, backward. The numbers are deadlines of what crosses the link: whatever an earlier use needs goes
first.
"""

from __future__ import annotations


class Uses:
    """Counts micro-batches.

    Args:
        num_blocks: Of the model.
        num_pieces: Of its output embedding, whose numbers follow the blocks'; 0: it is on the device.
    """

    def __init__(self, num_blocks: int, num_pieces: int = 0) -> None:
        self._per_pass = 2 * num_blocks + num_pieces
        self._pass = -1  # number of the micro-batch
        self._step, self._first_pass, self._num_passes = 0, 0, 1

    def begin_step(self, step: int, num_passes: int) -> None:
        """So many micro-batches follow, those of `step`."""
        self._step, self._first_pass, self._num_passes = step, self._pass + 1, num_passes

    def begin_pass(self) -> None:
        """A micro-batch's forward follows."""
        self._pass += 1

    def number(self, block: int, *, backward: bool) -> int:
        """Of a block's use in the micro-batch under way, or of a piece's."""
        return self._per_pass * self._pass + (self._per_pass - 1 - block if backward else block)

    def delta_due(self, step: int, block: int) -> int:
        """Of the use that reads first what the delta changes that a forward of `step` adds to a block."""
        return self._per_pass * (self._first_pass + (step - self._step) * self._num_passes) + block
