"""Find the layers of a model: what is scheduled as one, and which linears and other parameters it trains.

A layer is a decoder or encoder block. Trained parameters outside the blocks form up to two more: the stem (registered
before the blocks) and the head (after them). Embeddings and the output embedding stay frozen.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lsp_ray.errors import ConfigError
from lsp_ray.models.quantized import is_quantized_linear


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearSite:
    """A linear layer and where it hangs, so that a method can put another module in its place."""

    name: str
    parent: nn.Module
    attribute: str
    module: nn.Module

    @property
    def transposed(self) -> bool:
        """Whether the weight is kept as (in, out): GPT-2's Conv1D."""
        return isinstance(self.module, Conv1D)

    @property
    def device(self) -> torch.device:
        """Where its weight is, in whatever form."""
        return next(chain(self.module.parameters(), self.module.buffers())).device

    @property
    def shape(self) -> tuple[int, int]:
        """(M, N) = (out, in)."""
        if not self.transposed:
            return int(self.module.out_features), int(self.module.in_features)  # type: ignore[arg-type]
        rows, columns = self.module.get_parameter("weight").shape
        return columns, rows


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterSite:
    """A trained parameter that is no linear's weight: a norm's, a bias."""

    name: str
    owner: nn.Module
    parameter: nn.Parameter


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """What is sent, updated and applied as one. `block` is None for the stem and the head."""

    name: str
    block: nn.Module | None
    linears: list[LinearSite] = field(default_factory=list)
    parameters: list[ParameterSite] = field(default_factory=list)


def find_layers(model: PreTrainedModel, unreached: Collection[str] = ()) -> list[Layer]:
    """Return the layers in forward order and freeze every parameter that none of them trains.

    Args:
        model: Without replaced modules.
        unreached: Names of parameters that no gradient reaches (`unreached_by_text`); they are frozen.

    Raises:
        ConfigError: The model has no list of blocks.
    """
    beyond = {id(parameter) for name, parameter in model.named_parameters() if name in unreached}
    prefix, blocks = _block_list(model, beyond)
    stem = Layer(name="stem", block=None)
    head = Layer(name="head", block=None)
    inner = [Layer(name=f"{prefix}.{index}", block=block) for index, block in enumerate(blocks)]
    frozen = beyond | {id(parameter) for parameter in embedding_parameters(model)}
    output = model.get_output_embeddings()
    seen_blocks = False
    for name, module in model.named_modules():
        if name == prefix:
            seen_blocks = True
        if name.startswith(f"{prefix}."):
            layer = inner[int(name.removeprefix(f"{prefix}.").split(".")[0])]
        else:
            layer = head if seen_blocks else stem
        if module is not output:
            _collect(model, name, module, layer, frozen)
    trained = {id(parameter) for layer in (stem, *inner, head) for parameter in _trained(layer)}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    return [layer for layer in (stem, *inner, head) if layer.linears or layer.parameters]


def _block_list(model: PreTrainedModel, beyond: set[int]) -> tuple[str, nn.ModuleList]:
    """The outermost ModuleList with most to reach: lists inside blocks (experts) are parts of a block."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outermost = {
        name: module
        for name, module in lists.items()
        if not any(name.startswith(f"{other}.") for other in lists) and len(module) > 0
    }
    if not outermost:
        raise ConfigError("model_name_or_path", "be a transformer with a list of blocks", type(model).__name__)
    sizes = {
        name: sum(p.numel() for p in module.parameters() if id(p) not in beyond) for name, module in outermost.items()
    }
    largest = max(sizes, key=lambda name: sizes[name])
    return largest, outermost[largest]


def linears_outside_blocks(model: PreTrainedModel) -> list[str]:
    """Names of linears in no block, such as a classifier's head."""
    prefix, _ = _block_list(model, set())
    kinds = nn.Linear | Conv1D
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, kinds) and not name.startswith(f"{prefix}.")
    ]


def embedding_parameters(model: PreTrainedModel) -> Iterator[nn.Parameter]:
    """The input's and the output's embeddings, which no method trains."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            yield from module.parameters(recurse=False)
    output = model.get_output_embeddings()
    if isinstance(output, nn.Module):
        yield from output.parameters(recurse=False)


def _collect(model: nn.Module, name: str, module: nn.Module, layer: Layer, frozen: set[int]) -> None:
    if is_quantized_linear(module):
        _collect_linear(model, name, module, layer)
        frozen.update(id(parameter) for parameter in module.parameters() if parameter.ndim > 1)
    is_linear = isinstance(module, nn.Linear | Conv1D)
    for parameter_name, parameter in module.named_parameters(recurse=False):
        if id(parameter) in frozen:
            continue
        frozen.add(id(parameter))  # a shared parameter is trained once, where it is met first
        if is_linear and parameter_name == "weight":
            _collect_linear(model, name, module, layer)
        else:
            full_name = f"{name}.{parameter_name}".removeprefix(".")
            layer.parameters.append(ParameterSite(name=full_name, owner=module, parameter=parameter))


def _collect_linear(model: nn.Module, name: str, module: nn.Module, layer: Layer) -> None:
    parent_name, _, attribute = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    layer.linears.append(LinearSite(name=name, parent=parent, attribute=attribute, module=module))


def _trained(layer: Layer) -> Iterator[nn.Parameter]:
    for site in layer.linears:
        if not is_quantized_linear(site.module):
            yield site.module.get_parameter("weight")
    for parameter_site in layer.parameters:
        yield parameter_site.parameter
