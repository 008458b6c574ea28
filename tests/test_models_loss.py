from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from lsp_ray.models.layers import find_layers
from lsp_ray.models.loss import IGNORED, num_targets, num_tokens, summed_loss
from tests.tiny import CAUSAL_LMS, CLASSIFIERS, VOCAB_SIZE, Family, tiny_model

PROMPT_LENGTHS = (3, 1, 5)
LENGTHS = (9, 4, 7)


def language_batch() -> dict[str, torch.Tensor]:
    """Three rows of different length, padded on the right, whose prompts carry no loss."""
    token_ids = torch.randint(8, VOCAB_SIZE, (3, 9), generator=torch.Generator().manual_seed(1))
    mask, labels = torch.ones_like(token_ids), token_ids.clone()
    for row, (prompt, length) in enumerate(zip(PROMPT_LENGTHS, LENGTHS, strict=True)):
        token_ids[row, length:], mask[row, length:] = 0, 0
        labels[row, :prompt], labels[row, length:] = IGNORED, IGNORED
    return {"input_ids": token_ids, "attention_mask": mask, "labels": labels}


def classifier_batch() -> dict[str, torch.Tensor]:
    batch = language_batch()
    return {**batch, "labels": torch.tensor([0, 1, 1])}


def test_the_first_token_is_nobodys_target() -> None:
    batch = {"labels": torch.tensor([[5, 6, IGNORED], [IGNORED, 7, 8]])}
    assert num_targets(batch) == 3


def test_every_example_of_a_classifier_is_a_target() -> None:
    assert num_targets(classifier_batch()) == 3


def test_padding_is_not_counted_as_tokens() -> None:
    assert num_tokens(language_batch()) == sum(LENGTHS)


@pytest.mark.parametrize("family", CAUSAL_LMS)
def test_the_sum_is_transformers_mean_times_the_targets(family: Family) -> None:
    model, batch = tiny_model(family), language_batch()
    expected = model(**batch, use_cache=False).loss * num_targets(batch)
    torch.testing.assert_close(summed_loss(model, batch), expected, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_a_classifiers_sum_is_transformers_mean_times_the_examples(family: Family) -> None:
    model, batch = tiny_model(family), classifier_batch()
    expected = model(**batch).loss * num_targets(batch)
    torch.testing.assert_close(summed_loss(model, batch), expected, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("family", CLASSIFIERS)
@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_a_regressions_sum_is_transformers_mean_squared_error_times_the_examples(
    family: Family, shape: tuple[int, ...]
) -> None:
    config = tiny_model(family).config
    config.num_labels, config.problem_type = 1, "regression"
    model = AutoModelForSequenceClassification.from_config(config).eval()
    batch = {**language_batch(), "labels": torch.tensor([0.5, 4.75, -2.0]).view(shape)}
    expected = model(**batch).loss * num_targets(batch)
    assert num_targets(batch) == 3
    torch.testing.assert_close(summed_loss(model, batch), expected, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("family", CAUSAL_LMS)
def test_gradients_are_those_of_transformers_loss(family: Family) -> None:
    model, batch = tiny_model(family), language_batch()
    find_layers(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = torch.autograd.grad(model(**batch, use_cache=False).loss * num_targets(batch), trained)
    ours = torch.autograd.grad(summed_loss(model, batch), trained)
    for gradient, reference in zip(ours, expected, strict=True):  # float32 sums in another order
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_micro_batches_add_up_to_the_whole_batch(family: Family) -> None:
    model, batch = tiny_model(family), language_batch()
    parts = [{name: tensor[row : row + 1] for name, tensor in batch.items()} for row in range(3)]
    total = torch.stack([summed_loss(model, part) for part in parts]).sum()
    torch.testing.assert_close(total, summed_loss(model, batch), rtol=1e-5, atol=0.0)


def test_the_output_embedding_sees_only_positions_with_a_target() -> None:
    model, batch = tiny_model("llama"), language_batch()
    shapes = []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda _module, _inputs, output: shapes.append(tuple(output.shape)))
    summed_loss(model, batch)
    assert shapes == [(num_targets(batch), VOCAB_SIZE)]


def test_the_model_is_whole_again_after_the_loss_and_after_an_error() -> None:
    model, batch = tiny_model("llama"), language_batch()
    before = model(input_ids=batch["input_ids"]).logits
    summed_loss(model, batch)
    with pytest.raises(ValueError, match="input_ids"):
        summed_loss(model, {"labels": batch["labels"], "attention_mask": batch["attention_mask"]})
    torch.testing.assert_close(model(input_ids=batch["input_ids"]).logits, before, rtol=0.0, atol=0.0)


def test_a_batch_without_a_target_costs_nothing() -> None:
    batch = language_batch()
    batch["labels"] = torch.full_like(batch["labels"], IGNORED)
    loss = summed_loss(tiny_model("gemma"), batch)
    assert loss.item() == 0.0
    assert loss.requires_grad


def test_bfloat16_logits_are_summed_in_float32() -> None:
    model = tiny_model("llama").bfloat16()
    assert summed_loss(model, language_batch()).dtype == torch.float32
