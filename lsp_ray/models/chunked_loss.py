"""The cross entropy behind a frozen output embedding, in chunks of positions: no more logits than one chunk's at once.

Legend: K positions with a target, H hidden features, V tokens of the vocabulary.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, log_softmax, nll_loss
from transformers import PreTrainedModel

from lsp_ray.models.load import silenced

CHUNK_LOGITS = 1 << 25
"""Logits made at one time, 128 MB of them in float32; fewer in all are not worth a chunk."""

_is_plain: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # heads that were asked for


def chunked_loss(hidden_KH: torch.Tensor, head: nn.Linear, targets_K: torch.Tensor, chunk_logits: int) -> torch.Tensor:
    """Return the summed cross entropy of `head(hidden_KH)`, a float32 scalar with its graph.

    The gradient of the hidden states is made in the forward, when a chunk's logits are at hand: nothing of the size of
    the vocabulary stays for the backward, and nothing is computed twice.
    """
    loss: torch.Tensor = _ChunkedLoss.apply(hidden_KH, head.weight, head.bias, targets_K, chunk_logits)  # type: ignore[no-untyped-call]
    return loss


def is_frozen_and_plain(model: PreTrainedModel) -> bool:
    """Whether the model's logits are its output embedding's answer as it is, and that embedding is not trained.

    Some models scale logits or cap them: the answer is found from a forward of one token, once for each model.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or any(parameter.requires_grad for parameter in head.parameters()):
        return False
    if head not in _is_plain:
        _is_plain[head] = _gives_logits(head, model)
    return _is_plain[head]


def _gives_logits(head: nn.Linear, model: PreTrainedModel) -> bool:
    seen: list[tuple[torch.Tensor, int]] = []  # with its version: what is changed in place is another tensor
    handle = head.register_forward_hook(lambda _module, _args, output: seen.append((output, output._version)))
    training = [(module, module.training) for module in model.modules()]
    token = int(model.config.get_text_config().pad_token_id == 0)  # of padding alone some models warn
    try:
        with torch.no_grad(), silenced():
            model.train(False)  # no random number is drawn
            logits = model(input_ids=torch.full((1, 1), token, device=head.weight.device), use_cache=False).logits
    finally:
        handle.remove()
        for module, was_training in training:
            module.training = was_training
    return len(seen) == 1 and logits is seen[0][0] and logits._version == seen[0][1]


class _ChunkedLoss(torch.autograd.Function):
    """Peak beside inputs: 8 bytes for each of a chunk's logits, and the gradient of `hidden_KH`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_KH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_K: torch.Tensor,
        chunk_logits: int,
    ) -> torch.Tensor:
        size = positions_at_once(hidden_KH.shape[0], weight_VH.shape[0], chunk_logits)
        grad_KH = torch.empty_like(hidden_KH) if ctx.needs_input_grad[0] else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden_KH.device)
        minus_ones_C1 = loss.new_full((size, 1), -1.0)
        for first in range(0, hidden_KH.shape[0], size):
            chunk = slice(first, first + size)
            targets_C = targets_K[chunk]
            scores_CV = log_softmax(linear(hidden_KH[chunk], weight_VH, bias_V).float(), dim=-1)
            loss += nll_loss(scores_CV, targets_C, reduction="sum")
            if grad_KH is not None:  # of the logits: softmax, less one at the target
                scores_CV.exp_().scatter_add_(1, targets_C[:, None], minus_ones_C1)
                torch.mm(scores_CV.to(weight_VH.dtype), weight_VH, out=grad_KH[chunk])
            del scores_CV  # before the next chunk's come
        ctx.save_for_backward(grad_KH)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None, None]:
        (grad_KH,) = ctx.saved_tensors
        # one dimension makes the product float32's before it is rounded: a scalar would be rounded first
        scaled_KH = torch.mul(grad_KH, grad.view(1), out=torch.empty_like(grad_KH))
        return scaled_KH, None, None, None, None


def positions_at_once(num_positions: int, vocabulary: int, chunk_logits: int) -> int:
    """Positions in each chunk, as even as they can be."""
    num_chunks = max(1, -(-num_positions // max(1, chunk_logits // vocabulary)))
    return max(1, -(-num_positions // num_chunks))
