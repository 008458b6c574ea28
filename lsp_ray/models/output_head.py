"""The output embedding as the loss goes through it: in pieces of its rows, wherever they are.

Legend: H hidden features, V tokens of the vocabulary, P rows of a piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import nn

from lsp_ray.schedule.head_pieces import row_pieces

if TYPE_CHECKING:  # a shard's reports name streamed weights, and it has no need of models
    from transformers import PreTrainedModel

Piece = tuple[int, torch.Tensor, torch.Tensor | None]
"""Number of the first row, (P, H) weight, and (P) bias if there is one."""


class HeadPieces(Protocol):
    """Gives an output embedding, which is frozen."""

    def pieces(self) -> Iterator[Piece]:
        """All pieces, in order; each is valid until the next one is asked for."""
        ...


class WholeHead:
    """An output embedding that is where it is used."""

    def __init__(self, head: nn.Linear) -> None:
        self._head = head

    def pieces(self) -> Iterator[Piece]:
        """See `HeadPieces`."""
        weight_VH, bias_V = self._head.weight.detach(), self._head.bias
        for rows in row_pieces(*weight_VH.shape):
            piece = slice(rows.start, rows.stop)
            yield rows.start, weight_VH[piece], None if bias_V is None else bias_V.detach()[piece]


_is_plain: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # heads that were asked for
_elsewhere: WeakKeyDictionary[nn.Module, HeadPieces] = WeakKeyDictionary()


def let_come(head: nn.Linear, pieces: HeadPieces | None) -> None:
    """From now on the head of a model is taken from `pieces`; None: it is where it is used again."""
    if pieces is None:
        del _elsewhere[head]
    else:
        _elsewhere[head], _is_plain[head] = pieces, True


def frozen_head(model: PreTrainedModel) -> HeadPieces | None:
    """The model's output embedding if it is frozen and plain, see `is_frozen_and_plain`; else None."""
    head = model.get_output_embeddings()
    if not is_frozen_and_plain(model):
        return None
    assert isinstance(head, nn.Linear)
    return _elsewhere.get(head) or WholeHead(head)


def is_frozen_and_plain(model: PreTrainedModel) -> bool:
    """Whether the model's logits are its output embedding's answer as it is, and that embedding is not trained.

    Some models scale logits or cap them: the answer is found by trying, once for each model. A skeleton will do.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or any(parameter.requires_grad for parameter in head.parameters()):
        return False
    if head not in _is_plain:
        _is_plain[head] = _gives_logits(head, model)
    return _is_plain[head]


class _Answer:
    """Stands for what a model without its head gives: hidden states of a token, and nothing besides."""

    def __init__(self, hidden_BSH: torch.Tensor) -> None:
        self.last_hidden_state = hidden_BSH

    def __getitem__(self, _place: int) -> torch.Tensor:
        return self.last_hidden_state

    def __getattr__(self, _name: str) -> None:
        return None


def _gives_logits(head: nn.Linear, model: PreTrainedModel) -> bool:
    """Runs what the model does behind its blocks, on any device."""
    base = model.base_model
    if base is model:
        return False
    seen: list[tuple[torch.Tensor, int]] = []  # with its version: what is changed in place is another tensor
    handle = head.register_forward_hook(lambda _module, _args, output: seen.append((output, output._version)))
    hidden_BSH = torch.zeros(1, 1, head.in_features, dtype=head.weight.dtype, device=head.weight.device)
    own = base.__dict__.get("forward")
    training = [(module, module.training) for module in model.modules()]
    base.forward = lambda *_args, **_options: _Answer(hidden_BSH)
    try:
        model.train(False)  # some go to their blocks past the base: no random number is drawn there
        with torch.no_grad():
            logits = model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=head.weight.device)).logits
    except Exception:  # noqa: BLE001 - of a model that does more behind its blocks nothing is known
        return False
    finally:
        handle.remove()
        del base.forward
        if own is not None:
            base.forward = own
        for module, was_training in training:
            module.training = was_training
    return len(seen) == 1 and logits is seen[0][0] and logits._version == seen[0][1]


@dataclass(frozen=True, slots=True, kw_only=True)
class HostTables:
    """Tables of a row for each token that can stay in main memory: rows of it are looked up, or it comes in pieces.

    Attributes:
        embedding: The input's; None where something on the device uses its table.
        head: The output's, with the same table or another one; None where it has to be on the device.
    """

    embedding: nn.Embedding | None
    head: nn.Linear | None

    @property
    def weights(self) -> list[nn.Parameter]:
        """Each table once."""
        modules = [module for module in (self.embedding, self.head) if module is not None]
        found = [module.get_parameter("weight") for module in modules]
        return list({id(weight): weight for weight in found}.values())

    @property
    def numel(self) -> int:
        """Of both."""
        return sum(weight.numel() for weight in self.weights)


def host_tables(model: PreTrainedModel) -> HostTables:
    """Those of a model, or of a skeleton, whose parameters that are not trained are frozen."""
    module, output = model.get_input_embeddings(), model.get_output_embeddings()
    head = output if isinstance(output, nn.Linear) and is_frozen_and_plain(model) else None
    embedding = module if isinstance(module, nn.Embedding) else None
    if embedding is not None and head is None and isinstance(output, nn.Module):  # it is needed on the device
        embedding = None if output.get_parameter("weight") is embedding.weight else embedding
    return HostTables(embedding=embedding, head=head)
