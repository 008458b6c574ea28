"""ProjectedLinear: a linear layer whose backward yields the compressed weight gradient and never the full one.

Legend: T tokens, M rows (out), N columns (in), D × E what is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import nn
from torch.nn.functional import linear

from lsp_ray.device import gpu_products
from lsp_ray.device.addition import Addition
from lsp_ray.device.fits import Lesson
from lsp_ray.device.input_projection import InputProjection
from lsp_ray.projection.bias import grad_square_sum, relative_bias
from lsp_ray.projection.block_factor import BlockFactor, is_launched
from lsp_ray.projection.sparse_projector import SparseProjector, product_float32


class InSubspace(nn.Module):
    """What takes a linear's place and yields its weight's gradient as g = Pᵀ dYᵀ X Q, never the full one.

    Autograd's view of the weight is `leaf`, a float32 (D, E) parameter that occupies one element; g is its `grad`.
    Autograd itself then accumulates micro-batches, sums repeated uses and tells when g is complete.

    Args:
        projector: P and Q for the (M, N) weight, where and in the type in which it computes.
    """

    def __init__(self, projector: SparseProjector) -> None:
        super().__init__()
        self._leaf: tuple[nn.Parameter, ...] = ()
        self.lesson: Lesson | None = None  # while set, every gradient is added to it
        self.probe: BiasProbe | None = None  # while set, it sees every gradient
        self.input_projection = InputProjection()  # the same object in linears that share Q
        self.place = 0  # among these
        self.set_projector(projector)

    def set_projector(self, projector: SparseProjector) -> None:
        """Train in another subspace from now on. With another dimension there is a new leaf, without its hooks."""
        self.projector = projector
        self.update_scale = projector.update_scale
        shape = projector.dims
        if self._leaf and self.leaf.shape == shape:
            return
        leaf = nn.Parameter(torch.zeros((), device=projector.device).expand(shape), requires_grad=True)
        self._leaf = (leaf,)  # in a tuple, so that it is no parameter of the module and not in its state

    @property
    def leaf(self) -> nn.Parameter:
        """The (D, E) autograd leaf; its own value is never read."""
        return self._leaf[0]

    def stand_in(self, leaf: torch.Tensor) -> Callable[[], None]:
        """Let the forward read another leaf; returns what ends that."""
        own, self._leaf = self._leaf, (leaf,)  # type: ignore[assignment]

        def put_back() -> None:
            self._leaf = own

        return put_back

    @property
    def is_observed(self) -> bool:
        """Whether the backward is to show what it sees: X is then kept."""
        return self.lesson is not None or self.probe is not None


class ProjectedLinear(InSubspace):
    """Keeps the linear's weight and bias under their names, so checkpoints do not change; deltas are added to them.

    Args:
        module: The nn.Linear or Conv1D replaced.
        transposed: Whether its weight is kept as (in, out).
        projector: P and Q for the (M, N) weight.
    """

    def __init__(self, module: nn.Module, *, transposed: bool, projector: SparseProjector) -> None:
        super().__init__(projector)
        self.weight = module.get_parameter("weight")
        self.weight.requires_grad_(False)
        self.bias: nn.Parameter | None
        self.register_parameter("bias", dict(module.named_parameters(recurse=False)).get("bias"))
        self.transposed = transposed

    @property
    def weight_MN(self) -> torch.Tensor:
        """The weight as (out, in), a view."""
        weight = self._parameters["weight"]  # as `self.weight`, for less of the host's time
        assert weight is not None
        return weight.t() if self.transposed else weight

    def forward(self, input_TN: torch.Tensor) -> torch.Tensor:
        """Return X Wᵀ + b for (..., N)."""
        if not torch.is_grad_enabled():
            return linear(input_TN, self.weight_MN, self.bias)
        return self.input_projection.output_of(self, self.place, input_TN, _outputs)


def _outputs(modules: Sequence[ProjectedLinear], input_TN: torch.Tensor) -> Sequence[torch.Tensor]:
    """Each one's X Wᵀ + b, of linears that share Q; one node of autograd's graph for all of them."""
    projected_TE = None  # made inside, without autograd, unless others that share Q are to have it
    if len(modules) < len(modules[0].input_projection.readers):
        projected_TE = modules[0].input_projection.of(input_TN, modules[0].projector.right)
    leaves, biases = [module.leaf for module in modules], [module._parameters["bias"] for module in modules]
    outputs: Sequence[torch.Tensor] = _Projected.apply(  # type: ignore[no-untyped-call]
        modules, input_TN, projected_TE, *leaves, *biases
    )
    return outputs


_Module = TypeVar("_Module", bound=InSubspace)


class SubspaceTarget(Generic[_Module]):
    """Trains a linear in its projector's subspace (see `Target`)."""

    def __init__(self, module: _Module) -> None:
        self.owner = module

    @property
    def leaf(self) -> nn.Parameter:
        """The (D, E) leaf."""
        return self.owner.leaf

    def stand_in(self, leaf: torch.Tensor) -> Callable[[], None]:
        """See `Target`."""
        return self.owner.stand_in(leaf)


