"""What bench_overlap predicts, and that it predicts enough."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lsp_ray.hardware import BACKWARD_SHARE
from lsp_ray.schedule.ops import LayerSeconds
from scripts.bench_overlap import Reading, is_predicted, predicted_step_s
from scripts.overlap_settings import COMPARED, PAPER_MACHINE, PREDICTED, ZERO

NUM_LAYERS = 32


def free(compute_s: float) -> Reading:
    """Zero-Offload without a throttle, on parts that take no time."""
    layer = LayerSeconds(
        forward_s=(1 - BACKWARD_SHARE) * compute_s / NUM_LAYERS,
        backward_s=BACKWARD_SHARE * compute_s / NUM_LAYERS,
        d2h_s=0.0,
        cpu_s=0.0,
        h2d_s=0.0,
    )
    return Reading(compute_s, 0.0, 0.0, (layer,) * NUM_LAYERS, None)


def test_an_emulated_machine_is_simulated_with_the_proportions_to_what_the_live_run_was_scaled_to() -> None:
    setting, sizes = replace(ZERO, emulate=PAPER_MACHINE), [1000] * NUM_LAYERS
    half, whole = (predicted_step_s(setting, free(1.29), sizes, 32_000, compute_s) for compute_s in (0.645, 1.29))
    assert 1.93 <= whole / 1.29 <= 4.28
    # all of the updates (1.92 s) and of the way up (1.05 s) are exposed, and grow with what they are scaled to
    assert whole - half > (1.92 + 1.05) / 2
    assert predicted_step_s(replace(ZERO, policy="sequential"), free(1.29), sizes, 32_000, None) == pytest.approx(
        1.29, rel=0.1
    )


def test_at_least_ten_settings_are_predicted_over_policies_links_and_subspaces() -> None:
    predicted = {setting for setting in (*COMPARED, *PREDICTED) if is_predicted(setting)}
    assert len(predicted) >= 10
    for field in ("policy", "link_gbps", "dim", "method"):
        assert len({getattr(setting, field) for setting in predicted}) > 1
