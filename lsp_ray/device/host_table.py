"""HostTable: a frozen table with a row for each token, in main memory, of which a part at a time is on the device."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


class HostTable:
    """Takes the table over: at rest its parameter has its shape and place on the device, and no memory there.

    Args:
        weight: A frozen table of (V, H), in main memory.
        device: Where it is used.

    Attributes:
        table_VH: The table.
        device: See above.
    """

    def __init__(self, weight: nn.Parameter, device: torch.device) -> None:
        self._weight, self.table_VH, self.device = weight, weight.data, device
        rows, columns = self.table_VH.shape
        self._at_rest_VH = torch.empty(1, columns, dtype=weight.dtype, device=device).expand(rows, columns)
        self.put_back()

    def put_back(self) -> None:
        """Let the parameter be at rest."""
        self._weight.data = self._at_rest_VH

    def save_for(self, module: nn.Module) -> RemovableHandle:
        """Let the state of a module whose `weight` it is hold the table."""
        hook: RemovableHandle = module.register_state_dict_post_hook(partial(HostTable._save, self))
        return hook  # which marks what it is given: a method could not be

    def close(self) -> None:
        """Let the parameter have its table again, in main memory."""
        self._weight.data = self.table_VH

    def _save(self, _module: nn.Module, state: dict[str, Any], prefix: str, _metadata: object) -> None:
        state[f"{prefix}weight"] = self.table_VH