class ProjectedTarget(SubspaceTarget[ProjectedLinear]):
    """Deltas are added to the linear's weight."""

    @property
    def addition(self) -> Addition:
        """See `AddedTarget`: W ← (1 − lr · decay) W + scale · P clamp(gain · δ) Qᵀ."""
        return Addition(self.owner.weight_MN, self.owner.projector, self.owner.update_scale)


def on_device(modules: Sequence[InSubspace], projectors: Sequence[SparseProjector]) -> list[SparseProjector]:
    """These projectors where and in the type in which linears that share Q compute, with one Q."""
    device, dtype = modules[0].projector.device, modules[0].projector.dtype
    right = projectors[0].right.to(device, dtype)
    return [SparseProjector(projector.left.to(device, dtype), right) for projector in projectors]


def set_projectors(modules: Sequence[InSubspace], projectors: Sequence[SparseProjector]) -> None:
    """Give linears that share Q, all of them at once, their projectors, brought to where they compute.

    Values take the place of old ones of the same size that the same linears share: a graph reads them where they were.
    """
    projectors = on_device(modules, projectors)
    projection, right = InputProjection(modules), projectors[0].right
    shares = {id(module.input_projection) for module in modules}
    if len(shares) == 1 and max(1, len(modules[0].input_projection.readers)) == len(modules):
        right = _in_place(modules[0].projector.right, right)
    for place, (module, projector) in enumerate(zip(modules, projectors, strict=True)):
        module.input_projection, module.place = projection, place
        module.set_projector(SparseProjector(_in_place(module.projector.left, projector.left), right))


def _in_place(old: BlockFactor, new: BlockFactor) -> BlockFactor:
    """The new factor, in the old one's memory if it is of the same size."""
    before, after = old.value_FR, new.value_FR
    if before.shape != after.shape or before.dtype != after.dtype or before.device != after.device:
        return new
    if before is not after:
        before.copy_(after)
    return BlockFactor(before, new.groups, new.scale_F)


class BiasProbe:
    """Holds what tells the bias of the last gradient that passed through the module, until it is read."""

    def __init__(self) -> None:
        self._parts: tuple[torch.Tensor, torch.Tensor] | None = None

    def see(
        self,
        projector: SparseProjector,
        compressed_DE: torch.Tensor,
        grad_output_TM: torch.Tensor,
        input_TN: torch.Tensor,
    ) -> None:
        """Note one micro-batch's g and the norm of its gradient; nothing is synchronised yet."""
        self._parts = compressed_DE, grad_square_sum(projector, grad_output_TM, input_TN)

    def read(self) -> float | None:
        """The relative bias of what was seen last; None if nothing was, or if it was zero or not finite."""
        if self._parts is None:
            return None
        compressed_DE, square_sum = self._parts
        return relative_bias(compressed_DE, float(square_sum))


