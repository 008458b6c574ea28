"""What a run's measurements of eval loss decide: its best step, and whether to go on."""

from __future__ import annotations

from collections.abc import Sequence

from lsp_ray.trace import StepMetrics


def best_step(steps: Sequence[StepMetrics]) -> StepMetrics | None:
    """Return the first step with the lowest eval loss; None where none was measured, or not as a number."""
    measured = [step for step in steps if step.eval_loss is not None and step.eval_loss == step.eval_loss]
    return min(measured, key=lambda step: step.eval_loss or 0.0, default=None)


def num_without_gain(steps: Sequence[StepMetrics]) -> int:
    """Return how many measurements have come since the best one; of all of them where none is a number."""
    best = best_step(steps)
    return sum(step.eval_loss is not None and (best is None or step.step > best.step) for step in steps)
