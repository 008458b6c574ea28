"""DeltaLinear: a frozen linear and, apart from it, what training has added to it: Y = base(X) + ((X Q) Dᵀ) Pᵀ.

The base is any module with a forward and a gradient of its input: its weight may be bfloat16, 8-bit or 4-bit, and never
changes. D takes the memory of a payload, and the products need X Q and dY P, which the compressed gradient needs too.

Legend: T tokens, M rows (out), N columns (in), D × E what is sent.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lsp_ray.device.projected_linear import InSubspace, Observers, SubspaceTarget
from lsp_ray.models.quantized import dense_weight
from lsp_ray.projection.sparse_projector import SparseProjector, product_float32


class DeltaLinear(InSubspace):
    """See the module's text.

    Args:
        base: The linear replaced; its parameters are frozen but for a bias that is trained.
        transposed: Whether its weight is kept as (in, out).
        projector: P and Q for the (M, N) weight, in the type of the activations.

    Attributes:
        delta_DE: D, in the projector's type; zeros before the first update.
        is_merged: Whether the base has changed: it holds what other projectors' D was.
    """

    delta_DE: torch.Tensor

    def __init__(self, base: nn.Module, *, transposed: bool, projector: SparseProjector) -> None:
        super().__init__(projector)
        self.base = base
        self.transposed, self.is_merged = transposed, False
        for parameter in base.parameters(recurse=False):
            if parameter.ndim > 1:
                parameter.requires_grad_(False)
        delta_DE = torch.zeros(projector.dims, device=projector.device, dtype=projector.dtype)
        self.register_buffer("delta_DE", delta_DE, persistent=False)

    def __getattr__(self, name: str) -> Any:
        """The base's weight and bias under their names, for models that look at them."""
        if name in ("weight", "bias"):
            return getattr(self.base, name)
        return super().__getattr__(name)

    def forward(self, input_TN: torch.Tensor) -> torch.Tensor:
        """Return base(X) + X (P D Qᵀ)ᵀ for (..., N)."""
        input_TN, projected_TE = self.input_projection.beside(input_TN, self.projector.right)
        # of a table: what linears make of more dimensions is a view, which autograd copies where it is changed
        output_TM: torch.Tensor = self.base(input_TN.reshape(-1, input_TN.shape[-1]))
        if not torch.compiler.is_compiling() and output_TM._is_view():
            output_TM = output_TM.clone()
        if not torch.is_grad_enabled():
            self.projector.left.add_expanded_(output_TM, projected_TE @ self.delta_DE.to(projected_TE.dtype).t())
            return output_TM.view(*input_TN.shape[:-1], -1)
        observed_TN = input_TN.detach() if self.is_observed else None
        changed: torch.Tensor = _WithDelta.apply(  # type: ignore[no-untyped-call]
            output_TM, projected_TE, self.leaf, self.delta_DE, observed_TN, self
        )
        return changed.view(*input_TN.shape[:-1], -1)

    def merged(self) -> torch.Tensor:
        """W + P D Qᵀ, added in float32, in the projector's type: a dense weight, transposed if the base's is."""
        weight_MN = dense_weight(self.base, self.projector.dtype)
        delta_MN = self.projector.to(self.projector.device, torch.float32).decompress(self.delta_DE.float())
        merged_MN = delta_MN.add_(weight_MN.to(delta_MN.device)).to(weight_MN.dtype)
        return merged_MN.t() if self.transposed else merged_MN

    def merge_(self) -> None:
        """Let the base hold what D adds to it, and D begin anew: before other projectors take over."""
        with torch.no_grad():
            self.weight.copy_(self.merged())
            self.delta_DE.zero_()
        self.is_merged = True


class DeltaTarget(SubspaceTarget[DeltaLinear]):
    """What comes up is D."""

    def put(self, total: torch.Tensor) -> None:
        """Take a flat sum of all updates in the old one's place; D is `update_scale` times that."""
        module = self.owner
        torch.mul(total.view(module.delta_DE.shape), module.update_scale, out=module.delta_DE)

    def total(self) -> torch.Tensor:
        """See `SummedTarget`."""
        return self.owner.delta_DE.float() / self.owner.update_scale


class _WithDelta(torch.autograd.Function):
    """Forward adds ((X Q) Dᵀ) Pᵀ to the base's output in place; backward returns g as the leaf's gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        output_TM: torch.Tensor,
        projected_TE: torch.Tensor,
        leaf_DE: torch.Tensor,
        delta_DE: torch.Tensor,
        observed_TN: torch.Tensor | None,
        module: DeltaLinear,
    ) -> torch.Tensor:
        ctx.projector, ctx.observers = module.projector, Observers.of(module)
        ctx.save_for_backward(projected_TE, delta_DE, observed_TN)
        inner_TD = projected_TE @ delta_DE.to(projected_TE.dtype).t()
        if torch.compiler.is_compiling():  # what is in place the compiler decides
            return output_TM + module.projector.left.expand(inner_TD)
        module.projector.left.add_expanded_(output_TM, inner_TD)
        ctx.mark_dirty(output_TM)
        return output_TM

    @staticmethod
    def backward(ctx: Any, grad_output_TM: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        projected_TE, delta_DE, observed_TN = ctx.saved_tensors
        grad_TD = ctx.projector.left.project(grad_output_TM)
        grad_DE = product_float32(grad_TD.t(), projected_TE)
        if observed_TN is not None:
            ctx.observers.see(ctx.projector, grad_DE, grad_output_TM, observed_TN)
        return grad_output_TM, grad_TD @ delta_DE.to(grad_TD.dtype), grad_DE, None, None, None
