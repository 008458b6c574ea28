"""ModelShape: a model as shapes alone, as costs and memory need it."""

from __future__ import annotations

from dataclasses import dataclass

from lsp_ray.schedule.head_pieces import row_pieces


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearShape:
    """A trained linear with a weight of (rows, columns) = (M, N) = (out, in).

    `input` numbers what its layer's linears read: equal where the same tensor arrives at several.
    """

    rows: int
    columns: int
    input: int

    @property
    def numel(self) -> int:
        """M · N."""
        return self.rows * self.columns

    @property
    def small_side(self) -> int:
        """min(M, N)."""
        return min(self.rows, self.columns)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """What is sent as one: linears, and elements of other trained parameters. The stem and the head are no blocks."""

    linears: tuple[LinearShape, ...]
    raw_numel: int
    is_block: bool

    @property
    def numel(self) -> int:
        """Trained elements."""
        return self.raw_numel + sum(linear.numel for linear in self.linears)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A model.

    Attributes:
        layers: Shallowest first.
        num_parameters: All of them, frozen ones and shared ones once.
        hidden_size: Width of the residual stream.
        attention_width: Heads times their width.
        repeated_width: What keys and values become where attention gets a mask, and heads share them; else 0.
        num_logits: Rows of the output embedding: the vocabulary; a classifier's labels.
        num_held: Parameters of embeddings that can stay in main memory, the output's among them where `head_comes`.
        head_comes: Whether the output embedding can come up in pieces: it is frozen, and its answer is the logits.
    """

    layers: tuple[LayerShape, ...]
    num_parameters: int
    hidden_size: int
    attention_width: int
    repeated_width: int
    num_logits: int
    num_held: int = 0
    head_comes: bool = False

    @property
    def num_trained(self) -> int:
        """Elements that are trained."""
        return sum(layer.numel for layer in self.layers)

    @property
    def head_pieces(self) -> list[int]:
        """Rows of each piece of the output embedding; empty where it does not come in pieces."""
        return [len(rows) for rows in row_pieces(self.num_logits, self.hidden_size)] if self.head_comes else []

    @property
    def largest_small_side(self) -> int:
        """min(M, N) of the linear where it is largest: the bound of `lsp.subspace_dim`."""
        return max((linear.small_side for layer in self.layers for linear in layer.linears), default=0)
