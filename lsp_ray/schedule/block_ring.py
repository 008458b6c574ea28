"""BlockRing: which blocks' weights are on the device where only a few fit, and which come up next.

A micro-batch uses the blocks from shallow to deep, forward, and back again, backward; then the next one does. Between
the two it uses the pieces of the output embedding that come up, which count as blocks that are used once. So each one's
next use is known: what is needed first comes up first, in the place of what is needed last (Belady, "A study of
replacement algorithms for a virtual-storage computer", 1966), as early as that costs no copy more (Cao, Felten, Karlin
and Li, "A study of integrated prefetching and caching strategies", 1995). Deadlines are numbers of uses, see `Uses`.
"""

from __future__ import annotations

from dataclasses import dataclass

from lsp_ray.schedule.uses import Uses

FEWEST_BUFFERS = 2  # one is read while the other one is written
INPUT_BUFFERS = 2  # the same of blocks' inputs


def parked_blocks(num_blocks: int) -> range:
    """The blocks whose input leaves the device where it waits in main memory.

    The first one's stays, as torch holds it in any case, and the last ones', which the backward needs at once.
    """
    return range(1, max(1, num_blocks - INPUT_BUFFERS))


@dataclass(frozen=True, slots=True, kw_only=True)
class Bring:
    """Bring a block's weights up into a buffer, where `evicts` were (None: nothing); use number `due` needs them."""

    block: int
    buffer: int
    evicts: int | None
    due: int


class BlockRing:
    """Knows where the compute is, and what each buffer holds or is about to hold.

    Args:
        num_blocks: Of the model.
        num_buffers: Blocks whose weights are on the device at one time, at least 2.
        num_pieces: Of the output embedding, numbered from `num_blocks` on.

    Attributes:
        at: The block that computes, whose weights never leave; None before the first.
    """

    def __init__(self, num_blocks: int, num_buffers: int, num_pieces: int = 0) -> None:
        assert num_buffers >= FEWEST_BUFFERS, num_buffers
        self._num_blocks, self._num_all = num_blocks, num_blocks + num_pieces
        self._held: list[int | None] = [None] * min(num_buffers, self._num_all)
        self.at: int | None = None
        self._is_backward = False
        self._uses = Uses(num_blocks, num_pieces)

    def begin_step(self, step: int, num_passes: int) -> None:
        """So many micro-batches follow, those of `step`."""
        self._uses.begin_step(step, num_passes)

    def begin_pass(self) -> None:
        """A micro-batch's forward follows."""
        self._uses.begin_pass()
        self._is_backward = False

    def use(self, block: int, *, backward: bool) -> bool:
        """The compute has come to a block; returns whether it is another one than before.

        A forward that is run again in the backward of the same block is no use of its own.
        """
        is_another = block != self.at
        self._is_backward = backward or (self._is_backward and not is_another)
        self.at = block
        return is_another

    def wanted(self) -> Bring | None:
        """What is to come up next; None while all that is here is needed sooner.

        What it replaces is what would be as late as can be, while the block before computes; as soon as that is needed
        no more until then. So nothing comes up early in the place of what would come up again.
        """
        absent = (block for block in range(self._num_all) if block not in self._held)
        block = min(absent, key=self._distance, default=None)
        if block is None:
            return None
        distance = self._distance(block)
        due = self._uses.number(self.at or 0, backward=self._is_backward) + distance
        if None in self._held:
            return Bring(block=block, buffer=self._held.index(None), evicts=None, due=due)
        held = [each for each in self._held if each is not None]
        last = max(held, key=lambda each: self._distance(each, after=max(0, distance - 1)))
        if self._distance(last) < distance:
            return None
        return Bring(block=block, buffer=self._held.index(last), evicts=last, due=due)

    def begin(self, bring: Bring) -> None:
        """What was wanted is on its way."""
        assert self._held[bring.buffer] == bring.evicts, "the buffer holds something else by now"
        self._held[bring.buffer] = bring.block

    def buffer_of(self, block: int) -> int:
        """Where a block's weights are."""
        return self._held.index(block)

    def delta_due(self, step: int, block: int) -> int:
        """See `Uses`."""
        return self._uses.delta_due(step, block)

    def _distance(self, block: int, after: int = 0) -> int:
        """Uses from now until the block's next one, so many or more; 0 for the one under way."""
        per_pass = self._num_blocks + self._num_all
        at = self.at or 0
        start = (per_pass - 1 - at if self._is_backward else at) + after
        backward = per_pass - 1 - block if block < self._num_blocks else block
        return after + min((block - start) % per_pass, (backward - start) % per_pass)
