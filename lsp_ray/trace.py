"""What happened when: spans of the four work streams, waits of the compute stream, and a step's metrics.

All times are seconds of the machine-wide monotonic clock (`time.monotonic`), so spans of different
processes on one machine can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from itertools import pairwise
from typing import Any, Self

TRACED_AT_ONCE = 5  # steps in a row: enough to see one step reach into the next, and no file of gigabytes


class WorkStream(StrEnum):
    """The four streams that a step keeps busy."""

    GPU = "gpu"
    D2H = "d2h"
    CPU = "cpu"
    H2D = "h2d"

    __hash__ = str.__hash__  # an enum's own is a call of Python, and a step looks up thousands


class Cause(StrEnum):
    """What a delta passes through, in order; peers: other GPUs whose payloads of the same layer are not down yet.

    And weights that come up from main memory, and activations: blocks' inputs that go there and come back.
    """

    D2H = "d2h"
    PEERS = "peers"
    CPU = "cpu"
    H2D = "h2d"
    WEIGHTS = "weights"
    ACTIVATIONS = "activations"


_OF_A_DELTA = (Cause.D2H, Cause.PEERS, Cause.CPU, Cause.H2D)


class Phase(StrEnum):
    """What the compute stream does for a layer in a step, in this order."""

    APPLY = "apply"
    FORWARD = "forward"
    BACKWARD = "backward"


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One stretch of work of one stream for one layer of one step; `part` as in `schedule.ops.Op`."""

    stream: WorkStream
    step: int
    layer: int
    start_s: float
    end_s: float
    part: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeSpan:
    """One stretch of a GPU's compute stream's own work for one layer of one step."""

    phase: Phase
    step: int
    layer: int
    start_s: float
    end_s: float
    gpu: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """The compute stream stood still for the delta that `step` made for `layer`.

    Taken on the host: with a GPU, which may still be busy with earlier layers, it is an upper bound.
    """

    step: int
    layer: int
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitPart:
    """The part of a wait that had one cause; step and layer are the delta's, else the compute's."""

    cause: Cause
    step: int
    layer: int
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """Everything that happened for one step, counted from 0; it may have begun before the step and end after it.

    `waits` are those of this step's forward, for deltas of earlier steps, and for weights and activations; `compute` is
    empty where `is_traced` says no; `weights` and `activations` are their copies.
    """

    step: int
    start_s: float
    end_s: float
    compute: tuple[ComputeSpan, ...]
    ops: tuple[Span, ...]
    waits: tuple[WaitPart, ...]
    weights: tuple[Span, ...] = ()
    activations: tuple[Span, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Exposed:
    """Seconds of waiting, by the stream that was late; or for weights or activations on their way."""

    d2h_s: float = 0.0
    cpu_s: float = 0.0
    h2d_s: float = 0.0
    peers_s: float = 0.0
    weights_s: float = 0.0
    activations_s: float = 0.0

    @property
    def total_s(self) -> float:
        """All waiting, whatever its cause."""
        return self.d2h_s + self.peers_s + self.cpu_s + self.h2d_s + self.weights_s + self.activations_s


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """One line of metrics.jsonl. A step is one optimizer update; times are seconds, sizes bytes.

    Attributes:
        step: Number of updates made, so the first line says 1 as in HF's logs; elsewhere steps count from 0.
        loss: Mean over the step's targets.
        grad_norm: Norm of what was sent (for lsp: of the compressed gradients), before any clipping.
        learning_rate: Of this update.
        num_tokens: Tokens that are no padding.
        tokens_per_second: Those over the step's time.
        step_time_s: From the end of the step before to its own.
        gpu_busy_s: In which the device computed.
        d2h_busy_s: In which something went down the link.
        cpu_busy_s: In which a shard updated.
        h2d_busy_s: In which something came up the link.
        exposed_d2h_s: In which this step's forward waited for a delta that was late on its way down.
        exposed_cpu_s: The same for one that was late in its update.
        exposed_h2d_s: The same for one that was late on its way up.
        exposed_peers_s: The same for one that lacked other GPUs' payloads. Of several GPUs, waiting is that of the one
            that waited longest.
        exposed_weights_s: In which this step's passes waited for weights on their way up from main memory.
        exposed_activations_s: The same for blocks' inputs, on their way there or back.
        computed_s_by_gpu: Of its time, what each GPU computed, by its name, where there are several.
        bytes_d2h: Down the link, activations as well.
        bytes_h2d: Up the link, weights and activations as well.
        grad_scale: What gradients were multiplied by: below 1 where clipped, 0 where the step was skipped.
        bias: Relative bias (paper, Definition 2), the mean over the matrices measured, in the steps that did.
        bias_by_layer: The relative bias of each layer in the sample, by its number.
        num_refitted: Projectors that are learned anew after it.
        eval_loss: Measured after the step, by `eval_steps`, in time that no step counts.
    """

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    num_tokens: int
    tokens_per_second: float
    step_time_s: float
    gpu_busy_s: float
    d2h_busy_s: float
    cpu_busy_s: float
    h2d_busy_s: float
    exposed_d2h_s: float
    exposed_cpu_s: float
    exposed_h2d_s: float
    bytes_d2h: int
    bytes_h2d: int
    grad_scale: float = 1.0
    bias: float | None = None
    bias_by_layer: dict[str, float] | None = None
    num_refitted: int | None = None
    eval_loss: float | None = None
    exposed_peers_s: float = 0.0
    exposed_weights_s: float = 0.0
    exposed_activations_s: float = 0.0
    computed_s_by_gpu: dict[str, float] | None = None

    def as_json(self) -> dict[str, Any]:
        """What strict JSON can hold: a number that is not finite, as a skipped step's loss may be, is None."""
        return {name: _finite(value) for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, entry: Any) -> Self:
        """The metrics whose `as_json` this was, NaN where it has None; names that are not known are left out.

        Raises:
            ValueError: It is something else.
        """
        if not isinstance(entry, dict):
            raise ValueError("it is no table of names and values")
        values = {field.name: _read(field.name, str(field.type), entry) for field in fields(cls) if field.name in entry}
        try:
            return cls(**values)
        except TypeError as error:  # something is missing
            raise ValueError(str(error)) from error

    @property
    def exposed_s(self) -> float:
        """Seconds in which the compute stream waited."""
        return sum(self.exposed_by_cause.values())

    @property
    def slowest_gpu(self) -> str | None:
        """The GPU that computed longest, where there are several."""
        times_s = self.computed_s_by_gpu
        return max(times_s, key=times_s.__getitem__) if times_s else None

    @property
    def busy_by_stream(self) -> dict[WorkStream, float]:
        """Seconds in which each stream had work."""
        return {
            WorkStream.GPU: self.gpu_busy_s,
            WorkStream.D2H: self.d2h_busy_s,
            WorkStream.CPU: self.cpu_busy_s,
            WorkStream.H2D: self.h2d_busy_s,
        }

    @property
    def exposed_by_cause(self) -> dict[Cause, float]:
        """Seconds in which the compute stream waited, by what was late."""
        return {
            Cause.D2H: self.exposed_d2h_s,
            Cause.PEERS: self.exposed_peers_s,
            Cause.CPU: self.exposed_cpu_s,
            Cause.H2D: self.exposed_h2d_s,
            Cause.WEIGHTS: self.exposed_weights_s,
            Cause.ACTIVATIONS: self.exposed_activations_s,
        }


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read(name: str, kind: str, entry: dict[str, Any]) -> Any:
    value = entry[name]
    if kind.startswith("dict"):
        return None if value is None else {key: _number(key, "float", part) for key, part in dict(value).items()}
    return None if value is None and kind.endswith("None") else _number(name, kind, value)


def _number(name: str, kind: str, value: Any) -> float:
    if value is None and kind == "float":
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int if kind.startswith("int") else int | float):
        raise ValueError(f"{name} is {value!r}")
    return value


