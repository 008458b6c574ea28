"""Micro-batches: which rows each optimizer update sees, padded and collated, in an order that the seed decides."""

from __future__ import annotations

import copy
import hashlib
import math
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, PreTrainedTokenizerBase

from lsp_ray.data.packing import PackedRows, collate_packed
from lsp_ray.data.row_order import RowOrder, permutation, row_lengths
from lsp_ray.data.tokenize import IGNORED, TokenizedRows
from lsp_ray.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset

Batch = dict[str, torch.Tensor]
"""int64 CPU tensors: `input_ids` (B, S), `attention_mask` (B, S), `labels` (B, S) or (B,), maybe `token_type_ids`.

The labels of a regression are float32. A language model's batch that is padded on the right alone has `positions`, too:
the K of (B·S) whose next token has a label, so that nobody need look for them where that makes a CPU wait for a GPU.
Where rows are packed, `position_ids` and `examples` (see `collate_packed`) stand in the mask's place."""

_STEPS_AHEAD = 2

# Draws that are independent of each other under one seed.
_TRAIN_ORDER, _EVAL_CHOICE, _CALIBRATION_ORDER = range(3)


class MicroBatches:
    """Random access to the micro-batches of every optimizer update, to eval batches and to calibration batches.

    Each epoch is a permutation of the train rows, a function of (seed, epoch). Epochs follow each other without a
    gap: the update in which one ends takes its last rows from the next, so that every micro-batch is full. The same
    rows make up update k whatever their split into `batch_size` times `accumulation`. See `RowOrder`.
    """

    def __init__(
        self,
        tokenized: TokenizedRows,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        accumulation: int,
        seed: int,
        max_steps: int,
        num_train_epochs: float,
        max_eval_samples: int,
        length_multiple: int | None = None,
        pack_to: int | None = None,
        groups_by_length: bool = False,
    ) -> None:
        """Prepare collation; nothing is collated yet.

        Args:
            tokenized: Rows as token ids.
            tokenizer: The model's own; pads on the right here, with EOS where it has no padding token, and is itself
                left as it is.
            batch_size: Rows B in a micro-batch.
            accumulation: Micro-batches in an optimizer update.
            seed: Seed of the order of rows and of the choice of eval rows.
            max_steps: Optimizer updates, or -1 for `num_train_epochs`.
            num_train_epochs: Passes over the train rows where `max_steps` is -1.
            max_eval_samples: Eval rows used, at most.
            length_multiple: Language models' batches are padded to multiples of it.
            pack_to: Tokens up to which train rows are joined, which then count as one (a causal language model's, none
                longer); default: they are not.
            groups_by_length: Whether the rows of an update are of like length; not of rows that are joined.

        Raises:
            ConfigError: Lengths matter, and rows do not tell theirs.
        """
        assert pack_to is None or not groups_by_length, "joined rows are all of one length"
        self._train, self._eval = tokenized.train, tokenized.eval
        if pack_to is not None:
            self._train = PackedRows(tokenized.train, pack_to)
        self._batch_size, self._accumulation, self._seed = batch_size, accumulation, seed
        lengths = row_lengths(self._train) if groups_by_length else None
        step_rows = batch_size * accumulation
        self._order = RowOrder(seed, _TRAIN_ORDER, len(self._train), step_rows=step_rows, lengths=lengths)
        self._calibration_order = RowOrder(seed, _CALIBRATION_ORDER, len(self._train))
        epochs_of_steps = math.ceil(num_train_epochs * len(self._train) / step_rows)
        self._num_steps = epochs_of_steps if max_steps == -1 else max_steps
        self._max_eval_samples = max_eval_samples
        self._sorts = tokenized.collate is None  # else nothing is known of a row
        self._collate = (
            _checked(tokenized.collate) if tokenized.collate else _collator(tokenized, tokenizer, length_multiple)
        )
        self._collate_train = self._collate if pack_to is None else _packing_collator(tokenizer)

    @property
    def longest(self) -> int | None:
        """Tokens of the longest training row; None where rows do not tell."""
        if isinstance(self._train, PackedRows):
            return self._train.length
        try:
            return int(max(row_lengths(self._train), default=0))
        except ConfigError:
            return None

    @property
    def num_rows(self) -> int:
        """Train rows, packed ones as one."""
        return len(self._train)

    @property
    def num_steps(self) -> int:
        """Optimizer updates of the run."""
        return self._num_steps

    def digest(self) -> str:
        """A hash that differs where data, tokenizer or order differ: of the first and the last step's batches."""
        digest = hashlib.sha256()
        for step in (0, self._num_steps - 1):
            for batch in self.step(step):
                for name in sorted(batch):
                    digest.update(f"{name}{tuple(batch[name].shape)}".encode())
                    digest.update(batch[name].numpy().tobytes())
        return digest.hexdigest()

    @property
    def num_train_examples(self) -> int:
        """Rows of an epoch."""
        return len(self._train)

    @property
    def num_eval_examples(self) -> int:
        """Rows that are held out."""
        return len(self._eval)

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer updates in which every train row is seen once."""
        return len(self._train) / (self._batch_size * self._accumulation)

    def step(self, k: int) -> list[Batch]:
        """Return the micro-batches of optimizer update k, counted from 0; equal at every call.

        Raises:
            ConfigError: Nothing in them has a label: a person's own rows or collator, as others are looked at before.
        """
        batches = self._drawn(self._order, k * self._accumulation, self._accumulation)
        if not any(_has_target(batch) for batch in batches):
            bound = "leave a label that is not -100, after a row's first, in every step"
            raise ConfigError("train_dataset", bound, f"none in step {k + 1}")
        return batches

    def calibration(self, num: int) -> list[Batch]:
        """Return `num` micro-batches of train rows in an order of their own, not that of the first updates."""
        return self._drawn(self._calibration_order, 0, num)

    def eval_batches(self) -> list[Batch]:
        """Return batches of the eval rows, or of `max_eval_samples` of them drawn by the seed; equal at every call.

        Rows of similar length share a batch, as their order does not matter and padding costs time. The last batch
        may be smaller.
        """
        chosen = np.sort(permutation(self._seed, _EVAL_CHOICE, 0, len(self._eval))[: self._max_eval_samples])
        rows = _rows(self._eval, chosen.tolist())
        if self._sorts:
            rows.sort(key=lambda row: len(row["input_ids"]))
        return [self._collate(rows[at : at + self._batch_size]) for at in range(0, len(rows), self._batch_size)]

    def read_ahead(
        self, num_steps: int, *, first_step: int = 0, page_locked: bool = False
    ) -> Generator[list[Batch], None, None]:
        """Yield `step(k)` for `num_steps` updates from `first_step` on, collated by a thread up to 2 updates ahead.

        `page_locked`: into memory from which a GPU copies while the host goes on.

        An error in the thread is raised where its update is asked for. The thread ends with the iterator: when it is
        exhausted, closed (`contextlib.closing`) or collected.
        """
        ahead: deque[Future[list[Batch]]] = deque()
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read_ahead") as executor:
            try:
                for k in range(first_step, first_step + num_steps):
                    ahead.append(executor.submit(self._page_locked if page_locked else self.step, k))
                    if len(ahead) > _STEPS_AHEAD:
                        yield ahead.popleft().result()
                while ahead:
                    yield ahead.popleft().result()
            finally:
                for future in ahead:
                    future.cancel()

    def _page_locked(self, k: int) -> list[Batch]:
        return [{name: tensor.pin_memory() for name, tensor in batch.items()} for batch in self.step(k)]

    def _drawn(self, order: RowOrder, first: int, num: int) -> list[Batch]:
        """Collate `num` micro-batches from micro-batch `first` of an order of train rows."""
        size = self._batch_size
        rows = _rows(self._train, order.rows(first * size, num * size))
        return [self._collate_train(rows[at : at + size]) for at in range(0, len(rows), size)]


def _rows(rows: Dataset, indices: Sequence[int]) -> list[Any]:
    """Return rows in the order of `indices`, which may repeat."""
    if not hasattr(rows, "column_names"):  # anything but a Dataset of `datasets`, which may not be there
        return [rows[index] for index in indices]
    columns: dict[str, list[Any]] = rows[list(indices)]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _collator(tokenized: TokenizedRows, tokenizer: PreTrainedTokenizerBase, length_multiple: int | None) -> Any:
    """Return transformers' collator for the task, on a tokenizer of its own."""
    padding = copy.deepcopy(tokenizer)
    # left padding would move the positions of models that learn them
    padding.padding_side = "right"
    if padding.pad_token_id is None:
        padding.pad_token = padding.eos_token
    if tokenized.task == "sequence_classification":
        collate: Any = DataCollatorWithPadding(padding, return_tensors="pt")
    else:
        collate = DataCollatorForSeq2Seq(
            padding, label_pad_token_id=IGNORED, return_tensors="pt", pad_to_multiple_of=length_multiple
        )

    def collated(rows: list[dict[str, Any]]) -> Batch:
        features = [row | {"attention_mask": [1] * len(row["input_ids"])} for row in rows]
        return _with_positions(dict(collate(features)))

    return collated


