"""Full gradients of every linear of a model on real text, a few layers at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from lsp_ray.data.dataset import load_rows
from lsp_ray.data.micro_batches import MicroBatches
from lsp_ray.data.tokenize import tokenize_rows
from lsp_ray.models.layers import Layer, LinearSite, find_layers
from lsp_ray.models.load import load_model, load_tokenizer
from lsp_ray.models.loss import Batch, num_targets, summed_loss
from lsp_ray.models.resolve import resolve_model

NUM_CALIBRATION, NUM_HELD_OUT = 4, 4
LAYERS_AT_ONCE = 10  # SmolLM2: 14 MB a layer and micro-batch, so 1.1 GB for ten layers and eight micro-batches
SEED = 42


@dataclass(frozen=True, slots=True, kw_only=True)
class Gradients:
    """Gradients (M, N) of one linear, float32 on the CPU: some to learn from, others to judge by."""

    name: str
    calibration: tuple[torch.Tensor, ...]
    held_out: tuple[torch.Tensor, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """(M, N)."""
        rows, columns = self.calibration[0].shape
        return rows, columns


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A model, its blocks in forward order, and micro-batches: first those to learn from, then those to judge by."""

    model: PreTrainedModel
    layers: list[Layer]
    batches: list[Batch]

    def gradients(self, layer_indices: Sequence[int]) -> Iterator[Gradients]:
        """Yield the gradients of every linear in these layers, in float32, holding LAYERS_AT_ONCE layers of them."""
        for first in range(0, len(layer_indices), LAYERS_AT_ONCE):
            chosen = layer_indices[first : first + LAYERS_AT_ONCE]
            sites = [site for index in chosen for site in self.layers[index].linears]
            taken = self._backward(sites)
            for site in sites:
                grads = taken.pop(site.name)
                yield Gradients(
                    name=site.name, calibration=tuple(grads[:NUM_CALIBRATION]), held_out=tuple(grads[NUM_CALIBRATION:])
                )

    def _backward(self, sites: Sequence[LinearSite]) -> dict[str, list[torch.Tensor]]:
        self.model.requires_grad_(False)
        taken: dict[str, list[torch.Tensor]] = {site.name: [] for site in sites}
        for site in sites:
            site.module.get_parameter("weight").requires_grad_(True)
        for batch in self.batches:
            torch.autograd.backward([summed_loss(self.model, batch) / max(1, num_targets(batch))])
            for site in sites:
                weight = site.module.get_parameter("weight")
                assert weight.grad is not None
                taken[site.name].append(weight.grad.t() if site.transposed else weight.grad)
                weight.grad = None
        return taken


def open_source(
    model_name: str, dataset: str, *, batch_size: int, max_seq_length: int, log: Callable[[str], None]
) -> Source:
    """Load model and data set; the micro-batches to learn from are those that a run calibrates with."""
    folder = resolve_model(model_name, log=log)
    tokenizer = load_tokenizer(folder)
    tokenized = tokenize_rows(load_rows(dataset, seed=SEED), tokenizer, max_seq_length=max_seq_length)
    micro_batches = MicroBatches(
        tokenized,
        tokenizer,
        batch_size=batch_size,
        accumulation=1,
        seed=SEED,
        max_steps=1,
        num_train_epochs=1.0,
        max_eval_samples=1,
    )
    model = load_model(folder, dtype=torch.float32, task=tokenized.task, label_names=tuple(tokenized.label_names))
    layers = [layer for layer in find_layers(model) if layer.block is not None]
    batches: list[Batch] = [*micro_batches.calibration(NUM_CALIBRATION + NUM_HELD_OUT)]
    return Source(model=model, layers=layers, batches=batches)


def spread(total: int, count: int) -> list[int]:
    """The middles of `count` equal parts of range(total): a sample of layers without the first and the last."""
    return [(2 * part + 1) * total // (2 * count) for part in range(count)]
