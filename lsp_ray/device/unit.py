"""What the device trains: targets (one gradient each) grouped into units (one payload each).

Legend: M rows (out), N columns (in).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Protocol, cast

import torch
from torch import nn

from lsp_ray.device.addition import Addition
from lsp_ray.device.kernels import Adder
from lsp_ray.device.rounding import Rounding
from lsp_ray.optim.adamw import AdamWHyper, AdamWState


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What applying the deltas of one step needs besides the deltas."""

    step: int
    learning_rate: float
    weight_decay: float
    rounding: Rounding


class Target(Protocol):
    """Something trained: autograd leaves its payload in `leaf.grad`."""

    @property
    def leaf(self) -> nn.Parameter:
        """The autograd leaf whose gradient is sent; its shape gives the payload's length."""
        ...

    @property
    def owner(self) -> nn.Module:
        """The module whose forward reads the weight."""
        ...

    def stand_in(self, leaf: torch.Tensor) -> Callable[[], None]:
        """Let the owner's forward read another tensor in the leaf's place; returns what ends that."""
        ...


class AddedTarget(Target, Protocol):
    """What comes up is a delta, which is added to a weight."""

    @property
    def addition(self) -> Addition:
        """The weight as it is now, to which a delta of the leaf's length is added."""
        ...


class SummedTarget(Target, Protocol):
    """What comes up is the sum of all deltas until then, which the shard keeps."""

    def put(self, total: torch.Tensor) -> None:
        """Let it take the old one's place: flat, of the leaf's length, any floating type."""
        ...

    def total(self) -> torch.Tensor:
        """The sum that is there now: float32, of the leaf's length, any shape, a new tensor."""
        ...


class RawTarget:
    """A parameter trained as it is: its gradient goes down, its full delta comes up."""

    def __init__(self, parameter: nn.Parameter, owner: nn.Module) -> None:
        self.leaf = parameter
        self.owner = owner

    def stand_in(self, leaf: torch.Tensor) -> Callable[[], None]:
        """See `Target`."""
        slots: dict[str, Any] = self.owner._parameters
        name = next(name for name, parameter in slots.items() if parameter is self.leaf)
        slots[name] = leaf

        def put_back() -> None:
            slots[name] = self.leaf

        return put_back

    @property
    def addition(self) -> Addition:
        """See `AddedTarget`. Biases and norms (one dimension) have no weight decay."""
        return Addition(self.leaf, decays=self.leaf.ndim > 1)


class StartedTarget(RawTarget):
    """The same where the shard keeps the sum: what the parameter began with stays beside it."""

    def __init__(self, parameter: nn.Parameter, owner: nn.Module) -> None:
        super().__init__(parameter, owner)
        self.start = parameter.detach().clone()

    def put(self, total: torch.Tensor) -> None:
        """See `SummedTarget`."""
        torch.add(self.start, total.view(self.start.shape), out=self.leaf.data)

    def total(self) -> torch.Tensor:
        """See `SummedTarget`."""
        return self.leaf.detach().float() - self.start.float()


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """A layer's targets; sent, updated and applied as one flat payload.

    `readers` are the modules before whose forward the unit's delta must have been added.
    """

    index: int
    name: str
    targets: Sequence[Target]
    readers: Sequence[nn.Module]
    first_key: int
    _adder: Adder = field(default_factory=Adder, init=False, repr=False, compare=False)

    @property
    def numel(self) -> int:
        """Payload length in elements, before it is encoded."""
        return sum(target.leaf.numel() for target in self.targets)

    @property
    def offsets(self) -> list[int]:
        """Each target's first element in the payload."""
        sizes = [target.leaf.numel() for target in self.targets]
        return [0, *accumulate(sizes)][:-1]

    def split(self, flat: torch.Tensor) -> Sequence[torch.Tensor]:
        """The targets' parts of a flat tensor of `numel` elements, as views."""
        parts: Sequence[torch.Tensor] = flat.split([target.leaf.numel() for target in self.targets])
        return parts

    def take_gradient(self, payload: torch.Tensor | None = None) -> torch.Tensor:
        """Move the targets' gradients from their leaves into a flat payload of `numel` elements.

        Args:
            payload: float32 or bfloat16; default: a new one, in the gradients' own type.
        """
        gradients = [_taken_gradient(target) for target in self.targets]
        if payload is None or all(gradient.dtype == payload.dtype for gradient in gradients):
            return torch.cat(gradients, out=payload)
        copy_parts(self.split(payload), gradients)
        return payload

    def add_gradient(self, flat: torch.Tensor) -> None:
        """Add flat gradients to those at the leaves, each in its leaf's type, as autograd does; `flat` is copied."""
        for target, part in zip(self.targets, self.split(flat), strict=True):
            leaf, gradient = target.leaf, part.view(target.leaf.shape)
            if leaf.grad is None:
                leaf.grad = gradient.to(leaf.dtype, copy=True)
            else:
                leaf.grad += gradient.to(leaf.dtype)

    def apply(self, delta: torch.Tensor, update: Update) -> None:
        """Add a flat float32 or bfloat16 delta of `numel` elements to the unit's targets."""
        self._adder.add_(
            self._additions,
            delta,
            update.rounding.of_step(update.step),
            first_key=self.first_key,
            learning_rate=update.learning_rate,
            weight_decay=update.weight_decay,
        )

    def adamw_(self, state: AdamWState, update: Update, *, grad_scale: float, hyper: AdamWHyper) -> None:
        """Take the raw targets' finite gradients and let AdamW step from them times `grad_scale`, in place."""
        self._adder.adamw_(
            self._additions,
            self.take_gradient(),
            state,
            update.rounding.of_step(update.step),
            first_key=self.first_key,
            learning_rate=update.learning_rate,
            weight_decay=update.weight_decay,
            grad_scale=grad_scale,
            hyper=hyper,
        )

    @property
    def _additions(self) -> list[Addition]:
        return [cast("AddedTarget", target).addition for target in self.targets]


class SummedUnit(Unit):
    """A unit of `SummedTarget`s."""

    def apply(self, delta: torch.Tensor, update: Update) -> None:
        """Let the sum of all updates, flat, take the place of the one before; `update` is in it already."""
        for target, part in zip(self.targets, self.split(delta), strict=True):
            cast("SummedTarget", target).put(part)

    def copy_totals(self, flat: torch.Tensor) -> None:
        """Copy the sums that are there now into a flat float32 tensor of `numel` elements, on any device."""
        for target, part in zip(self.targets, self.split(flat), strict=True):
            part.copy_(cast("SummedTarget", target).total().view(-1))


def copy_parts(parts: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copy each source into its part, of its shape and any type: on a GPU in one launch for each type of the sources.

    `torch.cat` into another type is a launch for each.
    """
    for dtype in {source.dtype: None for source in sources}:
        pairs = [pair for pair in zip(parts, sources, strict=True) if pair[1].dtype == dtype]
        torch._foreach_copy_([part for part, _ in pairs], [source for _, source in pairs])


def _taken_gradient(target: Target) -> torch.Tensor:
    """The leaf's gradient, flat, removed from the leaf; zeros where the forward did not use it."""
    gradient = target.leaf.grad
    target.leaf.grad = None
    if gradient is None:
        return torch.zeros(target.leaf.numel(), dtype=target.leaf.dtype, device=target.leaf.device)
    return gradient.flatten()