class Observers(NamedTuple):
    """Who watches a linear's gradients, as it was when its forward ran."""

    lesson: Lesson | None
    probe: BiasProbe | None

    @classmethod
    def of(cls, module: InSubspace) -> Observers:
        """The module's."""
        return cls(module.lesson, module.probe)

    def see(
        self,
        projector: SparseProjector,
        grad_DE: torch.Tensor,
        grad_output_TM: torch.Tensor,
        input_TN: torch.Tensor,
    ) -> None:
        """Show them a micro-batch's g, and of what it was made; X is (…, N)."""
        input_TN = input_TN.reshape(-1, input_TN.shape[-1])
        if self.lesson is not None:
            self.lesson.add(grad_output_TM, input_TN)
        if self.probe is not None:
            self.probe.see(projector, grad_DE, grad_output_TM, input_TN)


def _compressed(
    lefts: Sequence[BlockFactor], tables: Sequence[torch.Tensor], projected_TE: torch.Tensor
) -> Sequence[torch.Tensor]:
    """Return (dY P)ᵀ (X Q), float32 (D, E), for each P and (T, M) dY of linears that share Q.

    Where launches count and there is a kernel, all dY P are made in one launch, and all g in one product.
    """
    if len(lefts) == 1 or not is_launched(projected_TE) or not gpu_products.has_kernel(lefts, tables):
        pairs = zip(lefts, tables, strict=True)
        return [product_float32(left.project(table_TM).t(), projected_TE) for left, table_TM in pairs]
    joined_KT = gpu_products.project(lefts, tables)
    dims = [left.dim for left in lefts]
    grads: Sequence[torch.Tensor] = product_float32(joined_KT, projected_TE).split(dims)
    return grads


class _Projected(torch.autograd.Function):
    """Forward of linears that share Q keeps X Q in place of X; backward returns dX and, as the leaves' gradients, g.

    Only where one of them is observed X is kept as well.
    """

    @staticmethod
    def forward(
        ctx: Any,
        modules: Sequence[ProjectedLinear],
        input_TN: torch.Tensor,
        projected_TE: torch.Tensor | None,
        *leaves_and_biases: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        if projected_TE is None:
            projected_TE = modules[0].projector.right.project(input_TN.reshape(-1, input_TN.shape[-1]))
        weights, biases = [module.weight_MN for module in modules], leaves_and_biases[len(modules) :]
        ctx.projectors = [module.projector for module in modules]
        ctx.observers = [Observers(module.lesson, module.probe) for module in modules]
        is_observed = any(module.is_observed for module in modules)
        ctx.save_for_backward(projected_TE, input_TN if is_observed else None, *weights)
        return tuple([linear(input_TN, *pair) for pair in zip(weights, biases, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        projected_TE, input_TN, *weights = ctx.saved_tensors
        tables = [grad.reshape(-1, grad.shape[-1]) for grad in grad_outputs]
        grad_input = None
        if ctx.needs_input_grad[1]:
            grad_input_TN = tables[0] @ weights[0]
            for grad_TM, weight_MN in zip(tables[1:], weights[1:], strict=True):
                grad_input_TN.addmm_(grad_TM, weight_MN)
            grad_input = grad_input_TN.view(*grad_outputs[0].shape[:-1], -1)
        needs_bias = ctx.needs_input_grad[3 + len(tables) :]
        grad_biases = [table.sum(0) if needs else None for table, needs in zip(tables, needs_bias, strict=True)]
        grad_leaves = _compressed([projector.left for projector in ctx.projectors], tables, projected_TE)
        if input_TN is not None:
            for seen in zip(ctx.observers, ctx.projectors, grad_leaves, tables, strict=True):
                seen[0].see(*seen[1:], input_TN)
        return None, grad_input, None, *grad_leaves, *grad_biases
