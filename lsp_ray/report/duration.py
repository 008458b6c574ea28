"""Durations as people read them."""

from __future__ import annotations

import math


def format_duration(seconds: float) -> str:
    """Return `m:ss` or `h:mm:ss`, and `?` for what is not a time."""
    if not (math.isfinite(seconds) and seconds >= 0):
        return "?"
    minutes, whole_seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{whole_seconds:02}" if hours else f"{minutes}:{whole_seconds:02}"
