"""The loss in chunks: exact, small, and as large as its formula says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

from lsp_ray.device.memory import peak_of
from lsp_ray.models.chunked_loss import CHUNK_LOGITS, chunked_loss, positions_at_once
from lsp_ray.sim import memory
from lsp_ray.sim.memory import loss_bytes


def case(
    positions: int, vocabulary: int, hidden: int, *, bias: bool = False, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, nn.Linear, torch.Tensor]:
    generator = torch.Generator().manual_seed(positions)
    head = nn.Linear(hidden, vocabulary, bias=bias, dtype=dtype).requires_grad_(False)
    for parameter in head.parameters():
        parameter.normal_(generator=generator)
    hidden_KH = torch.randn(positions, hidden, generator=generator).to(dtype).requires_grad_()
    return hidden_KH, head, torch.randint(vocabulary, (positions,), generator=generator)


def reference(hidden_KH: torch.Tensor, head: nn.Linear, targets_K: torch.Tensor, factor: float) -> list[torch.Tensor]:
    """Loss and gradient in float64."""
    hidden_KH = hidden_KH.detach().double().requires_grad_()
    bias_V = None if head.bias is None else head.bias.double()
    loss = cross_entropy(nn.functional.linear(hidden_KH, head.weight.double(), bias_V), targets_K, reduction="sum")
    return [loss.detach(), *torch.autograd.grad(loss * factor, [hidden_KH])]


@settings(max_examples=50, deadline=None)
@given(
    positions=st.integers(0, 40),
    vocabulary=st.integers(1, 60),
    hidden=st.integers(1, 20),
    chunk_logits=st.integers(1, 2000),
    bias=st.booleans(),
)
def test_loss_and_gradient_are_exact_however_large_a_chunk(
    positions: int, vocabulary: int, hidden: int, chunk_logits: int, bias: bool
) -> None:
    inputs = case(positions, vocabulary, hidden, bias=bias)
    loss = chunked_loss(*inputs, chunk_logits)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    found = [loss.detach().double(), torch.autograd.grad(loss * 0.3, [inputs[0]])[0].double()]
    for ours, exact in zip(found, reference(*inputs, 0.3), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=2e-5)


def test_in_bfloat16_the_gradient_is_no_further_from_the_exact_one_than_autograds() -> None:
    inputs = case(40, 300, 32, dtype=torch.bfloat16)
    hidden_KH, head, targets_K = inputs
    exact = reference(*inputs, 1 / 37)[1]
    plain = cross_entropy(head(hidden_KH).float(), targets_K, reduction="sum")
    gradients = [torch.autograd.grad(loss / 37, [hidden_KH])[0] for loss in (plain, chunked_loss(*inputs, 1500))]
    errors = [float((gradient.double() - exact).norm() / exact.norm()) for gradient in gradients]
    assert errors[1] < 1.2 * errors[0]


@given(positions=st.integers(1, 5000), vocabulary=st.integers(1, 300_000), chunk_logits=st.integers(1, 1 << 26))
def test_no_chunk_is_larger_than_asked_for_but_of_a_single_position(
    positions: int, vocabulary: int, chunk_logits: int
) -> None:
    size = positions_at_once(positions, vocabulary, chunk_logits)
    assert 1 <= size <= positions
    assert size == 1 or size * vocabulary <= chunk_logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("positions", "vocabulary", "hidden"), [(96, 4096, 8), (96, 2048, 64), (512, 512, 256)])
def test_the_peak_is_forecast(positions: int, vocabulary: int, hidden: int, dtype: torch.dtype) -> None:
    hidden_KH, head, targets_K = case(positions, vocabulary, hidden, dtype=dtype)
    sizes = positions, vocabulary, hidden
    for share in (1, 8):
        chunk_logits = positions * vocabulary // share
        with peak_of(torch.device("cpu")) as live:
            before = live.live_bytes
            if share == 1:
                loss = cross_entropy(head(hidden_KH).float(), targets_K, reduction="sum")
            else:
                loss = chunked_loss(hidden_KH, head, targets_K, chunk_logits)
            (loss / positions).backward()
        forecast = loss_bytes(*sizes, element_bytes=dtype.itemsize, chunk_logits=chunk_logits)
        assert live.peak_bytes - before == pytest.approx(forecast, rel=0.01)
        hidden_KH.grad = loss = None  # type: ignore[assignment]


def test_the_planner_knows_the_size_of_a_chunk() -> None:
    assert memory.CHUNK_LOGITS == CHUNK_LOGITS


def test_a_long_batch_with_a_large_vocabulary_takes_less_than_half_a_gigabyte() -> None:
    positions, vocabulary = 4 * 1024, 128_256  # Llama 3's
    assert loss_bytes(positions, vocabulary, 4096, element_bytes=2) < 0.5e9 < 12 * positions * vocabulary
