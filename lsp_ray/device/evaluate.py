"""What a model does without training: its loss and scores, an answer, a label. Every delta must have been added before.

Legend: B examples, C classes, S tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from transformers import GenerationConfig, PreTrainedModel

from lsp_ray.models.loss import Batch, label_loss, num_targets, summed_loss
from lsp_ray.special_tokens import SpecialTokens

ANSWERS_AT_ONCE = 8  # prompts that are continued together
_LARGEST_EXPONENT = 700.0  # a loss above it has a perplexity that no float holds


def mean_loss(model: PreTrainedModel, batches: Sequence[Batch]) -> float:
    """Mean loss over all targets of the batches."""
    total, count = 0.0, 0
    with _evaluating(model):
        for batch in batches:
            total += float(summed_loss(model, _on_device_of(model, batch)))
            count += num_targets(batch)
    return total / max(count, 1)


def language_scores(model: PreTrainedModel, batches: Sequence[Batch]) -> dict[str, float]:
    """A causal language model's mean loss and perplexity."""
    loss = mean_loss(model, batches)
    return {"loss": loss, "perplexity": math.exp(min(loss, _LARGEST_EXPONENT))}


def class_scores(model: PreTrainedModel, batches: Sequence[Batch]) -> dict[str, float]:
    """A classifier's mean loss, accuracy, F1 and Matthews' correlation, as scikit-learn counts them.

    With two classes F1 is that of the second, as GLUE has it; with more it is the mean over the classes.
    """
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef  # a second to import, unused elsewhere

    loss, predicted, expected = _answers(model, batches)
    average = "binary" if max((1, *predicted, *expected)) == 1 else "macro"
    return {
        "loss": loss,
        "accuracy": float(accuracy_score(expected, predicted)),
        "f1": float(f1_score(expected, predicted, average=average, zero_division=0.0)),
        "matthews": float(matthews_corrcoef(expected, predicted)),
    }


def number_scores(model: PreTrainedModel, batches: Sequence[Batch]) -> dict[str, float]:
    """A regression's mean squared error and Pearson's correlation, as scipy has it; 0 where one side is constant."""
    from scipy.stats import pearsonr

    loss, predicted, expected = _answers(model, batches)
    varies = len({*predicted}) > 1 and len({*expected}) > 1
    return {"loss": loss, "pearson": float(pearsonr(expected, predicted).statistic) if varies else 0.0}


def generate(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, tokens: SpecialTokens
) -> list[list[int]]:
    """Continue prompts greedily; returns the new tokens of each, at most `max_new_tokens`, padding after its end."""
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=list(tokens.ends) or None,
        pad_token_id=tokens.pad,
    )
    answers: list[list[int]] = []
    with _evaluating(model):
        for first in range(0, len(prompts), ANSWERS_AT_ONCE):
            inputs = _on_device_of(model, _left_padded(prompts[first : first + ANSWERS_AT_ONCE], tokens.pad))
            output_BS = model.generate(**inputs, generation_config=greedy)  # type: ignore[operator]
            answers += output_BS[:, inputs["input_ids"].shape[1] :].tolist()
    return answers


def predict(model: PreTrainedModel, inputs: Batch) -> list[float]:
    """A classifier's most likely label of every row; where the model has one output alone, that number."""
    with _evaluating(model):
        return _most_likely(model(**_on_device_of(model, inputs)).logits)


def _answers(model: PreTrainedModel, batches: Sequence[Batch]) -> tuple[float, list[float], list[float]]:
    """The mean loss, what the model says of every row, and what the data says, in one pass."""
    total, predicted, expected = 0.0, list[float](), list[float]()
    with _evaluating(model):
        for batch in batches:
            inputs = _on_device_of(model, batch)
            labels = inputs.pop("labels")
            logits_BC = model(**inputs).logits
            total += float(label_loss(logits_BC, labels))
            predicted += _most_likely(logits_BC)
            expected += labels.reshape(-1).tolist()
    return total / max(len(expected), 1), predicted, expected


def _most_likely(logits_BC: torch.Tensor) -> list[float]:
    answers_B: torch.Tensor = logits_BC[:, 0].float() if logits_BC.shape[1] == 1 else logits_BC.argmax(dim=-1)
    return list(answers_B.tolist())


def _left_padded(prompts: Sequence[Sequence[int]], pad: int) -> dict[str, torch.Tensor]:
    """On the left, so that every answer follows its prompt."""
    longest = max(len(prompt) for prompt in prompts)
    ids = [[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Within the context: no dropout, no graph."""
    model.eval()
    with torch.no_grad():
        yield
    model.train()


def _on_device_of(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(model.device) for name, tensor in batch.items()}
