"""InputProjection: X Q once for all linears that read the same X.

Legend: T tokens, N columns of the weights, E columns of Q.
"""

from __future__ import annotations

from typing import Any

import torch

from lsp_ray.projection.block_factor import BlockFactor


class InputProjection:
    """Keeps X Q from the first of some linears that share Q to the last; what the backward needs autograd keeps.

    Which tensor arrives decides, so a linear that for once reads another one, or is called twice, gets its own product.

    Args:
        num_readers: Linears that share Q.
    """

    def __init__(self, num_readers: int = 1) -> None:
        self.num_readers = num_readers
        self._num_uses = 0
        self._held: tuple[torch.Tensor, int, BlockFactor, torch.Tensor] | None = None

    def of(self, input_TN: torch.Tensor, right: BlockFactor, *, differentiable: bool = False) -> torch.Tensor:
        """Return X Q, (T, E), in X's dtype; X is (…, N).

        Where it is differentiable, its gradient is brought back to X once for all readers; else it has no graph.
        """
        if torch.compiler.is_compiling():  # the compiler finds what is computed twice, and keeps no tensor here
            seen_TN = input_TN if differentiable else input_TN.detach()
            return right.project(seen_TN.reshape(-1, input_TN.shape[-1]))
        held = self._held
        if held is None or held[0] is not input_TN or held[1] != input_TN._version or held[2] is not right:
            if differentiable and torch.is_grad_enabled():
                projected_TE: torch.Tensor = _Project.apply(input_TN, right)  # type: ignore[no-untyped-call]
            else:  # no graph comes of it: neither X, detached, nor Q wants a gradient
                projected_TE = right.project(input_TN.detach().reshape(-1, input_TN.shape[-1]))
            held = input_TN, input_TN._version, right, projected_TE
            self._num_uses = 0
        self._num_uses += 1
        self._held = held if self._num_uses < self.num_readers else None
        return held[3]


class _Project(torch.autograd.Function):
    """X Q; keeps nothing but the factor."""

    @staticmethod
    def forward(ctx: Any, input_TN: torch.Tensor, right: BlockFactor) -> torch.Tensor:
        ctx.right, ctx.shape = right, input_TN.shape
        return right.project(input_TN.reshape(-1, input_TN.shape[-1]))

    @staticmethod
    def backward(ctx: Any, grad_TE: torch.Tensor) -> tuple[torch.Tensor | None, None]:
        return ctx.right.expand(grad_TE).view(ctx.shape), None
