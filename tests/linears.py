"""A linear, the same linear wrapped, and the gradients of both.

Legend: M rows (out), N columns (in), D × E what is sent, R non-zeros a row, T tokens.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lsp_ray.device.projected_linear import InSubspace, ProjectedLinear
from lsp_ray.projection.block_factor import BlockFactor
from lsp_ray.projection.sparse_projector import ProjectorSizes, SparseProjector

M, N, D, E, R = 96, 80, 16, 12, 4
SIZES = ProjectorSizes(shape=(M, N), dims=(D, E), nnz_per_row=R)  # groups of 24 rows, and of 27 and 26
TOKENS = (2, 4)  # 8 in all: T·M, T·N and D·N are far below M·N
FLOAT32 = 1e-6  # relative, of sums of at most 96 products, each rounded by 6e-8
TRANSPOSED = pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
KIND = pytest.mark.parametrize(
    ("transposed", "bias"), [(False, True), (False, False), (True, True)], ids=["linear", "linear_no_bias", "conv1d"]
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def projector(seed: int = 0, sizes: ProjectorSizes = SIZES) -> SparseProjector:
    return SparseProjector.random(sizes, generator(seed))


def scaled(factor: BlockFactor, seed: int = 0) -> BlockFactor:
    """S U, for a U that is this factor."""
    return factor.with_bases(factor.blocks(), torch.rand(factor.num_rows, generator=generator(seed)) + 0.2)


def balanced(by: SparseProjector, seed: int = 0) -> SparseProjector:
    return SparseProjector(scaled(by.left, seed), scaled(by.right, seed + 1))


def sharing(num: int, seed: int = 0) -> list[SparseProjector]:
    """Projectors with a P each and one Q."""
    drawn = [projector(seed + index) for index in range(num)]
    return [SparseProjector(each.left, drawn[0].right) for each in drawn]


def plain(*, transposed: bool = False, bias: bool = True) -> nn.Module:
    """An nn.Linear or a Conv1D, its weights decided here."""
    module: nn.Module = Conv1D(M, N) if transposed else nn.Linear(N, M, bias=bias)
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=100 + index))
    return module


def wrapped(*, transposed: bool = False, bias: bool = True) -> ProjectedLinear:
    return ProjectedLinear(plain(transposed=transposed, bias=bias), transposed=transposed, projector=projector())


def gradient_MN(module: nn.Module, *, transposed: bool) -> torch.Tensor:
    """Autograd's own full gradient as (out, in)."""
    grad = module.get_parameter("weight").grad
    assert grad is not None
    return grad.t() if transposed else grad


def leaf_grad(module: InSubspace) -> torch.Tensor:
    assert module.leaf.grad is not None
    return module.leaf.grad


def compressed(grad_MN: torch.Tensor, by: SparseProjector | None = None) -> torch.Tensor:
    by = by or projector()
    return by.left.dense().double().t() @ grad_MN.double() @ by.right.dense().double()


def relative_error(actual: torch.Tensor | None, expected: torch.Tensor | None) -> float:
    assert actual is not None
    assert expected is not None
    error = actual.detach().double() - expected.detach().double()
    return float(error.norm() / expected.detach().double().norm())


def backward(loss: torch.Tensor) -> None:
    torch.autograd.backward([loss])


def square_loss(module: nn.Module, input_TN: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = module(input_TN).square().sum()
    return loss
