"""Head pieces: how the output embedding's rows, one for each token of the vocabulary, are cut.

The loss goes through them one after the other; where they come up from main memory each takes the place of a block.
"""

from __future__ import annotations

CHUNK_LOGITS = 1 << 24
"""Logits made at one time, 64 MB of them in float32."""

_FEWEST_ROWS = 8192  # fewer are not worth the launches
_COLUMNS = 2  # a piece is as high as so many times its width


def row_pieces(vocabulary: int, hidden: int) -> list[range]:
    """The rows of each piece, as even as they can be, wherever they are.

    From 4096 hidden features on a piece in bfloat16 has fewer bytes than a block in NF4, of 10 or more times `hidden`²
    weights.
    """
    num_pieces = max(1, round(vocabulary / max(_FEWEST_ROWS, _COLUMNS * hidden)))
    size = -(-vocabulary // num_pieces)
    return [range(first, min(vocabulary, first + size)) for first in range(0, vocabulary, size)]


def positions_at_once(num_positions: int, num_rows: int, chunk_logits: int = CHUNK_LOGITS) -> int:
    """Positions that go through a piece of so many rows together, as even as they can be; at least one."""
    num_chunks = max(1, -(-num_positions // max(1, chunk_logits // num_rows)))
    return max(1, -(-num_positions // num_chunks))
