"""Throttle: how much slower than they are the link, the network and the shards are made to be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lsp_ray.device.token_bucket import TokenBucket
from lsp_ray.hardware import Proportions
from lsp_ray.schedule.ops import LayerSeconds
from lsp_ray.sim.store import payload_bytes
from lsp_ray.trace import WorkStream

TOLERANCE = 1.1  # a part counts as slower by itself from this factor on: clocks and sleeps are not exact


@dataclass(frozen=True, slots=True, kw_only=True)
class Throttle:
    """Bounds; None is none. `link_gbps`: 10⁹ bytes a second each way; `updates_per_s`: elements, all shards together.

    `network_gbps`: as the link's, in and out of each machine that has shards, by all GPUs on other ones together.
    `compute_s` is the measured step that emulated bounds were scaled to.
    """

    link_gbps: float | None = None
    updates_per_s: float | None = None
    compute_s: float | None = None
    network_gbps: float | None = None

    def link(self) -> dict[WorkStream, TokenBucket]:
        """A bucket of bytes for each direction of the link, or none."""
        if self.link_gbps is None:
            return {}
        return {direction: TokenBucket(self.link_gbps * 1e9) for direction in (WorkStream.D2H, WorkStream.H2D)}

    def shard(self, num_shards: int) -> TokenBucket | None:
        """A bucket of elements for one of the shards, each of which has an equal part of the CPU."""
        return None if self.updates_per_s is None else TokenBucket(self.updates_per_s / num_shards)


def emulating(machine: Proportions, *, compute_s: float, full_numel: int) -> Throttle:
    """Return the bounds that give this run the machine's proportions.

    With n = `full_numel` gradient elements of all trained layers, which the paper sends as n numbers of 2 bytes,
    c = `compute_s`:
    bytes/s in each direction = 2 n / (c · traffic_over_compute / 2), elements/s = n / (c · update_over_compute).
    """
    each_way_s = compute_s * machine.traffic_over_compute / 2
    return Throttle(
        link_gbps=payload_bytes(full_numel, "bfloat16") / each_way_s / 1e9,
        updates_per_s=full_numel / (compute_s * machine.update_over_compute),
        compute_s=compute_s,
    )


def slower_by_themselves(
    throttle: Throttle, layers: Sequence[LayerSeconds], *, numel: int, num_bytes: int, num_shards: int
) -> Iterator[str]:
    """Yield a line for each part that did not need to be slowed down: a throttle cannot make it any faster.

    Args:
        throttle: What was asked for.
        layers: What each layer's work took.
        numel: Elements that are sent and updated in a step.
        num_bytes: In which they cross the link.
        num_shards: The shards that share `updates_per_s`.
    """
    if throttle.link_gbps is not None:
        due_s = num_bytes / (throttle.link_gbps * 1e9)
        yield from _slower("the way down", sum(layer.d2h_s for layer in layers), due_s)
        yield from _slower("the way up", sum(layer.h2d_s for layer in layers), due_s)
    if throttle.updates_per_s is not None:
        due_s = numel * num_shards / throttle.updates_per_s
        yield from _slower("updating", sum(layer.cpu_s for layer in layers), due_s)


def _slower(what: str, took_s: float, due_s: float) -> Iterator[str]:
    if took_s > TOLERANCE * due_s:
        yield f"throttle: {what} takes {took_s:.3g} s a step by itself, more than the {due_s:.3g} s asked for"