def busy_s(spans: Iterable[Span], stream: WorkStream, start_s: float, end_s: float) -> float:
    """Seconds in [start_s, end_s] in which at least one span of `stream` was under way."""
    clipped = sorted(
        (max(span.start_s, start_s), min(span.end_s, end_s))
        for span in spans
        if span.stream is stream and span.end_s > start_s and span.start_s < end_s
    )
    total, covered_until = 0.0, start_s
    for left, right in clipped:
        if right > covered_until:
            total += right - max(left, covered_until)
            covered_until = right
    return total


def exposed(waits: Sequence[Wait], spans: Iterable[Span], own_parts: Collection[int] | None = None) -> Exposed:
    """Sum up waiting by its cause, see `wait_parts`."""
    seconds = dict.fromkeys(Cause, 0.0)
    for part in wait_parts(waits, spans, own_parts):
        seconds[part.cause] += part.end_s - part.start_s
    return Exposed(**{f"{cause}_s": seconds[cause] for cause in Cause})


def wait_parts(
    waits: Iterable[Wait], spans: Iterable[Span], own_parts: Collection[int] | None = None
) -> Iterator[WaitPart]:
    """Split waiting by cause: what a layer's delta still lacked at each moment of the wait.

    Until the payloads of the GPU's own parts (default: all) were down the wait is d2h's, until the others' were, the
    peers', until its update was done the CPU's, and the rest h2d's; queueing for a stream counts as that stream's.
    Empty parts are left out.
    """
    ends: dict[tuple[Cause | WorkStream, int, int], float] = {}
    for span in spans:  # the last of a layer's parts counts, and of an update that was made twice the second time
        is_peers = span.stream is WorkStream.D2H and own_parts is not None and span.part not in own_parts
        key = Cause.PEERS if is_peers else span.stream, span.step, span.layer
        ends[key] = max(span.end_s, ends.get(key, span.end_s))
    for wait in waits:
        cuts = [wait.start_s]
        for cause in (Cause.D2H, Cause.PEERS, Cause.CPU):
            end_s = ends.get((cause, wait.step, wait.layer), wait.start_s)
            cuts.append(max(cuts[-1], _within(end_s, wait)))
        for cause, (start_s, end_s) in zip(_OF_A_DELTA, pairwise([*cuts, wait.end_s]), strict=True):
            if end_s > start_s:
                yield WaitPart(cause=cause, step=wait.step, layer=wait.layer, start_s=start_s, end_s=end_s)


def is_traced(step: int, num_steps: int) -> bool:
    """Whether a run's trace holds this step: the first TRACED_AT_ONCE, and as many in the middle as typical ones.

    Known in advance, so that nothing is kept for later and a run that ends early leaves what it had.
    """
    return step < TRACED_AT_ONCE or 0 <= step - (num_steps - TRACED_AT_ONCE) // 2 < TRACED_AT_ONCE


def _within(time_s: float, wait: Wait) -> float:
    return min(max(time_s, wait.start_s), wait.end_s)
