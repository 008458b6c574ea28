from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
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
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from lsp_ray.models.layers import find_layers
from lsp_ray.models.load import load_skeleton
from lsp_ray.models.loss import IGNORED, Batch, num_targets, num_tokens, summed_loss, target_positions
from lsp_ray.models.output_head import host_tables, is_frozen_and_plain
from tests.tiny import CAUSAL_LMS, CLASSIFIERS, FAMILIES, VOCAB_SIZE, Family, task_of, tiny_model, write_tiny_model

PROMPT_LENGTHS = (3, 1, 5)
LENGTHS = (9, 4, 7)
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


def loss_and_gradients(model: PreTrainedModel, batch: Batch) -> list[torch.Tensor]:
    return with_gradients(model, summed_loss(model, batch))


def plain_loss_and_gradients(model: PreTrainedModel, batch: Batch) -> list[torch.Tensor]:
    inputs = {name: tensor for name, tensor in batch.items() if name != "positions"}
    return with_gradients(model, model(**inputs, use_cache=False).loss * num_targets(batch))


def with_gradients(model: PreTrainedModel, loss: torch.Tensor) -> list[torch.Tensor]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss / 7, trained)]


@pytest.mark.parametrize("is_frozen", [True, False])
@pytest.mark.parametrize("family", CAUSAL_LMS)
def test_the_host_never_waits_for_a_batch_that_the_reader_prepared(family: Family, is_frozen: bool) -> None:
    model, batch = training(tiny_model(family)), read_batch()
    model.get_output_embeddings().requires_grad_(not is_frozen)
    with Waits():
        (summed_loss(model, batch) / 11).backward()


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


# through pieces of a frozen output embedding


@pytest.mark.parametrize("family", CAUSAL_LMS)
def test_through_pieces_the_loss_and_its_gradients_are_transformers_own(family: Family) -> None:
    model, batch = training(tiny_model(family)), read_batch()
    shapes = []
    handle = model.get_output_embeddings().register_forward_hook(
        lambda _module, _inputs, output: shapes.append(tuple(output.shape))
    )
    found = loss_and_gradients(model, batch)
    handle.remove()
    assert shapes[-1] == (0, VOCAB_SIZE), "the head itself makes no logits"
    for ours, reference in zip(found, plain_loss_and_gradients(model, batch), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-6)  # float32 sums in another order


def scaled_models() -> dict[str, PreTrainedModel]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return {
            "capped": Gemma2ForCausalLM(Gemma2Config(final_logit_softcapping=0.5, **SIZES)),
            "scaled": CohereForCausalLM(CohereConfig(logit_scale=0.25, **SIZES)),
        }


@pytest.mark.parametrize("name", ["capped", "scaled"])
def test_logits_that_are_capped_or_scaled_go_the_plain_way(name: str) -> None:
    model, batch = training(scaled_models()[name]), read_batch()
    assert not is_frozen_and_plain(model)
    expected = plain_loss_and_gradients(model, batch)
    for ours, reference in zip(loss_and_gradients(model, batch), expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)


def test_to_ask_what_a_head_gives_draws_no_random_number_and_leaves_the_model_as_it_was() -> None:
    config = OPTConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    model = OPTForCausalLM(config)
    model.requires_grad_(False).train()  # it goes to its decoder past its base, and that drops out
    before = torch.get_rng_state()
    assert is_frozen_and_plain(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in model.modules())


def test_a_head_that_is_trained_gets_its_gradient() -> None:
    model, batch = training(tiny_model("llama")), read_batch()
    model.get_output_embeddings().requires_grad_(True)
    expected = plain_loss_and_gradients(model, batch)
    for ours, reference in zip(loss_and_gradients(model, batch), expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_skeleton_says_what_the_model_does_of_which_tables_could_stay_in_main_memory(
    tmp_path: Path, family: Family
) -> None:
    write_tiny_model(tmp_path, family)
    skeleton, model = load_skeleton(tmp_path, task=task_of(family)), tiny_model(family)
    for each in (skeleton, model):
        find_layers(each)
        tables = host_tables(each)
        is_tied = getattr(each.config, "tie_word_embeddings", False)
        assert len(tables.weights) == (1 if is_tied or family in CLASSIFIERS else 2)
        assert tables.embedding is each.get_input_embeddings()
        assert tables.head is (None if family in CLASSIFIERS else each.get_output_embeddings())
        assert tables.numel == len(tables.weights) * VOCAB_SIZE * 64


def test_a_table_that_is_shared_with_a_head_on_the_device_is_there_too() -> None:
    model = training(scaled_models()["scaled"])
    assert host_tables(model).weights == []


def test_a_weight_that_is_not_finite_makes_the_loss_and_the_gradients_so() -> None:
    model = training(tiny_model("llama"))
    with torch.no_grad():
        model.get_output_embeddings().weight[3, 3] = torch.nan
    for part in loss_and_gradients(model, read_batch()):
        assert not part.isfinite().all()
