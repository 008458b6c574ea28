"""What a model does without training: its loss, an answer, a label. Every delta must have been added before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import GenerationConfig, PreTrainedModel

from lsp_ray.models.loss import Batch, num_targets, summed_loss


def mean_loss(model: PreTrainedModel, batches: Sequence[Batch]) -> float:
    """Mean loss over all targets of the batches."""
    total, count = 0.0, 0
    with _evaluating(model):
        for batch in batches:
            total += float(summed_loss(model, _on_device_of(model, batch)))
            count += num_targets(batch)
    return total / max(count, 1)


def generate(model: PreTrainedModel, inputs: Batch, max_new_tokens: int) -> list[int]:
    """Continue one prompt greedily; returns the new tokens, at most `max_new_tokens`."""
    config = model.config
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.eos_token_id if config.pad_token_id is None else config.pad_token_id,
    )
    with _evaluating(model):
        output_1S = model.generate(**_on_device_of(model, inputs), generation_config=greedy)  # type: ignore[operator]
    return [int(token) for token in output_1S[0, inputs["input_ids"].shape[1] :]]


def predict(model: PreTrainedModel, inputs: Batch) -> list[int]:
    """A classifier's most likely label of every row."""
    with _evaluating(model):
        labels_B = model(**_on_device_of(model, inputs)).logits.argmax(dim=-1)
    return [int(label) for label in labels_B]


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Within the context: no dropout, no graph."""
    model.eval()
    with torch.no_grad():
        yield
    model.train()


def _on_device_of(model: PreTrainedModel, batch: Batch) -> dict[str, torch.Tensor]:
    return {name: tensor.to(model.device) for name, tensor in batch.items()}
