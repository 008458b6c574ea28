"""InputProjection: what linears that read the same X make of it once for all of them.

Legend: T tokens, N columns of the weights, E columns of Q.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from lsp_ray.projection.block_factor import BlockFactor, is_launched

_Reader = TypeVar("_Reader", bound=nn.Module)


class InputProjection:
    """Keeps X Q from the first of some linears that share Q to the last; what the backward needs autograd keeps.

    Which tensor arrives decides, so a linear that for once reads another one, or is called twice, gets its own product.

    Args:
        readers: Linears that share Q; none for one that shares it with nobody.
    """

    def __init__(self, readers: Sequence[nn.Module] = ()) -> None:
        self.readers = tuple(readers)
        self._num_uses = 0
        self._held: tuple[torch.Tensor, int, BlockFactor, tuple[torch.Tensor, torch.Tensor]] | None = None
        self._is_joint = len(readers) > 1
        self._outputs: tuple[torch.Tensor, int, list[torch.Tensor | None]] | None = None  # None: asked for

    def of(self, input_TN: torch.Tensor, right: BlockFactor) -> torch.Tensor:
        """Return X Q, (T, E), in X's dtype, without a graph; X is (…, N)."""
        if torch.compiler.is_compiling():  # the compiler finds what is computed twice, and keeps no tensor here
            return right.project(_table(input_TN.detach()))
        return self._found(input_TN, right, lambda: (input_TN, right.project(_table(input_TN.detach()))))[1]

    def beside(self, input_TN: torch.Tensor, right: BlockFactor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return X, for what else reads it, and X Q with a graph: the gradients of both come back to X as one.

        That of X Q is added into that of the X returned, which must be nobody else's.
        """
        if torch.compiler.is_compiling():
            return input_TN, right.project(_table(input_TN))
        if not torch.is_grad_enabled():
            return input_TN, self.of(input_TN, right)
        return self._found(input_TN, right, lambda: _Project.apply(input_TN, right))  # type: ignore[no-untyped-call]

    def _found(
        self, input_TN: torch.Tensor, right: BlockFactor, make: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        held = self._held
        if held is None or held[0] is not input_TN or held[1] != input_TN._version or held[2] is not right:
            held = input_TN, input_TN._version, right, make()
            self._num_uses = 0
        self._num_uses += 1
        self._held = held if self._num_uses < len(self.readers) else None
        return held[3]

    def output_of(
        self,
        reader: _Reader,
        place: int,
        input_TN: torch.Tensor,
        make: Callable[[Sequence[_Reader], torch.Tensor], Sequence[torch.Tensor]],
    ) -> torch.Tensor:
        """Return what `make` makes of X for this reader: where launches count, for all readers at once.

        The others are then expected to be called with the same X. Where one is not, each makes its own from then on.

        Args:
            reader: Who asks.
            place: Its place among the readers; a number, as what is compiled for one block is to fit all.
            input_TN: X.
            make: Returns one output for each of the readers that it is given.
        """
        if not self._is_joint or not is_launched(input_TN):
            return make((reader,), input_TN)[0]
        version = 0 if torch.compiler.is_compiling() else input_TN._version  # which the compiler cannot know
        held, self._outputs = self._outputs, None
        outputs: list[torch.Tensor | None]
        if held is None:
            outputs = [*make(self.readers, input_TN)]  # type: ignore[arg-type]
        elif held[0] is input_TN and held[1] == version:
            outputs = held[2]
        else:
            outputs = [None] * len(self.readers)
        output, outputs[place] = outputs[place], None
        if output is None:
            self._is_joint = False
            return make((reader,), input_TN)[0]
        if any(left is not None for left in outputs):
            self._outputs = input_TN, version, outputs
        return output


def _table(input_TN: torch.Tensor) -> torch.Tensor:
    return input_TN.reshape(-1, input_TN.shape[-1])


class _Project(torch.autograd.Function):
    """X and X Q; keeps nothing but the factor."""

    @staticmethod
    def forward(ctx: Any, input_TN: torch.Tensor, right: BlockFactor) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.right = right
        return input_TN, right.project(_table(input_TN))

    @staticmethod
    def backward(ctx: Any, grad_TN: torch.Tensor, grad_TE: torch.Tensor) -> tuple[torch.Tensor, None]:
        grad_TN = grad_TN.contiguous()  # a linear's is its own, and contiguous
        ctx.right.add_expanded_(_table(grad_TN), grad_TE)
        return grad_TN, None
