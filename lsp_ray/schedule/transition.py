"""The layer from which shallow layers overtake, from what each layer costs each stream."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from lsp_ray.schedule.ops import LayerSeconds


def transition_layer(layers: Sequence[LayerSeconds], shard_of_layer: Sequence[int]) -> int:
    """Return how many of the shallowest layers must overtake, so that none is late for a queue of deeper ones.

    The paper's rule (Section 4), made exact: the deepest layer from which on queueing, were everything served first
    come, first served, would make a shallower layer miss its deadline. For layers l = 0 (shallowest) … L-1:

        R_l = Σ_{k≥l} backward_k               its gradient is there: the backward goes from deep to shallow
        F_l                                    its delta is up, every lane first come, first served
        N_l = R_l + d2h_l + cpu_l + h2d_l      its delta is up, if it never queued
        S_0 = N_0,  S_l = max(S_{l-1} + forward_{l-1}, N_l)    its deadline: its forward starts, if none queued
        Q_l = max({l} ∪ {Q_k : l waited behind k in some lane})    the deepest layer of the queue that it stood in
        transition layer = 1 + max {Q_l : F_l > S_l}, or 0 where no layer is late

    So 0 where no stream is slower than the backward, and L where all layers are alike and one stream is slower. A
    queue that dissolves before any layer is late for it is left alone.

    Args:
        layers: Costs, shallowest first.
        shard_of_layer: The shard that updates each layer.
    """
    gradient_s = list(accumulate(layer.backward_s for layer in reversed(layers)))[::-1]
    one_lane = [0] * len(layers)
    queued_from = list(range(len(layers)))  # Q
    up_s = gradient_s
    for costs_s, lanes in (
        ([layer.d2h_s for layer in layers], one_lane),
        ([layer.cpu_s for layer in layers], shard_of_layer),
        ([layer.h2d_s for layer in layers], one_lane),
    ):
        up_s = _served(up_s, costs_s, lanes, queued_from)
    deadline_s = 0.0
    transition = 0
    for index, layer in enumerate(layers):
        # summed in the order of _served, so that a layer that never queued is in time to the last bit
        deadline_s = max(deadline_s, gradient_s[index] + layer.d2h_s + layer.cpu_s + layer.h2d_s)
        if up_s[index] > deadline_s:
            transition = max(transition, 1 + queued_from[index])
        deadline_s += layer.forward_s
    return transition


def _served(
    arrivals_s: Sequence[float], costs_s: Sequence[float], lanes: Sequence[int], queued_from: list[int]
) -> list[float]:
    """Return when each layer leaves its lane, first come, first served; of two that come at once, the deeper one first.

    `queued_from` is carried on in place.
    """
    last_in: dict[int, int] = {}
    ends_s = [0.0] * len(arrivals_s)
    for layer in sorted(range(len(arrivals_s)), key=lambda layer: (arrivals_s[layer], -layer)):
        start_s = arrivals_s[layer]
        before = last_in.get(lanes[layer])
        if before is not None and ends_s[before] > start_s:
            start_s = ends_s[before]
            queued_from[layer] = max(queued_from[layer], queued_from[before])
        ends_s[layer] = start_s + costs_s[layer]
        last_in[lanes[layer]] = layer
    return ends_s
