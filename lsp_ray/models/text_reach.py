"""Which parameters text reaches: found from the graph of a forward, not from names."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch.func import functional_call
from transformers import PreTrainedModel

from lsp_ray.models.load import silenced

_TOKENS = 4


def unreached_by_text(model: PreTrainedModel) -> frozenset[str]:
    """Return the names of parameters that get no gradient from token ids alone, such as a vision tower's.

    The forward is made on the meta device, whatever the model's: nothing is computed, and a model without weights
    will do. Where a model cannot run so, all that its body holds beside its decoder counts as unreached.
    """
    device = torch.device("meta")
    # bfloat16: the one type in which torch knows the shapes of routed experts' products
    parameters = {
        name: torch.empty_like(parameter, dtype=torch.bfloat16, device=device).requires_grad_()
        for name, parameter in model.named_parameters()
    }
    buffers = {name: buffer.to(device) for name, buffer in model.named_buffers()}
    training = [(module, module.training) for module in model.modules()]
    ids_BT = torch.ones((1, _TOKENS), dtype=torch.long, device=device)
    try:
        with torch.enable_grad(), silenced():
            model.train(False)
            output = functional_call(model, parameters | buffers, kwargs={"input_ids": ids_BT})[0]
    except Exception:  # noqa: BLE001  whatever a model says that asks for values, or for more than token ids
        return _beside_the_decoder(model)
    finally:
        for module, was_training in training:
            module.training = was_training
    reached = _leaves(output)
    return frozenset(name for name, parameter in parameters.items() if id(parameter) not in reached)


def parts_of(model: PreTrainedModel, names: Collection[str]) -> Mapping[str, int]:
    """Return the outermost modules that hold no parameters but these, else the parameters, with their elements."""
    kept = {outer for name, _ in model.named_parameters() if name not in names for outer in _outer(name)}
    parts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if name in names:
            part = next((outer for outer in _outer(name) if outer not in kept), name)
            parts[part] = parts.get(part, 0) + parameter.numel()
    return parts


def _outer(name: str) -> list[str]:
    """The modules around a parameter, outermost first."""
    words = name.split(".")
    return [".".join(words[:end]) for end in range(1, len(words))]


def _leaves(tensor: torch.Tensor) -> set[int]:
    """Identities of the leaves that a backward from this tensor would reach."""
    leaves: set[int] = set()
    seen: set[object] = set()
    waiting = [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        waiting += [following for following, _ in node.next_functions]
    return leaves


def _beside_the_decoder(model: PreTrainedModel) -> frozenset[str]:
    body, decoder = model.base_model, model.get_decoder()
    inside = {id(parameter) for parameter in decoder.parameters()}
    beside = {id(parameter) for parameter in body.parameters()} - inside
    return frozenset(name for name, parameter in model.named_parameters() if id(parameter) in beside)