def _packing_collator(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[Any]], Batch]:
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def collated(rows: list[Any]) -> Batch:
        batch = collate_packed(rows, pad)
        return batch | {"positions": _target_positions(batch["labels"])}

    return collated


def _checked(collate: Callable[[list[Any]], Mapping[str, Any]]) -> Callable[[list[Any]], Batch]:
    """A person's own collator, whose batches are looked at.

    Raises:
        ConfigError: A batch lacks input_ids or labels.
    """

    def collated(rows: list[Any]) -> Batch:
        batch = dict(collate(rows))
        for name in ("input_ids", "labels"):
            if not isinstance(batch.get(name), torch.Tensor):
                raise ConfigError("data_collator", f"return a tensor {name}", sorted(batch))
        batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
        return _with_positions(batch)

    return collated


def _with_positions(batch: Batch) -> Batch:
    labels, mask_BS = batch["labels"], batch["attention_mask"]
    is_language = labels.ndim == 2 and not labels.is_floating_point()
    if not is_language or mask_BS.ndim != 2 or (mask_BS[:, 1:] > mask_BS[:, :-1]).any():
        return batch
    return batch | {"positions": _target_positions(labels)}


def _has_target(batch: Batch) -> bool:
    labels = batch["labels"]
    return labels.ndim != 2 or labels.is_floating_point() or bool((labels[:, 1:] != IGNORED).any())


def _target_positions(labels_BS: torch.Tensor) -> torch.Tensor:
    has_target_BS = torch.zeros_like(labels_BS, dtype=torch.bool)
    has_target_BS[:, :-1] = labels_BS[:, 1:] != IGNORED
    return has_target_BS.flatten().nonzero()[:, 0]
