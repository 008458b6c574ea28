from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForSequenceClassification,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from lsp_ray.models.layers import find_layers
from lsp_ray.models.loss import IGNORED, Batch, num_targets, num_tokens, summed_loss, target_positions
from tests.tiny import CAUSAL_LMS, CLASSIFIERS, VOCAB_SIZE, Family, tiny_model

PROMPT_LENGTHS = (3, 1, 5)
LENGTHS = (9, 4, 7)
TINY_CHUNK = 5 * VOCAB_SIZE  # of logits: the batch has 11 targets
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


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


# without the host waiting for a device


class Waits(TorchDispatchMode):
    """Fails at the first operator for which the host waits for a GPU."""

    NAMES = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "unique")
    BY_INDEX = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = func._schema.name.removeprefix("aten::")
        is_bool = name in self.BY_INDEX and any(index is not None and index.dtype == torch.bool for index in args[1])
        waits = is_bool or name in self.NAMES
        assert not waits, f"the host waits for {name}"
        return func(*args, **(kwargs or {}))


def read_batch() -> dict[str, torch.Tensor]:
    """The batch with what a reader adds."""
    batch = language_batch()
    return batch | {"positions": target_positions(batch["labels"])}


def training(model: PreTrainedModel) -> PreTrainedModel:
    find_layers(model)
    model.train()
    return model


def loss_and_gradients(model: PreTrainedModel, batch: Batch, **options: int) -> list[torch.Tensor]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = summed_loss(model, batch, **options)
    return [loss.detach(), *torch.autograd.grad(loss / 7, trained)]


@pytest.mark.parametrize("chunk_logits", [1 << 25, TINY_CHUNK])
@pytest.mark.parametrize("family", CAUSAL_LMS)
def test_the_host_never_waits_for_a_batch_that_the_reader_prepared(family: Family, chunk_logits: int) -> None:
    model, batch = training(tiny_model(family)), read_batch()
    summed_loss(model, batch, chunk_logits=chunk_logits)  # looks at the head, once
    with Waits():
        (summed_loss(model, batch, chunk_logits=chunk_logits) / 11).backward()


def test_the_check_finds_a_wait() -> None:
    model = training(tiny_model("llama"))
    with pytest.raises(AssertionError, match="nonzero"), Waits():
        summed_loss(model, language_batch())
    with pytest.raises(AssertionError, match="index"), Waits():
        language_batch()["labels"][torch.ones(3, 9, dtype=torch.bool)]


@pytest.mark.parametrize("family", CAUSAL_LMS)
def test_without_a_mask_padding_changes_no_bit_of_what_counts(family: Family) -> None:
    """Heads that share keys add their gradients in another order, as transformers does for an unpadded batch."""
    model = training(tiny_model(family))
    with_mask = loss_and_gradients(model, language_batch())
    without = loss_and_gradients(model, read_batch())
    assert torch.equal(without[0], with_mask[0])
    shares_keys = getattr(model.config, "num_key_value_heads", 4) < 4
    for ours, reference in zip(without, with_mask, strict=True):
        torch.testing.assert_close(ours, reference, rtol=0.0, atol=1e-6 if shares_keys else 0.0)


@pytest.mark.parametrize("window", [4, 9])
def test_a_window_that_is_shorter_than_the_batch_is_kept(window: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = training(MistralForCausalLM(MistralConfig(sliding_window=window, **SIZES)))
    expected = loss_and_gradients(model, language_batch())
    for ours, reference in zip(loss_and_gradients(model, read_batch()), expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=0.0, atol=0.0)


def test_attention_is_as_it_was_after_the_loss() -> None:
    model = tiny_model("llama")
    summed_loss(model, read_batch())
    assert model.config._attn_implementation == "sdpa"


def test_blocks_that_are_computed_again_do_the_same_without_a_mask() -> None:
    model = training(tiny_model("llama"))
    model.enable_input_require_grads()  # as when layers before the first block are trained
    expected = loss_and_gradients(model, read_batch())
    model.activation_checkpointing_enable({"use_reentrant": False})
    for ours, reference in zip(loss_and_gradients(model, read_batch()), expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=0.0, atol=0.0)


# in chunks


@pytest.mark.parametrize("family", CAUSAL_LMS)
def test_in_chunks_the_loss_and_its_gradients_are_the_same(family: Family) -> None:
    model = training(tiny_model(family))
    expected = loss_and_gradients(model, read_batch())
    shapes = []
    head = model.get_output_embeddings()
    loss_and_gradients(model, read_batch(), chunk_logits=TINY_CHUNK)
    handle = head.register_forward_hook(lambda _module, _inputs, output: shapes.append(tuple(output.shape)))
    found = loss_and_gradients(model, read_batch(), chunk_logits=TINY_CHUNK)
    handle.remove()
    assert shapes == [(0, VOCAB_SIZE)]  # the head itself made no logits
    for ours, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)


def scaled_models() -> dict[str, PreTrainedModel]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return {
            "capped": Gemma2ForCausalLM(Gemma2Config(final_logit_softcapping=0.5, **SIZES)),
            "scaled": CohereForCausalLM(CohereConfig(logit_scale=0.25, **SIZES)),
        }


@pytest.mark.parametrize("name", ["capped", "scaled"])
def test_logits_that_are_capped_or_scaled_go_the_plain_way(name: str) -> None:
    model = training(scaled_models()[name])
    expected = loss_and_gradients(model, read_batch())
    for ours, reference in zip(loss_and_gradients(model, read_batch(), chunk_logits=TINY_CHUNK), expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=0.0, atol=0.0)


def test_a_head_that_is_trained_gets_its_gradient() -> None:
    model = training(tiny_model("llama"))
    head = model.get_output_embeddings()
    head.requires_grad_(True)
    expected = loss_and_gradients(model, read_batch())
    for ours, reference in zip(loss_and_gradients(model, read_batch(), chunk_logits=TINY_CHUNK), expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=0.0, atol=0.0)


def test_without_a_graph_chunks_make_the_loss_alone() -> None:
    model = tiny_model("llama").requires_grad_(False)
    with torch.no_grad():
        plain, chunked = (summed_loss(model, read_batch(), chunk_logits=size) for size in (1 << 25, TINY_CHUNK))
    torch.testing.assert_close(chunked, plain, rtol=1e-6, atol=0.0)
    assert not chunked.requires_grad


def test_a_weight_that_is_not_finite_makes_the_loss_and_the_gradients_so() -> None:
    model = training(tiny_model("llama"))
    with torch.no_grad():
        model.get_output_embeddings().weight[3, 3] = torch.nan
    for part in loss_and_gradients(model, read_batch(), chunk_logits=TINY_CHUNK):
        assert not part.isfinite().all()
