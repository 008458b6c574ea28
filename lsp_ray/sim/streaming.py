"""In a simulation: which blocks' weights a GPU has, and what its link brings up next."""

from __future__ import annotations

from lsp_ray.schedule.block_ring import BlockRing
from lsp_ray.schedule.ops import Op
from lsp_ray.sim.copies import Copy
from lsp_ray.sim.costs import StepCosts
from lsp_ray.sim.device_plan import DeviceTask
from lsp_ray.trace import Cause, Phase, Span, Wait, WorkStream


class StreamingGpu:
    """A GPU's `BlockRing`, and what of it has arrived; see `sim.copies.Mover`.

    Args:
        gpu: Its number.
        costs: Of a step; layers whose weights take time to come up are the blocks, behind which pieces of the output
            embedding follow.
        num_passes: Micro-batches of a step that the GPU computes.
        staleness: Steps by which deltas are late on purpose.
    """

    def __init__(self, gpu: int, costs: StepCosts, num_passes: int, staleness: int) -> None:
        self.spans: list[Span] = []
        self.waits: list[Wait] = []
        self._gpu = gpu
        self._num_passes, self._staleness = num_passes, staleness
        self._layers = [layer for layer, cost in enumerate(costs.layers) if cost.weights_s > 0.0]
        self._blocks = {layer: block for block, layer in enumerate(self._layers)}
        self._ring = BlockRing(len(self._layers), costs.num_buffers, len(costs.pieces_s))
        self._seconds = [*(costs.layers[layer].weights_s for layer in self._layers), *costs.pieces_s]
        self._layers += [len(costs.layers) - 1] * len(costs.pieces_s)
        self._here: set[int] = set()
        self._coming: int | None = None
        self._step = -1
        self._lacking: tuple[int, DeviceTask, float] | None = None  # a block, for what, and since when

    def enter(self, task: DeviceTask, now_s: float) -> bool:
        """See `Mover`."""
        if task.opens_pass:
            if task.step != self._step:
                self._step = task.step
                self._ring.begin_step(task.step, self._num_passes)
            self._ring.begin_pass()
        block = self._blocks.get(task.layer) if task.piece is None else len(self._blocks) + task.piece
        if block is None or task.phase is Phase.APPLY:
            return True
        self._ring.use(block, backward=task.phase is Phase.BACKWARD)
        if block not in self._here:
            self._lacking = block, task, now_s
        return block in self._here

    def next_copy(self) -> Copy | None:
        """See `Mover`."""
        bring = self._ring.wanted() if self._coming is None else None
        if bring is None:
            return None
        self._ring.begin(bring)
        if bring.evicts is not None:
            self._here.remove(bring.evicts)
        self._coming = bring.block
        layer, seconds = self._layers[bring.block], self._seconds[bring.block]
        return Copy(cause=Cause.WEIGHTS, stream=WorkStream.H2D, layer=layer, due=bring.due, seconds=seconds)

    def arrive(self, start_s: float, now_s: float) -> DeviceTask | None:
        """See `Mover`."""
        assert self._coming is not None, "nothing was on its way"
        block, self._coming = self._coming, None
        layer = self._layers[block]
        self._here.add(block)
        self.spans.append(
            Span(stream=WorkStream.H2D, step=self._step, layer=layer, start_s=start_s, end_s=now_s, part=self._gpu)
        )
        if self._lacking is None or self._lacking[0] != block:
            return None
        (_, task, since_s), self._lacking = self._lacking, None
        self.waits.append(Wait(step=task.step, layer=layer, start_s=since_s, end_s=now_s))
        return task

    def delta_due(self, op: Op) -> int:
        """See `Mover`."""
        return self._ring.delta_due(op.step + 1 + self._staleness, self._blocks.get(op.layer, 0))
