"""Several examples in a row: each once, within the length, and none sees another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import Gemma2Config, GPT2Config, MistralConfig

from lsp_ray.data.micro_batches import Batch, MicroBatches
from lsp_ray.data.packing import PackedRows, collate_packed, pack
from lsp_ray.data.tokenize import IGNORED, TokenizedRows
from lsp_ray.errors import ConfigError
from lsp_ray.models.attention import check_packing
from lsp_ray.models.loss import num_targets, num_tokens, summed_loss
from tests.test_models_loss import Waits, training
from tests.tiny import CAUSAL_LMS, VOCAB_SIZE, Family, tiny_model, tiny_tokenizer
from tests.tiny_jobs import run_on_threads, tiny_job

LENGTH = 16


def examples(num_rows: int) -> Dataset:
    """Of 3 to 9 tokens, which tell their row; a prompt of one or two of them in every second row."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for row in range(num_rows):
        ids = torch.randint(8, VOCAB_SIZE, (3 + 5 * row % 7,), generator=generator).tolist()
        prompt = row % 2 * (1 + row % 3)
        rows.append({"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:]})
    return Dataset.from_list(rows)


def packed_batch(rows: Dataset) -> Batch:
    """All rows in one batch."""
    num_rows = len(PackedRows(rows, LENGTH))
    return batches_of(rows, batch_size=num_rows, pack_to=LENGTH).step(0)[0]


def batches_of(rows: Dataset, *, batch_size: int, pack_to: int | None) -> MicroBatches:
    return MicroBatches(
        TokenizedRows(train=rows, eval=rows, task="causal_lm", label_names=()),
        tiny_tokenizer(),
        batch_size=batch_size,
        accumulation=1,
        seed=0,
        max_steps=-1,
        num_train_epochs=1.0,
        max_eval_samples=100,
        pack_to=pack_to,
    )


@given(lengths=st.lists(st.integers(1, 40), max_size=60), length=st.integers(40, 60))
def test_every_example_is_in_one_row_and_no_two_rows_would_fit_into_one(lengths: list[int], length: int) -> None:
    groups = pack(lengths, length)
    sizes = sorted(sum(lengths[index] for index in group) for group in groups)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    assert all(0 < size <= length for size in sizes)
    assert len(sizes) < 2 or sizes[0] + sizes[1] > length


def test_positions_begin_anew_and_the_first_label_of_an_example_is_nobodys() -> None:
    rows = [
        [{"input_ids": [21, 22, 23], "labels": [21, 22, 23]}, {"input_ids": [31, 32], "labels": [31, 32]}],
        [{"input_ids": [41, 42, 43], "labels": [IGNORED, IGNORED, 43]}],
    ]
    assert {name: tensor.tolist() for name, tensor in collate_packed(rows, 7).items()} == {
        "input_ids": [[21, 22, 23, 31, 32], [41, 42, 43, 7, 7]],
        "labels": [[IGNORED, 22, 23, IGNORED, 32], [IGNORED, IGNORED, 43, IGNORED, IGNORED]],
        "position_ids": [[0, 1, 2, 0, 1], [0, 1, 2, 0, 0]],
        "examples": [[1, 1, 1, 2, 2], [1, 1, 1, 0, 0]],
    }


def test_an_epoch_has_every_token_once_in_fewer_steps() -> None:
    rows = examples(23)
    batches = batches_of(rows, batch_size=1, pack_to=LENGTH)
    assert batches.num_rows == batches.num_steps < 23
    trained = [batches.step(k)[0] for k in range(batches.num_steps)]
    assert sum(map(num_tokens, trained)) == sum(map(len, rows["input_ids"]))
    unpacked = [batch for k in range(23) for batch in batches_of(rows, batch_size=1, pack_to=None).step(k)]
    assert sum(map(num_targets, trained)) == sum(map(num_targets, unpacked))
    assert len(batches.eval_batches()) == 23  # held-out examples are not joined


@pytest.mark.parametrize("family", CAUSAL_LMS)
def test_packed_examples_have_the_loss_and_the_gradients_that_they_have_alone(family: Family) -> None:
    model, rows = training(tiny_model(family)), examples(12)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    alone = batches_of(rows, batch_size=12, pack_to=None).step(0)[0]
    packed = packed_batch(rows)
    found, expected = summed_loss(model, packed), summed_loss(model, alone)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0.0)
    for ours, reference in zip(
        torch.autograd.grad(found, trained), torch.autograd.grad(expected, trained), strict=True
    ):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)
    mixed = packed | {"examples": torch.ones_like(packed["examples"])}
    assert abs(float(summed_loss(model, mixed).detach()) / float(found.detach()) - 1) > 1e-4  # it would show


@pytest.mark.parametrize("family", CAUSAL_LMS)
def test_the_host_never_waits_for_a_packed_batch(family: Family) -> None:
    model, batch = training(tiny_model(family)), packed_batch(examples(12))
    with Waits():
        summed_loss(model, batch).backward()


def test_packing_is_refused_where_a_token_could_see_another_example_or_not_all_of_its_own() -> None:
    sdpa: dict[str, Any] = {"attn_implementation": "sdpa"}
    check_packing(MistralConfig(sliding_window=64, **sdpa), "causal_lm", 64)
    with pytest.raises(ConfigError, match="packing must be false for a classifier, got True"):
        check_packing(GPT2Config(**sdpa), "sequence_classification", 64)
    for config in (
        MistralConfig(sliding_window=63, **sdpa),
        Gemma2Config(**sdpa),
        GPT2Config(**(sdpa | {"attn_implementation": "eager"})),
    ):
        with pytest.raises(ConfigError, match=f"packing must be false for this {config.model_type} model, got True"):
            check_packing(config, "causal_lm", 64)


def test_a_run_with_packing_learns_and_takes_fewer_steps(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": -1, "max_seq_length": 32, "num_train_epochs": 0.5}
    plain, packed = (tiny_job(tmp_path, packing=packing, **options) for packing in (False, True))
    assert packed.num_steps < plain.num_steps / 2
    summary, _ = run_on_threads(packed, tmp_path / "packed")
    assert summary.eval_loss_after < summary.eval_loss_before - 0.1


def test_packing_of_a_classifiers_rows_is_refused_before_a_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="packing must be false for a classifier, got True"):
        tiny_job(tmp_path, "bert", packing=True)
