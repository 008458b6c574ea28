#!/usr/bin/env python3
"""Bytes that autograd keeps for the backward, by part: plain linears against LSP's, on a model with its own weights.

    python scripts/kept_activations.py --model smollm2-135m

Prints a table. Random tokens in bfloat16, each of them a target; a storage counts once, for the first of its readers in
the order of the forward, and the model's own parameters and buffers not at all. No GPU is needed.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lsp_ray.config import LspConfig
from lsp_ray.device.projected_linear import ProjectedLinear
from lsp_ray.errors import LspRayError
from lsp_ray.methods.lsp import lsp_units
from lsp_ray.models.layers import find_layers
from lsp_ray.models.load import load_model
from lsp_ray.models.loss import summed_loss
from lsp_ray.models.resolve import resolve_model
from lsp_ray.models.shared_inputs import shared_inputs

LOGITS = "logits"
PARTS = ("linears", "attention", "norms", "activation function", LOGITS, "other")
METHODS = ("native", "lsp")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code, 2 where the model cannot be read."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m", help="a local folder, alias or hub id (%(default)s)")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=126, help="of a row (%(default)s)")
    parser.add_argument("--subspace_dim", type=int, default=LspConfig().dim)
    parser.add_argument("--nnz_per_row", type=int, default=LspConfig().nnz_per_row)
    options = parser.parse_args(argv)
    try:
        lsp = LspConfig(subspace_dim=options.subspace_dim, nnz_per_row=options.nnz_per_row)
        folder = resolve_model(options.model)
        shape = options.batch_size, options.tokens
        kept = {}
        for method in METHODS:
            model = load_model(folder, dtype=torch.bfloat16, task="causal_lm")
            kept[method] = _of_method(method, model, lsp, shape)
    except LspRayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    Console().print(table(kept))
    return 0


def table(kept: dict[str, Counter[str]]) -> Table:
    """Megabytes by part and method, and what LSP's are more or less than native's."""
    made = Table("kept for the backward, MB", *METHODS, "")
    for part in (*PARTS, "in all"):
        native, lsp = (counts.total() if part == "in all" else counts[part] for counts in kept.values())
        change = f"{lsp / native - 1:+.0%}" if native else ""
        made.add_row(part, f"{native / 1e6:.1f}", f"{lsp / 1e6:.1f}", change)
    return made


def _of_method(method: str, model: PreTrainedModel, lsp: LspConfig, shape: tuple[int, int]) -> Counter[str]:
    model.train()
    shared, layers = shared_inputs(model), find_layers(model)
    if method == "lsp":
        lsp_units(layers, lsp, seed=0, shared=shared)
    ids_BS = torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    return kept_bytes(model, ids_BS)


def kept_bytes(model: PreTrainedModel, ids_BS: torch.Tensor) -> Counter[str]:
    """Return bytes by part of one forward with its loss, of which every token is a target."""
    parts = {module: _part_of(name, module, model) for name, module in model.named_modules()}
    ledger = Ledger(model)
    handles = []
    for module, part in parts.items():
        if part is not None:
            handles.append(module.register_forward_pre_hook(partial(ledger.enter, part)))
            handles.append(module.register_forward_hook(ledger.leave))
    with saved_tensors_hooks(ledger.note, lambda tensor: tensor):
        summed_loss(model, {"input_ids": ids_BS, "attention_mask": torch.ones_like(ids_BS), "labels": ids_BS})
    for handle in handles:
        handle.remove()
    return ledger.kept


class Ledger:
    """Counts what is kept, by the innermost part that the forward is in."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.kept: Counter[str] = Counter()
        self._owned = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
        self._held: dict[int, torch.Tensor] = {}  # so that no address is used twice
        self._inside = ["other"]

    def note(self, tensor: torch.Tensor) -> torch.Tensor:
        """Autograd keeps a tensor."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._owned and storage.data_ptr() not in self._held:
            self._held[storage.data_ptr()] = tensor
            self.kept[self._inside[-1]] += storage.nbytes()
        return tensor

    def enter(self, part: str, *_: object) -> None:
        """The forward comes into a part."""
        self._inside.append(part)

    def leave(self, *_: object) -> None:
        """It leaves the last one."""
        if self._inside.pop() == LOGITS:
            self._inside[0] = LOGITS  # what follows is the loss


def _part_of(name: str, module: nn.Module, model: PreTrainedModel) -> str | None:
    """What a module's kept bytes count as, if not as those around it."""
    kind = type(module).__name__.lower()
    if module is model.get_output_embeddings():
        return LOGITS
    if isinstance(module, nn.Linear | Conv1D | ProjectedLinear):
        return "linears"
    if "norm" in kind:
        return "norms"
    if kind.endswith("attention"):
        return "attention"
    return "activation function" if name.rpartition(".")[2].startswith("act") else None


if __name__ == "__main__":
    sys.exit(main())
