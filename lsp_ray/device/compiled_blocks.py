"""CompiledBlocks: each block's forward and backward in one piece, compiled by torch when it first runs.

Hooks stay outside: deltas are added before a block's compiled forward, and gradients arrive at its leaves. Blocks that
are alike share what was compiled: one graph for the first size of a batch, one more for all other sizes. A block runs
operator by operator while it is observed, without gradients, and while the operators themselves are watched.
"""

from __future__ import annotations

import importlib.util
import shutil
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lsp_ray.device import gpu_products
from lsp_ray.device.projected_linear import InSubspace
from lsp_ray.errors import ConfigError
from lsp_ray.models.layers import Layer

FIELD = "torch_compile"


def check_compiler(device: str) -> None:
    """Raise ConfigError where torch cannot compile for this device: "cpu" or "cuda"."""
    if device == "cuda" and importlib.util.find_spec("triton") is None:
        raise ConfigError(FIELD, "be false without Triton, which compiles for a GPU", True)
    if not any(map(shutil.which, ("g++", "clang++", "c++", "gcc", "clang", "cc"))):
        raise ConfigError(FIELD, "be false on a machine without a C++ compiler", True, hint="as g++ is one")


class CompiledBlocks:
    """Puts itself in the place of every block's forward.

    Args:
        layers: Of the model; what is in a block may have been replaced since they were found.
        device: Where they compute.
        backend: See torch.compile.
    """

    def __init__(
        self, layers: Sequence[Layer], device: torch.device, backend: str | Callable[..., Any] = "inductor"
    ) -> None:
        # torch 2.13's compiler looks at it itself, of every input, and lets the warning through
        warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not a leaf")
        gpu_products.know_compiler()
        anchor = torch.zeros((), device=device, requires_grad=True)
        self._blocks = [_Block(layer.name, layer.block, anchor, backend) for layer in layers if layer.block is not None]

    def close(self) -> None:
        """Let the blocks be as they were."""
        for block in self._blocks:
            block.restore()


class _Block:
    def __init__(self, name: str, module: nn.Module, anchor: torch.Tensor, backend: str | Callable[..., Any]) -> None:
        self._name, self._module, self._anchor = name, module, anchor
        self._plain = self._module.forward
        self._linears = [module for module in self._module.modules() if isinstance(module, InSubspace)]
        # transformers keeps activations or not in the block's own forward; here that is decided outside of what is
        # compiled, so that there is one graph for both
        self._recomputes = bool(getattr(self._module, "gradient_checkpointing", False))
        if self._recomputes:
            self._module.gradient_checkpointing = False  # type: ignore[assignment]
        self._compiled = torch.compile(self._plain, backend=backend)
        self._module.forward = self._run

    def restore(self) -> None:
        """Take the wrapper off."""
        del self._module.forward
        if self._recomputes:
            self._module.gradient_checkpointing = True  # type: ignore[assignment]

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        """The block's forward."""
        if not torch.is_grad_enabled():
            return self._plain(*args, **kwargs)
        is_observed = any(linear.lesson is not None or linear.probe is not None for linear in self._linears)
        forward = self._plain if is_observed or _is_watched() else self._compiled
        if forward is self._compiled and args and isinstance(args[0], torch.Tensor) and not args[0].requires_grad:
            # the first block of all: with a graph of its own, it would be compiled once more for each size
            args = (_Wanted.apply(self._anchor, args[0]), *args[1:])  # type: ignore[no-untyped-call]
        try:
            if self._recomputes:
                return checkpoint(forward, *args, use_reentrant=False, **kwargs)
            return forward(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            bound = f"be false for this model: {self._name} cannot be compiled"
            lines = [line for line in str(error).splitlines() if line.strip() and not line.endswith("raised:")]
            raise ConfigError(FIELD, bound, True, hint=lines[0] if lines else type(error).__name__) from error


def _is_watched() -> bool:
    """Whether a mode sees every operator: torch gives up on a function for good that it first meets under one."""
    return torch._C._len_torch_dispatch_stack() > 0


class _Wanted(torch.autograd.Function):
    """A tensor as one of which a gradient is wanted, which goes nowhere."""

    @staticmethod
    def forward(ctx: Any, _anchor: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, _grad: torch.Tensor) -> tuple[None, None]:
        return None, None
