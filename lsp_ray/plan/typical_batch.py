"""TypicalBatch: how long micro-batches of a data set are, and how many of their tokens have a target."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from datasets import Dataset

from lsp_ray.data.chat import template_columns
from lsp_ray.data.dataset import load_rows
from lsp_ray.data.micro_batches import MicroBatches
from lsp_ray.data.tokenize import LONGEST, tokenize_rows
from lsp_ray.models.load import load_config, load_tokenizer, num_positions
from lsp_ray.models.loss import num_targets

_NUM_ROWS = 1024  # drawn from a data set: enough for means within some percent, few enough to tokenize in a second
_NUM_BATCHES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class TypicalBatch:
    """Means over micro-batches: tokens to which one is padded, and its predictions that count."""

    padded_length: int
    num_targets: int
    max_length: int
    """Tokens kept of an example."""


def typical_batch(
    dataset: str,
    folder: Path,
    *,
    batch_size: int,
    max_seq_length: int | None,
    seed: int = 42,
    packing: bool = False,
    groups_by_length: bool = False,
) -> TypicalBatch:
    """Return the means over some micro-batches as a run would make them.

    Args:
        dataset: As a run's option.
        folder: Holds the model's tokenizer.
        batch_size: Examples in a micro-batch.
        max_seq_length: Tokens kept of an example; None: as the data have it.
        seed: Of the draw.
        packing: Whether examples are joined up to `max_seq_length`.
        groups_by_length: Whether those of a micro-batch are of like length.

    Raises:
        ConfigError: A run could not use the data set.
    """
    tokenizer = load_tokenizer(folder)
    rows = load_rows(dataset, seed=seed, template_columns=template_columns(tokenizer))
    drawn = replace(rows, train=_drawn(rows.train, seed), eval=_drawn(rows.eval, seed), row_numbers=None)
    longest = min(LONGEST, num_positions(load_config(folder), tokenizer))
    tokenized = tokenize_rows(drawn, tokenizer, max_seq_length=max_seq_length, longest=longest)
    made = MicroBatches(
        tokenized,
        tokenizer,
        batch_size=batch_size,
        accumulation=1,
        seed=seed,
        max_steps=_NUM_BATCHES,
        num_train_epochs=1.0,
        max_eval_samples=1,
        pack_to=max_seq_length if packing else None,
        groups_by_length=groups_by_length,
    )
    batches = [made.step(k)[0] for k in range(_NUM_BATCHES)] if groups_by_length else made.calibration(_NUM_BATCHES)
    return TypicalBatch(
        padded_length=round(fmean(batch["input_ids"].shape[1] for batch in batches)),
        num_targets=max(1, round(fmean(num_targets(batch) for batch in batches))),
        max_length=tokenized.max_seq_length,
    )


def _drawn(rows: Dataset, seed: int) -> Dataset:
    return rows.shuffle(seed=seed).select(range(min(_NUM_ROWS, len(rows))))
