"""The training loss: a sum over what is predicted, so that micro-batches add up to exactly one larger batch.

Legend: B rows, S tokens of each, K positions with a target, H hidden features, V tokens of the vocabulary, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from transformers import PreTrainedModel

from lsp_ray.models.attention import block_mask, is_plainly_causal, without_mask
from lsp_ray.models.output_head import frozen_head
from lsp_ray.models.piecewise_loss import piecewise_loss

IGNORED = -100  # transformers' label of a token without loss

Batch = Mapping[str, torch.Tensor]

NOT_THE_MODELS = ("labels", "positions", "examples")
"""What a batch holds for the loss alone."""


def num_targets(batch: Batch) -> int:
    """Predictions that count in this batch: tokens with a label after the first, or examples of a classifier."""
    labels = batch["labels"]
    is_language = labels.ndim == 2 and not labels.is_floating_point()
    return int((labels[:, 1:] != IGNORED).sum()) if is_language else labels.shape[0]


def num_tokens(batch: Batch) -> int:
    """Tokens that are no padding."""
    return int(is_token(batch).sum())


def is_token(batch: Batch) -> torch.Tensor:
    """Which places of a batch hold no padding, of its shape."""
    return batch["examples" if "examples" in batch else "attention_mask"] != 0


def summed_loss(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Return the loss summed over the batch's targets, a float32 scalar with its graph.

    It is the cross entropy, or where labels are floats the squared error of the only output (transformers' regression).

    For a causal LM only positions with a target go through the output embedding: with masked prompts most of the
    logits, the largest activation of a small model, are never computed. Through one that is frozen they go piece by
    piece, see `piecewise_loss`.

    Where the batch brings `examples`, several in a row, a token sees no other example than its own (`check_packing`).
    Where it brings `positions`, as `MicroBatches` makes them, the host never waits for the model's device.

    Args:
        model: A language model's, a classifier's.
        batch: On the model's device.
    """
    labels = batch["labels"]
    inputs = {name: tensor for name, tensor in batch.items() if name not in NOT_THE_MODELS}
    if labels.is_floating_point() or labels.ndim == 1:
        return label_loss(model(**inputs).logits, labels)
    if "examples" in batch:
        inputs["attention_mask"] = block_mask(batch["examples"])
    positions_K = batch.get("positions")
    # positions come with right padding alone
    needs_mask = positions_K is None or "examples" in batch or not is_plainly_causal(model.config, labels.shape[1])
    if positions_K is None:
        positions_K = target_positions(labels)
    targets_K = labels.flatten()[1:].index_select(0, positions_K)
    output, head = model.get_output_embeddings(), frozen_head(model)
    attention = nullcontext() if needs_mask else without_mask(model)
    with attention, _only(output, positions_K, dry=head is not None) as hidden:
        logits_KV = model(**inputs, use_cache=False).logits
    if head is not None:
        return piecewise_loss(hidden[0], head, targets_K)
    return cross_entropy(logits_KV.float(), targets_K, reduction="sum")


def target_positions(labels_BS: torch.Tensor) -> torch.Tensor:
    """Return the K positions of (B·S) whose next token has a label, in row-major order; for a GPU's it waits."""
    is_kept_BS = torch.zeros_like(labels_BS, dtype=torch.bool)
    is_kept_BS[:, :-1] = labels_BS[:, 1:] != IGNORED
    return is_kept_BS.flatten().nonzero()[:, 0]


def label_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The same of a classifier's (B, C) logits and B labels; where labels are floats, of its only output."""
    if labels.is_floating_point():
        return mse_loss(logits.float().reshape(labels.shape), labels.float(), reduction="sum")
    return cross_entropy(logits.float(), labels, reduction="sum")


@contextmanager
def _only(head: nn.Module, positions_K: torch.Tensor, *, dry: bool) -> Iterator[list[torch.Tensor]]:
    """Within the context `head` sees (K, H): the hidden states of the positions; dry, none, and the list gets them."""
    hidden: list[torch.Tensor] = []

    def select(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden_KH = args[0].flatten(0, 1).index_select(0, positions_K)
        if dry:
            hidden.append(hidden_KH)
            hidden_KH = hidden_KH[:0]
        return (hidden_KH, *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield hidden
    finally:
        handle.remove()
