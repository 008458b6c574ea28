"""The training loss: a sum over what is predicted, so that micro-batches add up to exactly one larger batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from transformers import PreTrainedModel

IGNORED = -100  # transformers' label of a token without loss

Batch = Mapping[str, torch.Tensor]


def num_targets(batch: Batch) -> int:
    """Predictions that count in this batch: tokens with a label after the first, or examples of a classifier."""
    labels = batch["labels"]
    is_language = labels.ndim == 2 and not labels.is_floating_point()
    return int((labels[:, 1:] != IGNORED).sum()) if is_language else labels.shape[0]


def num_tokens(batch: Batch) -> int:
    """Tokens that are no padding."""
    return int(batch["attention_mask"].sum())


def summed_loss(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Return the loss summed over the batch's targets, a float32 scalar with its graph.

    It is the cross entropy, or where labels are floats the squared error of the only output (transformers' regression).

    For a causal LM only positions with a target go through the output embedding: with masked prompts most of the
    logits, the largest activation of a small model, are never computed.
    """
    labels = batch["labels"]
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    if labels.is_floating_point() or labels.ndim == 1:
        return label_loss(model(**inputs).logits, labels)
    targets_BS = torch.full_like(labels, IGNORED)
    targets_BS[:, :-1] = labels[:, 1:]
    keep_BS = targets_BS != IGNORED
    head = model.get_output_embeddings()
    with _only_positions(head, keep_BS):
        logits_KV = model(**inputs, use_cache=False).logits
    return cross_entropy(logits_KV.float(), targets_BS[keep_BS], reduction="sum")


def label_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The same of a classifier's (B, C) logits and B labels; where labels are floats, of its only output."""
    if labels.is_floating_point():
        return mse_loss(logits.float().reshape(labels.shape), labels.float(), reduction="sum")
    return cross_entropy(logits.float(), labels, reduction="sum")


@contextmanager
def _only_positions(head: nn.Module, keep_BS: torch.Tensor) -> Iterator[None]:
    """Within the context `head` sees (K, H): the hidden states of the positions kept, in row-major order."""

    def select(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (args[0][keep_BS], *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()
