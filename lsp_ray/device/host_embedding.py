"""HostEmbedding: a frozen table of embeddings in main memory, of which the rows that are looked up come to the device.

A lookup copies rows and computes nothing, so the result is the same to the bit. A micro-batch of T tokens brings at
most T rows up, where the table of a large vocabulary takes a gigabyte.
"""

from __future__ import annotations

import torch
from torch import nn

from lsp_ray.device.host_table import HostTable


class HostEmbedding:
    """Looks up in a table in main memory.

    Args:
        module: Embeddings.
        table: Their weight, that nothing on the device uses besides.
    """

    def __init__(self, module: nn.Embedding, table: HostTable) -> None:
        self._module, self._table, self._padding = module, table, module.padding_idx
        self._hooks = [
            module.register_forward_pre_hook(self._bring),
            module.register_forward_hook(self._leave),
            table.save_for(module),
        ]
        module.padding_idx = None  # of the whole table; where nothing is trained it means nothing

    def close(self) -> None:
        """Let the module be without hooks."""
        for hook in self._hooks:
            hook.remove()
        self._module.padding_idx = self._padding

    def _bring(self, module: nn.Embedding, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        ids, *others = args
        # the host waits for the last micro-batch here, which costs some launches of a step that takes seconds
        needed_K, places = torch.unique(ids.cpu(), return_inverse=True)
        module.weight.data = self._table.table_VH.index_select(0, needed_K).to(self._table.device)
        return (places.to(ids.device), *others)

    def _leave(self, _module: nn.Embedding, _args: object, _output: object) -> None:
        self._table.put_back()
