"""OptimizerShard: the optimizer state of some of the layers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch

from lsp_ray.optim.adamw import AdamWHyper, AdamWState, adamw_delta_
from lsp_ray.optim.codec import Codec
from lsp_ray.optim.parts import square_sum, tree_sum
from lsp_ray.optim.reproject import Reprojection, reproject_
from lsp_ray.optim.sums import SummedPart, sum_up_

_SLICE = 1 << 19  # encoded values at a time


class OptimizerShard:
    """Owns m and v of its layers and turns their gradients into deltas.

    A layer's numbers depend on that layer alone, so any split of layers over shards gives the same bits.

    Args:
        numel_of_layer: Payload length (elements) of each layer this shard owns.
        hyper: AdamW's constants.
        device: Where m and v live; default: the CPU.
        states: The state to work on, where it lives outside of this shard; default: a new one.
        codec: Of the gradients and deltas.
        sums: Each layer's parts, where the answer to a gradient is the sum of all steps; default: it is the step.
        weight_decay: Of these sums.
        parts: Of a step, those of each gradient that comes: one, encoded, or the sum of several, float32. All are added
            up here.

    Attributes:
        hyper: AdamW's constants.
        is_plain: Whether an update is AdamW's and nothing else.
    """

    is_plain = True

    def __init__(
        self,
        numel_of_layer: Mapping[int, int],
        hyper: AdamWHyper | None = None,
        device: torch.device | None = None,
        states: Mapping[int, AdamWState] | None = None,
        codec: Codec | None = None,
        sums: Mapping[int, Sequence[SummedPart]] | None = None,
        weight_decay: float = 0.0,
        parts: Sequence[range] = (range(1),),
    ) -> None:
        self.hyper = hyper or AdamWHyper()
        self._codec = codec or Codec()
        self.states = states or {
            layer: AdamWState.zeros(
                numel, device, keeps_error=self._codec.is_coarse and sums is None, keeps_total=sums is not None
            )
            for layer, numel in numel_of_layer.items()
        }
        self._sums, self._weight_decay = sums, weight_decay
        self._firsts = [own.start for own in parts]
        self._codecs = [self._codec if len(own) == 1 else Codec() for own in parts]
        self._has_parts = sum(map(len, parts)) > 1
        is_whole = sums is None and self._codec.dtype == torch.float32 and not self._has_parts
        self._scratch_2P = torch.empty(2, 0 if is_whole else _SLICE, device=device)
        self._sum = torch.empty(max(numel_of_layer.values()) if self._has_parts else 0, device=device)

    def update(
        self,
        layer: int,
        grads: Sequence[torch.Tensor],
        delta: torch.Tensor,
        *,
        learning_rate: float,
        grad_scale: float = 1.0,
    ) -> float | None:
        """Write the step for the sum of `grads` times `grad_scale`, or the sum of all steps, into `delta`.

        All are flat, of the layer's payload length, encoded as `parts` says, and stay the caller's. Where the scale is
        0, or the sum holds NaN or infinity, the step is none at all: the state stays as it is and the step is zero.
        Whoever made the gradient says that it is not finite; here it may be there before that is known.

        Returns:
            See `square_sum`.
        """
        state = self.states[layer]
        if self._scratch_2P.numel() == 0:
            self._update_whole(state, grads[0], delta, learning_rate, grad_scale)
            return None
        squares = self.square_sum(layer, grads)
        if squares is not None:
            is_finite = math.isfinite(squares)
        else:
            is_finite = all(is_usable(self._decoded(grads, *part), grad_scale) for part in state.parts(_SLICE))
        if self._sums is not None:
            self._add_up(state, self._sums[layer], grads, delta, learning_rate, grad_scale if is_finite else 0.0)
        elif not is_finite or grad_scale == 0.0:
            delta.zero_()
        else:
            for first, part, step in self._steps(state, grads, learning_rate, grad_scale):
                self._encode(step, delta, first, part)
        return squares

    def square_sum(self, layer: int, grads: Sequence[torch.Tensor]) -> float | None:
        """The square sum of the sum of `grads`, before any scale; None for a single one, whose maker knows it."""
        if not self._has_parts:
            return None
        squares = 0.0
        for first, part in self.states[layer].parts(_SLICE):
            numel = part.exp_avg.numel()
            decoded = [codec.decode(grad, numel, first) for codec, grad in zip(self._codecs, grads, strict=True)]
            total = tree_sum([values.float() for values in decoded], self._firsts)
            self._sum[first : first + numel] = total  # what follows need not add it up again
            squares += square_sum(total)
        return squares

    def carry_over(self, layer: int, changes: Sequence[Reprojection]) -> None:
        """Let the state of a layer's matrices that have new projectors follow them."""
        for change in changes:
            reproject_(self.states[layer], change)

    def _update_whole(
        self, state: AdamWState, grad: torch.Tensor, delta: torch.Tensor, learning_rate: float, grad_scale: float
    ) -> None:
        if not is_usable(grad, grad_scale):
            delta.zero_()
            return
        seen = grad if grad_scale == 1.0 else grad * grad_scale
        adamw_delta_(delta, seen, state, learning_rate=learning_rate, hyper=self.hyper)

    def _add_up(
        self,
        state: AdamWState,
        parts: Sequence[SummedPart],
        grads: Sequence[torch.Tensor],
        delta: torch.Tensor,
        learning_rate: float,
        grad_scale: float,
    ) -> None:
        """The same where the sum is the answer: nothing that is left out of it once is missing the next time."""
        if grad_scale != 0.0:
            for first, _, step in self._steps(state, grads, learning_rate, grad_scale):
                sum_up_(state, parts, first, step, learning_rate=learning_rate, decay=self._weight_decay)
        for first, part in state.parts(_SLICE):
            assert part.total is not None
            self._codec.encode_(delta, part.total, first=first)

    def _steps(
        self, state: AdamWState, grads: Sequence[torch.Tensor], learning_rate: float, grad_scale: float
    ) -> Iterator[tuple[int, AdamWState, torch.Tensor]]:
        """Yield AdamW's step in slices, with the position and the state of each; the state advances.

        So float32 copies stay in a cache and always in the same memory.
        """
        for first, part in state.parts(_SLICE):
            seen = self._decoded(grads, first, part)
            step = self._scratch_2P[1, : seen.numel()]
            if grad_scale != 1.0:
                seen *= grad_scale
            adamw_delta_(step, seen, part, learning_rate=learning_rate, hyper=self.hyper)
            yield first, part, step
        state.step += 1

    def _decoded(self, grads: Sequence[torch.Tensor], first: int, part: AdamWState) -> torch.Tensor:
        numel = part.exp_avg.numel()
        # see `square_sum`
        values = self._sum[first : first + numel] if self._has_parts else self._codec.decode(grads[0], numel, first)
        return self._scratch_2P[0, :numel].copy_(values)

    def _encode(self, step: torch.Tensor, delta: torch.Tensor, first: int, part: AdamWState) -> None:
        """Send Q(δ + e); what that leaves out is the next e, so that nothing is lost for good."""
        if part.error is not None:
            step += part.error
        self._codec.encode_(delta, step, first=first)
        if part.error is not None:
            torch.sub(step, self._codec.decode(delta, step.numel(), first), out=part.error)


def is_usable(grad: torch.Tensor, grad_scale: float) -> bool:
    """Whether a flat float32 gradient is to reach m and v: it is finite, and its step is not skipped."""
    if grad_scale == 0.0:
        return False
    # finite squares can overflow in the sum; it alone is one pass without a copy
    return bool(torch.isfinite(torch.dot(grad, grad)) or torch.isfinite(grad).all())
