"""Nothing as large as the full gradient is ever made, and the forward keeps X Q in place of X.

Legend: M rows (out), N columns (in), D × E what is sent, R non-zeros a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lsp_ray.device.fits import GradientSketch
from lsp_ray.device.projected_linear import set_projectors
from tests.linears import (
    TOKENS,
    TRANSPOSED,
    D,
    E,
    M,
    N,
    backward,
    generator,
    normal,
    plain,
    sharing,
    square_loss,
    wrapped,
)


class FreshStorages(TorchDispatchMode):
    """Records the bytes of every storage that an operation makes; views of older storages do not count."""

    def __init__(self, *older: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive = list(older)  # held, so that no address is used twice
        self.known = {tensor.untyped_storage().data_ptr() for tensor in older}
        self.sizes: list[int] = []

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.known.add(tensor.untyped_storage().data_ptr())
                self.alive.append(tensor)
                self.sizes.append(tensor.untyped_storage().nbytes())
        return output


def largest_allocation(module: nn.Module) -> int:
    """The largest storage, in float32 elements, made by a forward and a backward with a gradient for the input."""
    input_TN = normal(*TOKENS, N).requires_grad_()
    fresh = FreshStorages(input_TN, *module.parameters())
    with fresh:
        backward(square_loss(module, input_TN))
    assert input_TN.grad is not None
    return max(fresh.sizes) // 4


@TRANSPOSED
def test_forward_and_backward_never_allocate_anything_as_large_as_the_weight(transposed: bool) -> None:
    assert largest_allocation(plain(transposed=transposed)) == M * N  # what is watched for is seen where it exists
    assert largest_allocation(wrapped(transposed=transposed)) <= max(D * E, 8 * M) < M * N / 4


@TRANSPOSED
def test_a_sketched_backward_never_allocates_anything_as_large_as_the_weight(
    transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lsp_ray.device.fits.SKETCH_WIDTH", 10)  # real weights are larger than real sketches
    module = wrapped(transposed=transposed)
    module.lesson = GradientSketch((M, N), generator())
    assert largest_allocation(module) <= 10 * M < M * N / 4


def saved_numels(modules: Sequence[nn.Module]) -> list[int]:
    """Elements of each storage that a forward keeps for the backward, the weights' own left out."""
    known = {module.get_parameter("weight").untyped_storage().data_ptr() for module in modules}
    numels: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            known.add(tensor.untyped_storage().data_ptr())
            numels.append(tensor.untyped_storage().nbytes() // tensor.element_size())
        return tensor

    input_TN = normal(*TOKENS, N).requires_grad_()
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = [module(input_TN) for module in modules]
    assert len(outputs) == len(modules)
    return numels


@TRANSPOSED
def test_the_forward_keeps_the_projected_input_and_not_the_input(transposed: bool) -> None:
    assert saved_numels([plain(transposed=transposed)]) == [8 * N]
    assert saved_numels([wrapped(transposed=transposed)]) == [8 * E]


def test_linears_that_share_q_keep_one_projected_input_between_them() -> None:
    modules = [wrapped() for _ in range(3)]
    assert saved_numels(modules) == [8 * E] * 3
    set_projectors(modules, sharing(3))
    assert saved_numels(modules) == [8 * E]


@TRANSPOSED
def test_the_input_is_freed_once_its_owner_lets_go(transposed: bool) -> None:
    freed = []
    for module in (plain(transposed=transposed), wrapped(transposed=transposed)):
        input_TN = normal(*TOKENS, N)
        storage = StorageWeakRef(input_TN.untyped_storage())
        output = module(input_TN)
        del input_TN
        freed.append(storage.expired())
        backward(output.sum())
    assert freed == [False, True]
