"""Parameter groups of a whole model for LSPAdamW: what is projected, what is trained as it is, what is frozen."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lsp_ray.config import LspConfig
from lsp_ray.errors import ConfigError
from lsp_ray.methods.lsp import projector_sizes
from lsp_ray.models.layers import Layer, LinearSite, embedding_parameters

_NAMES = {
    "d": "subspace_dim",
    "r": "nnz_per_row",
    "check_every": "check_every",
    "max_bias": "max_bias",
    "balance": "balance",
}
_SWITCHES = {"true": True, "false": False}

_Named = tuple[str, nn.Parameter]


def parameter_groups(
    model: PreTrainedModel, target_modules: str | Sequence[str], optim_args: str, *, weight_decay: float
) -> list[dict[str, Any]]:
    """Return LSPAdamW's groups, with names; freezes embeddings and the output layer. See `LSPAdamW.for_model`.

    Raises:
        ConfigError: See there.
    """
    lsp = lsp_config(optim_args)
    for parameter in embedding_parameters(model):
        parameter.requires_grad_(False)
    sites = _targets(model, target_modules)
    sizes = projector_sizes([Layer(name="model", block=None, linears=sites)], lsp)
    projected_ids = {id(site.module.get_parameter("weight")) for site in sites if site.name in sizes}
    projected: list[_Named] = []
    matrices: list[_Named] = []
    vectors: list[_Named] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = matrices if parameter.ndim > 1 else vectors
            (projected if id(parameter) in projected_ids else plain).append((name, parameter))
    groups: list[dict[str, Any]] = [
        {"params": projected, "weight_decay": weight_decay} | {name: getattr(lsp, name) for name in _NAMES.values()},
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def lsp_config(optim_args: str) -> LspConfig:
    """Read `d=256,r=4,check_every=200`; what is not named has a run's default.

    Raises:
        ConfigError: A name is unknown, or a value cannot work.
    """
    values: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in optim_args.split(","))):
        short, _, value = part.partition("=")
        if short not in _NAMES:
            raise ConfigError("optim_args", f"be of {', '.join(f'{name}=…' for name in _NAMES)}", part)
        field = _NAMES[short]
        kind = type(getattr(LspConfig, field))
        try:
            values[field] = _SWITCHES[value] if kind is bool else kind(value)
        except (KeyError, ValueError) as error:
            words = {bool: "true or false", int: "a whole number"}.get(kind, "a number")
            raise ConfigError("optim_args", f"have {words} for {short}", part) from error
    return LspConfig(**values)


def _targets(model: PreTrainedModel, target_modules: str | Sequence[str]) -> list[LinearSite]:
    """The trained linears asked for; a shared weight once."""
    sites: dict[int, LinearSite] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and _is_meant(name, target_modules):
            weight = module.get_parameter("weight")
            if weight.requires_grad:
                parent, _, attribute = name.rpartition(".")
                site = LinearSite(name=name, parent=model.get_submodule(parent), attribute=attribute, module=module)
                sites.setdefault(id(weight), site)
    if not sites:
        bound = "be all-linear, ends of names or a regular expression that match a trained linear of the model"
        raise ConfigError("target_modules", bound, target_modules)
    return list(sites.values())


def _is_meant(name: str, target_modules: str | Sequence[str]) -> bool:
    if target_modules == "all-linear":
        return True
    if isinstance(target_modules, str):
        return re.fullmatch(target_modules, name) is not None
    return any(name == end or name.endswith(f".{end}") for end in target_modules)
