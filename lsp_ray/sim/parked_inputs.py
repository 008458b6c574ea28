"""In a simulation: which blocks' inputs a GPU has, and what its link takes down and brings back."""

from __future__ import annotations

from collections import deque

from lsp_ray.schedule.block_ring import INPUT_BUFFERS, parked_blocks
from lsp_ray.schedule.ops import Op
from lsp_ray.schedule.uses import Uses
from lsp_ray.sim.copies import Copy
from lsp_ray.sim.costs import StepCosts
from lsp_ray.sim.device_plan import DeviceTask
from lsp_ray.trace import Cause, Phase, Span, Wait, WorkStream


class ParkedInputs:
    """As `device.host_activations` in a run; see `sim.copies.Mover`.

    Args:
        gpu: Its number.
        part: One that it computes.
        costs: Of a step; layers whose input takes time to go down are the blocks.
        num_passes: Micro-batches of a step that the GPU computes.
        staleness: Steps by which deltas are late on purpose.
    """

    def __init__(self, gpu: int, part: int, costs: StepCosts, num_passes: int, staleness: int) -> None:
        self.spans: list[Span] = []
        self.waits: list[Wait] = []
        self._costs = costs
        self._parts = {WorkStream.D2H: part, WorkStream.H2D: gpu}
        self._num_passes, self._staleness = num_passes, staleness
        self._layers = [layer for layer, cost in enumerate(costs.layers) if cost.input_d2h_s > 0.0]
        self._blocks = {layer: block for block, layer in enumerate(self._layers)}
        self._parked = parked_blocks(len(self._layers))
        self._uses = Uses(len(self._layers), len(costs.pieces_s))
        self._step = -1
        self._lacking: tuple[DeviceTask, float] | None = None  # and since when
        self._copying: tuple[int, WorkStream] | None = None
        self._forget()

    def _forget(self) -> None:
        self._num_free = INPUT_BUFFERS
        self._is_backward = False
        self._going_down: deque[int] = deque()
        self._away: list[int] = []  # blocks whose input is in main memory alone
        self._here: set[int] = set()
        self._current: int | None = None

    def enter(self, task: DeviceTask, now_s: float) -> bool:
        """See `Mover`."""
        if task.opens_pass:
            if task.step != self._step:
                self._step = task.step
                self._uses.begin_step(task.step, self._num_passes)
            self._uses.begin_pass()
            self._forget()
        block = self._blocks.get(task.layer, 0)
        if block == 0 or task.phase is Phase.APPLY:
            return True
        is_there = self._take(block, backward=task.phase is Phase.BACKWARD)
        if not is_there:
            self._lacking = task, now_s
        return is_there

    def _take(self, block: int, *, backward: bool) -> bool:
        """Give the input a buffer, or find it in one; False while there is none, or it is not there."""
        if backward:
            self._is_backward = True
            if self._current not in (None, block):
                self._num_free += 1
                self._current = None
            if block in self._here:
                self._here.remove(block)
                self._current = block
            return block == self._current
        if block in self._here:  # the last one, whose loss is a forward of its own
            return True
        if not self._num_free:
            return False
        self._num_free -= 1
        if block in self._parked:
            self._going_down.append(block)
        else:
            self._here.add(block)
        return True

    def next_copy(self) -> Copy | None:
        """See `Mover`."""
        if self._copying is not None:
            return None
        if self._going_down:
            block, stream = self._going_down.popleft(), WorkStream.D2H
            due = self._uses.number(block + INPUT_BUFFERS, backward=False)
        elif self._is_backward and self._num_free and self._away:
            block, stream = self._away.pop(), WorkStream.H2D
            self._num_free -= 1
            due = self._uses.number(block, backward=True)
        else:
            return None
        self._copying = block, stream
        layer = self._layers[block]
        cost = self._costs.layers[layer]
        seconds = cost.input_d2h_s if stream is WorkStream.D2H else cost.input_h2d_s
        return Copy(cause=Cause.ACTIVATIONS, stream=stream, layer=layer, due=due, seconds=seconds)

    def arrive(self, start_s: float, now_s: float) -> DeviceTask | None:
        """See `Mover`."""
        assert self._copying is not None, "nothing was on its way"
        (block, stream), self._copying = self._copying, None
        if stream is WorkStream.D2H:
            self._away.append(block)
            self._num_free += 1
        else:
            self._here.add(block)
        layer, part = self._layers[block], self._parts[stream]
        self.spans.append(Span(stream=stream, step=self._step, layer=layer, start_s=start_s, end_s=now_s, part=part))
        if self._lacking is None:
            return None
        task, since_s = self._lacking
        if not self._take(self._blocks[task.layer], backward=task.phase is Phase.BACKWARD):
            return None
        self._lacking = None
        self.waits.append(Wait(step=task.step, layer=task.layer, start_s=since_s, end_s=now_s))
        return task

    def delta_due(self, op: Op) -> int:
        """See `Mover`."""
        return self._uses.delta_due(op.step + 1 + self._staleness, self._blocks.get(op.layer, 0))
