"""OptimizerShard: the optimizer state of some of the layers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from lsp_ray.optim.adamw import AdamWHyper, AdamWState, adamw_delta_
from lsp_ray.optim.codec import Codec
from lsp_ray.optim.reproject import Reprojection, reproject_

_PART = 1 << 19  # values at a time
_T = TypeVar("_T")


class OptimizerShard:
    """Owns m and v of its layers and turns their gradients into deltas.

    A layer's numbers depend on that layer alone, so any split of layers over shards gives the same bits.

    Args:
        numel_of_layer: Payload length (elements) of each layer this shard owns.
        hyper: AdamW's constants.
        device: Where m and v live; default: the CPU.
        states: The state to work on, where it lives outside of this shard; default: a new one.
        codec: Of the gradients and deltas.
        num_threads: That work on an update side by side, each on parts of its own; the bits are the same with any.

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
        num_threads: int = 1,
    ) -> None:
        self.hyper = hyper or AdamWHyper()
        self._codec = codec or Codec()
        self.states = states or {
            layer: AdamWState.zeros(numel, device, keeps_error=self._codec.is_coarse)
            for layer, numel in numel_of_layer.items()
        }
        # one operator in many threads would cost more to begin than its part takes
        self._pool = None
        if num_threads > 1:
            self._pool = ThreadPoolExecutor(num_threads, "update", torch.set_num_threads, (1,))
        self._scratch = threading.local()

    def update(
        self, layer: int, grad: torch.Tensor, delta: torch.Tensor, *, learning_rate: float, grad_scale: float = 1.0
    ) -> None:
        """Write the step for `grad` times `grad_scale` into `delta`.

        Both are flat, encoded, of the layer's payload length, and stay the caller's. Where the scale is 0, or `grad`
        holds NaN or infinity, the step is none at all: the state stays as it is and `delta` is zero. Whoever made the
        gradient says that it is not finite; here it may be there before that is known.
        """
        state = self.states[layer]
        parts = list(state.parts(_PART if delta.device.type == "cpu" else delta.numel()))
        if grad_scale == 0.0 or not all(self._map(lambda at: self._is_usable(grad, *at), parts)):
            delta.zero_()
            return

        def step(at: tuple[int, AdamWState]) -> None:
            self._step(grad, delta, *at, learning_rate=learning_rate, grad_scale=grad_scale)

        for _ in self._map(step, parts):
            pass
        state.step += 1

    def carry_over(self, layer: int, changes: Sequence[Reprojection]) -> None:
        """Let the state of a layer's matrices that have new projectors follow them."""
        for change in changes:
            reproject_(self.states[layer], change)

    def _map(self, do: Callable[[tuple[int, AdamWState]], _T], parts: Sequence[tuple[int, AdamWState]]) -> Iterable[_T]:
        """What `do` returns of each part, in their order."""
        return map(do, parts) if self._pool is None or len(parts) == 1 else self._pool.map(do, parts)

    def _is_usable(self, grad: torch.Tensor, first: int, part: AdamWState) -> bool:
        return is_usable(self._decoded(grad, first, part), 1.0)

    def _step(
        self,
        grad: torch.Tensor,
        delta: torch.Tensor,
        first: int,
        part: AdamWState,
        *,
        learning_rate: float,
        grad_scale: float,
    ) -> None:
        """Of a part, whose float32 copies stay in a core's cache and always in the same memory."""
        seen = self._decoded(grad, first, part)
        if grad_scale != 1.0:
            seen = torch.mul(seen, grad_scale, out=self._floats(0, seen.numel(), seen.device))
        is_exact = self._codec.dtype == torch.float32
        step = delta[first : first + seen.numel()] if is_exact else self._floats(1, seen.numel(), seen.device)
        adamw_delta_(step, seen, part, learning_rate=learning_rate, hyper=self.hyper)
        if not is_exact:
            self._encode(step, delta, first, part)

    def _decoded(self, grad: torch.Tensor, first: int, part: AdamWState) -> torch.Tensor:
        """The part's gradient in float32: the caller's own memory, or this thread's."""
        decoded = self._codec.decode(grad, part.exp_avg.numel(), first)
        if decoded.dtype == torch.float32:
            return decoded
        return self._floats(0, decoded.numel(), decoded.device).copy_(decoded)

    def _floats(self, which: int, numel: int, device: torch.device) -> torch.Tensor:
        """One of two pieces of memory of the calling thread."""
        if not hasattr(self._scratch, "values_2P"):
            self._scratch.values_2P = torch.empty(2, _PART, device=device)
        floats: torch.Tensor = self._scratch.values_2P[which, :numel]
        return floats

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
