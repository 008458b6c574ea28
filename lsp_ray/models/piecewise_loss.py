"""The cross entropy behind a frozen output embedding, through pieces of the vocabulary: each of its rows is read once.

As flash attention goes through keys (Dao et al. 2022, after Milakov and Gimelshein, "Online normalizer calculation for
softmax", 2018), each position keeps of the scores that it has seen the logarithm of their summed exponentials, and the
mean of the rows that gave them, weighted by their softmax. The target's own row stays out of both. With q = 1 -
p_target the gradient of a hidden state is q (mean - W_target), which is exact where a token is all but certain, and the
loss is softplus(logsumexp - score of the target).

Legend: K positions with a target, C of them at one time, H hidden features, P rows of a piece of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import softplus

from lsp_ray.models.output_head import HeadPieces
from lsp_ray.schedule.head_pieces import CHUNK_LOGITS, positions_at_once

_LOWEST = torch.finfo(torch.float32).min  # and finite: there is a difference to it


def piecewise_loss(
    hidden_KH: torch.Tensor, head: HeadPieces, targets_K: torch.Tensor, chunk_logits: int = CHUNK_LOGITS
) -> torch.Tensor:
    """Return the summed cross entropy of the head's scores of `hidden_KH`, a float32 scalar with its graph.

    The gradient of the hidden states is made in the forward, when a piece's scores are at hand: nothing of the size of
    the vocabulary stays for the backward, and nothing is computed twice.
    """
    loss: torch.Tensor = _PiecewiseLoss.apply(hidden_KH, head, targets_K, chunk_logits)  # type: ignore[no-untyped-call]
    return loss


class _PiecewiseLoss(torch.autograd.Function):
    """See `sim.memory.loss_bytes` for its peak."""

    @staticmethod
    def forward(
        ctx: Any, hidden_KH: torch.Tensor, head: HeadPieces, targets_K: torch.Tensor, chunk_logits: int
    ) -> torch.Tensor:
        seen = _Seen(hidden_KH, targets_K, with_gradient=ctx.needs_input_grad[0])
        size, scratch = 0, None
        for first, weight_PH, bias_P in head.pieces():
            if scratch is None:  # no piece is larger than the first
                size = positions_at_once(hidden_KH.shape[0], weight_PH.shape[0], chunk_logits)
                scratch = _Scratch(size * max(weight_PH.shape), hidden_KH.device)
            for start in range(0, hidden_KH.shape[0], size):
                seen.add(slice(start, start + size), first, weight_PH, bias_P, scratch)
        del scratch
        loss, grad_KH = seen.ended()
        ctx.save_for_backward(grad_KH)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        (grad_KH,) = ctx.saved_tensors
        # one dimension makes the product float32's before it is rounded: a scalar would be rounded first
        scaled_KH = torch.mul(grad_KH, grad.view(1), out=torch.empty_like(grad_KH))
        return scaled_KH, None, None, None


class _Scratch:
    """Memory for two tables in float32, made once: on a CPU fresh pages take longer than what is written to them."""

    def __init__(self, numel: int, device: torch.device) -> None:
        self._memory = torch.empty(2, numel, dtype=torch.float32, device=device)

    def table(self, number: int, shape: tuple[int, int], dtype: torch.dtype, *, half: int = 0) -> torch.Tensor:
        """A table of this shape in the first or the second one's place; of 2 bytes, there are halves of each."""
        flat, numel = self._memory[number].view(dtype), shape[0] * shape[1]
        start = half * (flat.numel() // 2)
        return flat[start : start + numel].view(shape)


class _Seen:
    """What each position keeps of the pieces that it has gone through."""

    def __init__(self, hidden_KH: torch.Tensor, targets_K: torch.Tensor, *, with_gradient: bool) -> None:
        self._hidden_KH, self._targets_K1 = hidden_KH, targets_K[:, None]
        self._sum_K1 = hidden_KH.new_full((hidden_KH.shape[0], 1), _LOWEST, dtype=torch.float32)
        self._target_K1 = torch.full_like(self._sum_K1, torch.nan)  # of a target that is in no piece
        self._mean_KH = self._target_KH = None
        if with_gradient:
            self._mean_KH = torch.zeros_like(hidden_KH, dtype=torch.float32)
            self._target_KH = torch.empty_like(hidden_KH)

    def add(
        self, chunk: slice, first: int, weight_PH: torch.Tensor, bias_P: torch.Tensor | None, scratch: _Scratch
    ) -> None:
        """Let these positions go through a piece, whose first row has this number."""
        scores_CP = _scores(self._hidden_KH[chunk], weight_PH, bias_P, scratch)
        behind_C1 = self._targets_K1[chunk] - first
        place_C1 = behind_C1.clamp(0, weight_PH.shape[0] - 1)
        is_here_C1 = place_C1 == behind_C1
        found_C1, target_C1 = scores_CP.gather(1, place_C1), self._target_K1[chunk]
        torch.where(is_here_C1, found_C1, target_C1, out=target_C1)
        scores_CP.scatter_(1, place_C1, found_C1.masked_fill_(is_here_C1, _LOWEST))
        largest_C1 = scores_CP.amax(1, keepdim=True)
        shape = scores_CP.shape[0], scores_CP.shape[1]
        softmax_CP = torch.softmax(scores_CP, 1, out=scratch.table(1, shape, torch.float32))
        added_C1, sum_C1 = largest_C1 - softmax_CP.amax(1, keepdim=True).log_(), self._sum_K1[chunk]
        if self._mean_KH is not None and self._target_KH is not None:
            mean_CH = _products(softmax_CP, weight_PH, scratch)
            self._mean_KH[chunk].lerp_(mean_CH, (added_C1 - sum_C1).sigmoid_())
            target_CH = self._target_KH[chunk]
            rows_CH = scratch.table(0, (target_CH.shape[0], target_CH.shape[1]), weight_PH.dtype)
            torch.index_select(weight_PH, 0, place_C1[:, 0], out=rows_CH)
            torch.where(is_here_C1, rows_CH, target_CH, out=target_CH)
        torch.logaddexp(sum_C1, added_C1, out=sum_C1)

    def ended(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The loss, and the gradient of the hidden states."""
        margin_K1 = self._sum_K1 - self._target_K1 + 0.0 * self._target_K1  # an infinite score is no certainty
        loss = softplus(margin_K1).sum()
        if self._mean_KH is None or self._target_KH is None:
            return loss, None
        grad_KH = self._mean_KH.sub_(self._target_KH).mul_(margin_K1.sigmoid_())
        return loss, grad_KH.to(self._hidden_KH.dtype)


def _scores(
    hidden_CH: torch.Tensor, weight_PH: torch.Tensor, bias_P: torch.Tensor | None, scratch: _Scratch
) -> torch.Tensor:
    """In float32, in the first table's place."""
    shape = hidden_CH.shape[0], weight_PH.shape[0]
    is_whole = weight_PH.dtype == torch.float32
    scores_CP = scratch.table(0 if is_whole else 1, shape, weight_PH.dtype)
    if bias_P is None:
        torch.mm(hidden_CH, weight_PH.t(), out=scores_CP)
    else:
        torch.addmm(bias_P, hidden_CH, weight_PH.t(), out=scores_CP)
    return scores_CP if is_whole else scratch.table(0, shape, torch.float32).copy_(scores_CP)


def _products(softmax_CP: torch.Tensor, weight_PH: torch.Tensor, scratch: _Scratch) -> torch.Tensor:
    """Of what is in the second table's place, in float32; neither of the two holds anything else by then."""
    shape = softmax_CP.shape[0], weight_PH.shape[1]
    if weight_PH.dtype == torch.float32:
        return torch.mm(softmax_CP, weight_PH, out=scratch.table(0, shape, torch.float32))
    rounded_CP = scratch.table(0, (shape[0], weight_PH.shape[0]), weight_PH.dtype).copy_(softmax_CP)
    products_CH = torch.mm(rounded_CP, weight_PH, out=scratch.table(0, shape, weight_PH.dtype, half=1))
    return scratch.table(1, shape, torch.float32).copy_(products_CH)
