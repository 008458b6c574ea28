"""StreamedHead: a frozen output embedding in main memory, whose rows come up piece by piece.

The loss goes through the pieces once a micro-batch, between forward and backward; whoever wants all logits gets them
one piece after the other.

Legend: H hidden features, V tokens of the vocabulary, P rows of a piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn.functional import linear

from lsp_ray.device.host_table import HostTable
from lsp_ray.models.output_head import Piece, let_come
from lsp_ray.schedule.head_pieces import row_pieces


class HeadPiece:
    """Some rows of the table; see `FrozenBlock`.

    Args:
        rows: Their numbers.
        unit: That of what is trained last in a forward.
        table_VH: The table.

    Attributes:
        host_bytes: The rows as flat uint8, a part of the table's memory.
        weight_PH: The rows, on the device while they are used.
    """

    def __init__(self, rows: range, unit: int, table_VH: torch.Tensor) -> None:
        self.rows, self.unit = rows, unit
        self._host_PH = self.weight_PH = table_VH[rows.start : rows.stop]
        self.host_bytes = self._host_PH.view(-1).view(torch.uint8)

    def point_to(self, buffer: torch.Tensor) -> None:
        """Let the rows be what is in a flat uint8 buffer."""
        flat = buffer[: self.host_bytes.numel()]
        self.weight_PH = flat.view(self._host_PH.dtype).view(self._host_PH.shape)

    def put_back(self) -> None:
        """Let them be the host's."""
        self.weight_PH = self._host_PH


class StreamedHead:
    """Takes the place of the module's forward, and of what the loss goes through.

    Args:
        module: The output embedding; its bias, if it has one, is on the device.
        table: Its weight.
        unit: See `HeadPiece`.

    Attributes:
        table: See above.
        parts: All pieces, in order.
        come_to: Called before each is used, with its number; to be set.
    """

    def __init__(self, module: nn.Linear, table: HostTable, unit: int) -> None:
        self._module, self.table = module, table
        self.parts = [HeadPiece(rows, unit, table.table_VH) for rows in row_pieces(*table.table_VH.shape)]
        self.come_to: Callable[[int], None] = lambda _piece: None
        self._hook = table.save_for(module)
        module.forward = self._logits  # type: ignore[assignment]
        let_come(module, self)

    def pieces(self) -> Iterator[Piece]:
        """See `HeadPieces`."""
        bias_V = self._module.bias
        for number, part in enumerate(self.parts):
            self.come_to(number)
            bias_P = None if bias_V is None else bias_V.detach()[part.rows.start : part.rows.stop]
            yield part.rows.start, part.weight_PH, bias_P

    def close(self) -> None:
        """Let the module be as it was."""
        self._hook.remove()
        del self._module.forward
        let_come(self._module, None)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        if not hidden.numel():  # the loss is made elsewhere
            return hidden.new_empty(*hidden.shape[:-1], self.table.table_VH.shape[0])
        assert not (torch.is_grad_enabled() and hidden.requires_grad), "its pieces are gone by the backward"
        return torch.cat([linear(hidden, weight_PH, bias_P) for _, weight_PH, bias_P in self.pieces()], dim=-1)
