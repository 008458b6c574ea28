"""Which linears of a model read the same input: found from a forward, not from names."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lsp_ray.models.load import silenced
from lsp_ray.models.quantized import is_quantized_linear

_TOKENS = 4


def shared_inputs(model: PreTrainedModel) -> list[list[str]]:
    """Return groups of two and more names of linears that the same tensor arrives at, in the order of the forward.

    Nothing is computed with the weights' values, so a model on the meta device will do. Where a model cannot run on a
    handful of token ids alone, no two linears count as sharing.
    """
    readers: defaultdict[int, list[str]] = defaultdict(list)  # by the identity of the tensor
    arrived: list[torch.Tensor] = []  # kept until the end, so that no identity comes twice

    def note(name: str) -> RemovableHandle:
        def hook(_module: nn.Module, args: tuple[object, ...]) -> None:
            if args and isinstance(args[0], torch.Tensor):
                readers[id(args[0])].append(name)
                arrived.append(args[0])

        return linears[name].register_forward_pre_hook(hook)

    linears: dict[str, nn.Module] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) or is_quantized_linear(module)
    }
    handles = [note(name) for name in linears]
    training = [(module, module.training) for module in model.modules()]
    token = int(model.config.get_text_config().pad_token_id == 0)  # of padding alone some models warn
    ids_BT = torch.full((1, _TOKENS), token, device=next(model.parameters()).device)
    try:
        with torch.no_grad(), silenced():
            model.train(False)
            model(input_ids=ids_BT)
    except (RuntimeError, NotImplementedError, ValueError, TypeError):  # whatever a model says that wants more inputs
        return []
    finally:
        for module, was_training in training:
            module.training = was_training
        for handle in handles:
            handle.remove()
    groups = [list(dict.fromkeys(names)) for names in readers.values()]
    return [names for names in groups if len(names) > 1]
