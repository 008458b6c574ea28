"""Root mean square norms in one launch forward and two backward, where transformers' own take some twenty.

A model on a GPU gets them, whatever trains it. They are a bit nearer to exact arithmetic than transformers' (which
round to bfloat16 before the weight is multiplied as well as after): 0.0017 against 0.0023 in the output and 0.0029 in
the weight's gradient, relative to float64. On a CPU, where no launch is saved, the model stays as it is.

Legend: N width.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import rms_norm

from lsp_ray.projection.block_factor import is_launched

_HAS_KERNEL = hasattr(torch.ops.aten, "_fused_rms_norm")  # torch 2.9 on
_TOLERANCE = 1e-5  # of float32 values of size 1


def fuse_norms(model: nn.Module) -> int:
    """Give every norm on a GPU that computes x / sqrt(mean(x²) + eps) · weight torch's kernel; returns their number."""
    num_fused, kinds = 0, dict[type[nn.Module], type[nn.Module]]()
    for module in model.modules():
        eps = rms_eps(module)
        if eps is not None and _HAS_KERNEL and is_launched(module.get_parameter("weight")):
            kind = type(module)
            # a class and no forward of the module's own: what torch compiles for one block is to fit all
            fused = kinds.setdefault(kind, type(kind.__name__, (_Fused, kind), {"__module__": kind.__module__}))
            module.__class__ = fused
            setattr(module, "fused_eps", eps)  # noqa: B010  # of a type that modules do not declare
            num_fused += 1
    return num_fused


def rms_eps(module: nn.Module) -> float | None:
    """The eps of a module that is by its name and by what it computes a root mean square norm; else None."""
    if not type(module).__name__.lower().endswith("rmsnorm"):
        return None
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    parameters = dict(module.named_parameters())
    if not isinstance(eps, float) or list(parameters) != ["weight"] or parameters["weight"].ndim != 1:
        return None
    drawn_KN = torch.randn(4, parameters["weight"].numel(), generator=torch.Generator().manual_seed(0))
    weight_N, input_KN = drawn_KN[0], drawn_KN[1:]
    with torch.no_grad():
        found_KN = functional_call(module, {"weight": weight_N}, (input_KN,))
    expected_KN = nn.functional.rms_norm(input_KN, weight_N.shape, weight_N, eps)
    is_rms = found_KN.shape == expected_KN.shape and torch.allclose(found_KN, expected_KN, _TOLERANCE, _TOLERANCE)
    return eps if is_rms else None


class _Fused(nn.Module):
    """Comes before a norm's own class."""

    fused_eps: float

    def forward(self, input_TN: torch.Tensor) -> torch.Tensor:
        weight_N = self._parameters["weight"]  # where it stands whenever this runs: another parameter may stand in
        assert weight_N is not None
        if input_TN.dtype != weight_N.dtype:
            plain: torch.Tensor = super().forward(input_TN)
            return plain
        return rms_norm(input_TN, weight_N.shape, weight_N, self.fused_eps)
