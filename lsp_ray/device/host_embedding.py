"""HostEmbedding: a frozen table of embeddings in main memory, of which the rows that are looked up come to the device.

A lookup copies rows and computes nothing, so the result is the same to the bit. A micro-batch of T tokens brings at
most T rows up, where the table of a large vocabulary takes a gigabyte.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn


class HostEmbedding:
    """Takes the table over: at rest the module's weight has its shape and place on the device, and no memory there.

    Args:
        module: A frozen table of (V, H) embeddings, in main memory, that nothing else uses.
        device: On which it is looked up.

    Attributes:
        table_VH: The table.
    """

    def __init__(self, module: nn.Embedding, device: torch.device) -> None:
        self._module, self._padding = module, module.padding_idx
        self.table_VH = module.weight.data
        rows, columns = self.table_VH.shape
        self._at_rest_VH = torch.empty(1, columns, dtype=self.table_VH.dtype, device=device).expand(rows, columns)
        self._hooks = [
            module.register_forward_pre_hook(self._bring),
            module.register_forward_hook(self._leave),
            module.register_state_dict_post_hook(partial(HostEmbedding._save, self)),  # which marks what it is given
        ]
        module.padding_idx = None  # of the whole table; where nothing is trained it means nothing
        module.weight.data = self._at_rest_VH

    def close(self) -> None:
        """Let the module be without hooks; its table is in main memory."""
        for hook in self._hooks:
            hook.remove()
        self._module.padding_idx = self._padding
        self._module.weight.data = self.table_VH

    def _bring(self, module: nn.Embedding, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        ids, *others = args
        # the host waits for the last micro-batch here, which costs some launches of a step that takes seconds
        needed_K, places = torch.unique(ids.cpu(), return_inverse=True)
        module.weight.data = self.table_VH.index_select(0, needed_K).to(self._at_rest_VH.device)
        return (places.to(ids.device), *others)

    def _leave(self, module: nn.Embedding, _args: object, _output: object) -> None:
        module.weight.data = self._at_rest_VH

    def _save(self, _module: nn.Module, state: dict[str, Any], prefix: str, _metadata: object) -> None:
        state[f"{prefix}weight"] = self.table_VH
