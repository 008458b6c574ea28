"""OpenSteps: what has happened of the steps that are not closed, so that a lost GPU's part can be made again."""

from __future__ import annotations

from collections.abc import Sequence

from lsp_ray.runtime.drive.ledger import OpReport
from lsp_ray.schedule.ops import GradientReady, Op
from lsp_ray.trace import WorkStream


class OpenSteps:
    """Notes which payloads were announced and which operations are done.

    Args:
        num_layers: Units that pass down, through their update and up.
        gpu_of_part: See `Policy`.
    """

    def __init__(self, num_layers: int, gpu_of_part: Sequence[int]) -> None:
        self._num_layers = num_layers
        self._gpu_of_part = tuple(gpu_of_part)
        self._is_noted = len(set(gpu_of_part)) > 1  # one GPU that is lost leaves none to go on
        self._announced: dict[int, set[GradientReady]] = {}
        self._done: dict[int, set[Op]] = {}
        self._launched: dict[int, list[Op]] = {}  # of the way up

    def announce(self, ready: GradientReady) -> None:
        """Note that a payload is ready."""
        if self._is_noted:
            self._announced.setdefault(ready.step, set()).add(ready)

    def launch(self, op: Op) -> None:
        """Note that a delta is to come up, if the operation is of that kind."""
        if self._is_noted and op.stream is WorkStream.H2D:
            self._launched.setdefault(op.step, []).append(op)

    def add(self, op: Op) -> None:
        """Note that an operation is done."""
        if self._is_noted:
            self._done.setdefault(op.step, set()).add(op)

    def close(self, step: int) -> None:
        """Forget a step and those before."""
        for kept in (self._announced, self._done, self._launched):
            for old in [old for old in kept if old <= step]:
                del kept[old]

    def parts_of(self, gpu: int) -> set[int]:
        """The parts that a GPU computes."""
        return {part for part, own in enumerate(self._gpu_of_part) if own == gpu}

    def lacking(self, gpu: int, first: int) -> int:
        """The first step, from one on, of which not all payloads of a GPU are down."""
        step = first
        while self._num_down(gpu, step) == self._num_layers * len(self.parts_of(gpu)):
            step += 1
        return step

    def have_announced(self, gpu: int, step: int) -> bool:
        """Whether all GPUs but this one have announced all of their payloads of a step."""
        others = len(self._gpu_of_part) - len(self.parts_of(gpu))
        return len(self.announced_without(gpu, step)) == self._num_layers * others

    def announced_without(self, gpu: int, step: int) -> list[GradientReady]:
        """What all GPUs but this one have announced of a step, in an order that does not depend on theirs."""
        own = self.parts_of(gpu)
        found = [ready for ready in self._announced.get(step, ()) if ready.part not in own]
        return sorted(found, key=lambda ready: (-ready.layer, ready.part))

    def made_without(self, gpu: int, step: int) -> set[Op]:
        """The copies of a step that are done and do not concern this GPU; shards make no update twice."""
        return {op for op in self._done.get(step, ()) if not self._concerns(op, gpu)}

    def coming_up(self, gpu: int) -> list[Op]:
        """Those that are to bring deltas up to this GPU, and are launched and not done."""
        launched = [op for ops in self._launched.values() for op in ops if op.part == gpu]
        return [op for op in launched if op not in self._done.get(op.step, ())]

    def forget(self, gpu: int, step: int) -> set[Op]:
        """Drop what concerns this GPU in a step, as all updates do; returns the operations."""
        own = {op for op in self._done.get(step, ()) if self._concerns(op, gpu)}
        self._done[step] = self._done.get(step, set()) - own
        self._launched.pop(step, None)
        self._announced[step] = set(self.announced_without(gpu, step))
        return own

    def _concerns(self, op: Op, gpu: int) -> bool:
        match op.stream:
            case WorkStream.D2H:
                return self._gpu_of_part[op.part] == gpu
            case WorkStream.H2D:
                return op.part == gpu
        return True

    def _num_down(self, gpu: int, step: int) -> int:
        down = (op for op in self._done.get(step, ()) if op.stream is WorkStream.D2H)
        return sum(self._concerns(op, gpu) for op in down)


def op_of(report: OpReport) -> Op:
    """The operation that a report is of."""
    span = report.span
    return Op(stream=span.stream, step=span.step, layer=span.layer, part=span.part)
