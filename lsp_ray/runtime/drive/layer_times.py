"""LayerTimes: what each layer costs each stream, as medians of the last steps."""

from __future__ import annotations

from collections import defaultdict, deque
from statistics import median

from lsp_ray.device.step_report import StepReport
from lsp_ray.schedule.ops import LayerSeconds
from lsp_ray.trace import Span, WorkStream

NUM_STEPS = 8  # the last so many count: enough for a median, few enough to follow a machine whose load changes


class LayerTimes:
    """Collects durations as they come.

    Layers are taken to share forward and backward evenly: inside them the host cannot see when a GPU goes from one to
    the next.

    Args:
        num_layers: Units that pass down, through their update and up.
    """

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers
        self._compute_s: deque[tuple[float, float]] = deque(maxlen=NUM_STEPS)
        self._ops_s: defaultdict[tuple[WorkStream, int], deque[float]] = defaultdict(lambda: deque(maxlen=NUM_STEPS))

    def add_step(self, report: StepReport) -> None:
        """Note a step's forward and backward."""
        self._compute_s.append((report.forward_s, report.backward_s))

    def add_op(self, span: Span) -> None:
        """Note a layer's copy or update."""
        self._ops_s[span.stream, span.layer].append(span.end_s - span.start_s)

    def medians(self) -> tuple[LayerSeconds, ...]:
        """Every layer's costs, shallowest first; at least one step must be complete."""
        forward_s, backward_s = map(median, zip(*self._compute_s, strict=True))
        return tuple(
            LayerSeconds(
                forward_s=forward_s / self._num_layers,
                backward_s=backward_s / self._num_layers,
                d2h_s=median(self._ops_s[WorkStream.D2H, layer]),
                cpu_s=median(self._ops_s[WorkStream.CPU, layer]),
                h2d_s=median(self._ops_s[WorkStream.H2D, layer]),
            )
            for layer in range(self._num_layers)
        )
