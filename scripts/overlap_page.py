"""docs/benchmarks/overlap.md: what bench_overlap found, for people."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from scripts.overlap_settings import EMULATED_LSP, EMULATED_ZERO, LSP, NATIVE, THREADS, Setting
from scripts.wrapped import wrapped

PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks" / "overlap.md"


class Readings(Protocol):
    """See `bench_overlap.Found`."""

    @property
    def blocks(self) -> Mapping[Setting, Sequence[object]]:
        """By setting."""
        ...

    def step_s(self, setting: Setting) -> float:
        """Median."""
        ...

    def spread_s(self, setting: Setting) -> float:
        """Of the middle half."""
        ...

    def exposed_fraction(self, setting: Setting) -> float:
        """Of the step."""
        ...

    def ratios(self, setting: Setting, other: Setting) -> list[float]:
        """Round by round."""
        ...


def write_page(found: Readings, figures: Mapping[str, Any], *, num_rounds: int) -> None:
    """Write the page in place of the one before."""
    PAGE.write_text(wrapped(_page(found, figures, num_rounds)), encoding="utf-8")


def _page(found: Readings, figures: Mapping[str, Any], num_rounds: int) -> str:
    today = datetime.now(UTC).date().isoformat()
    rows = "\n".join(
        f"| {setting.name} | {found.step_s(setting):.3f} | {found.spread_s(setting):.3f} "
        f"| {found.exposed_fraction(setting):.1%} | {_percent(figures['simulator_error'].get(setting.name))} "
        f"| {_percent(figures['plan_error'].get(setting.name))} |"
        for setting in found.blocks
    )
    pairs = [
        ("LSP over Zero-Offload, both as rtx4090-threadripper", EMULATED_LSP, EMULATED_ZERO, "lsp_over_zero_offload"),
        ("LSP over native", LSP, NATIVE, "lsp_over_native"),
        ("LSP on Ray over LSP on threads", LSP, THREADS, "ray_over_threads"),
    ]
    bounds = {"lsp_over_zero_offload": 0.40, "lsp_over_native": 0.85, "ray_over_threads": 1.05}
    ratios = "\n".join(
        f"| {text} | {figures[key]:.3f} | {min(found.ratios(one, other)):.3f} to {max(found.ratios(one, other)):.3f} "
        f"| {bounds[key]} |"
        for text, one, other, key in pairs
    )
    return f"""# Overlap

`python scripts/bench_overlap.py`, {today}, Python {platform.python_version()}, 2 shared cores, no GPU.
SmolLM2-135M, the same micro-batch of 4 × 128 tokens in every step, one device thread, one shard thread.
Workers of all settings stay up and run blocks of steps in turn; ratios are medians over {num_rounds} rounds.

| ratio | measured | rounds | at most |
|---|---|---|---|
{ratios}
| exposed time of that emulated LSP step | {figures["exposed_fraction"]:.3f} | | 0.05 |

| setting | s a step | middle half within | exposed | simulator's error | planner's error |
|---|---|---|---|---|---|
{rows}

The simulator is given the throttle and, for every layer, what blocks without one measured right before and after the
predicted one. The planner is given what `lsp_ray.plan --measure` measures amid the rounds.
"""


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:+.1%}"
