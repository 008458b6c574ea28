"""The loss through pieces of the vocabulary: exact, small, and as large as its formula says."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

from lsp_ray.device.memory import peak_of
from lsp_ray.models.output_head import Piece, WholeHead
from lsp_ray.models.piecewise_loss import piecewise_loss
from lsp_ray.schedule.head_pieces import CHUNK_LOGITS, positions_at_once, row_pieces
from lsp_ray.sim.memory import loss_bytes


class Cut(WholeHead):
    """In pieces of so many rows."""

    def __init__(self, head: nn.Linear, size: int) -> None:
        super().__init__(head)
        self._size = size

    def pieces(self) -> Iterator[Piece]:
        for _, weight_VH, bias_V in super().pieces():  # there is one
            for first in range(0, weight_VH.shape[0], self._size):
                rows = slice(first, first + self._size)
                yield first, weight_VH[rows], None if bias_V is None else bias_V[rows]


def case(
    positions: int,
    vocabulary: int,
    hidden: int,
    *,
    bias: bool = False,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
    confidence: float = 0.0,
) -> tuple[torch.Tensor, nn.Linear, torch.Tensor]:
    """Hidden states, a head, and targets; the states lie the nearer to their target's row the more `confidence`."""
    generator = torch.Generator().manual_seed(positions)
    head = nn.Linear(hidden, vocabulary, bias=bias, dtype=dtype).requires_grad_(False)
    for parameter in head.parameters():
        parameter.normal_(generator=generator)
    targets_K = torch.randint(vocabulary, (positions,), generator=generator)
    hidden_KH = scale * torch.randn(positions, hidden, generator=generator)
    hidden_KH += confidence * head.weight[targets_K].float()
    return hidden_KH.to(dtype).requires_grad_(), head, targets_K


def reference(hidden_KH: torch.Tensor, head: nn.Linear, targets_K: torch.Tensor, factor: float) -> list[torch.Tensor]:
    """Loss and gradient in float64."""
    hidden_KH = hidden_KH.detach().double().requires_grad_()
    bias_V = None if head.bias is None else head.bias.double()
    loss = cross_entropy(nn.functional.linear(hidden_KH, head.weight.double(), bias_V), targets_K, reduction="sum")
    return [loss.detach(), *torch.autograd.grad(loss * factor, [hidden_KH])]


@settings(max_examples=100, deadline=None)
@given(
    positions=st.integers(0, 40),
    vocabulary=st.integers(1, 60),
    hidden=st.integers(1, 20),
    piece=st.integers(1, 60),
    chunk_logits=st.integers(1, 2000),
    bias=st.booleans(),
    scale=st.sampled_from([0.0, 1.0, 100.0]),
)
def test_loss_and_gradient_are_exact_however_it_is_cut(
    positions: int, vocabulary: int, hidden: int, piece: int, chunk_logits: int, bias: bool, scale: float
) -> None:
    hidden_KH, head, targets_K = case(positions, vocabulary, hidden, bias=bias, scale=scale)
    loss = piecewise_loss(hidden_KH, Cut(head, piece), targets_K, chunk_logits)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    found = [loss.detach().double(), torch.autograd.grad(loss * 0.3, [hidden_KH])[0].double()]
    for ours, exact in zip(found, reference(hidden_KH, head, targets_K, 0.3), strict=True):
        # scores in the hundreds are known to some 1e-5 each
        torch.testing.assert_close(ours, exact, rtol=1e-5 * max(1.0, scale), atol=2e-5 * max(1.0, scale))
    with torch.no_grad():
        assert torch.equal(piecewise_loss(hidden_KH, Cut(head, piece), targets_K, chunk_logits), loss)


@pytest.mark.parametrize("confidence", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neither_is_less_exact_than_autograds_even_where_a_token_is_all_but_certain(
    dtype: torch.dtype, confidence: float
) -> None:
    inputs = case(40, 300, 32, dtype=dtype, scale=0.5, confidence=confidence)
    hidden_KH, head, targets_K = inputs
    exact_loss, exact = reference(*inputs, 1 / 37)
    plain = cross_entropy(head(hidden_KH).float(), targets_K, reduction="sum")
    errors = []
    for loss in (plain, piecewise_loss(hidden_KH, Cut(head, 90), targets_K)):
        (gradient,) = torch.autograd.grad(loss / 37, [hidden_KH])
        errors.append([float(abs(loss.detach().double() - exact_loss)), float((gradient.double() - exact).norm())])
    allowed = 2e-6 * float(exact_loss), 1e-6 * float(exact.norm())
    for ours, theirs, least in zip(*reversed(errors), allowed, strict=True):
        assert ours < 1.2 * theirs + least


@pytest.mark.parametrize("score", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [0, 7])
def test_a_score_that_is_not_finite_makes_the_loss_and_the_gradient_so(score: float, place: int) -> None:
    hidden_KH, head, _ = case(3, 20, 4, bias=True)
    head.bias[place] = score
    for targets_K in (torch.tensor([0, 0, 0]), torch.tensor([7, 5, 19])):
        loss = piecewise_loss(hidden_KH, Cut(head, 6), targets_K)
        assert not loss.isfinite()
        assert not torch.autograd.grad(loss, [hidden_KH])[0].isfinite().any()


@pytest.mark.parametrize("target", [-1, 50])
def test_a_target_that_is_in_no_piece_makes_the_loss_no_number(target: int) -> None:
    hidden_KH, head, targets_K = case(4, 50, 8)
    targets_K[2] = target
    assert piecewise_loss(hidden_KH, WholeHead(head), targets_K).isnan()


def test_a_token_that_cannot_come_changes_nothing() -> None:
    hidden_KH, head, targets_K = case(3, 20, 4, bias=True)
    targets_K.clamp_(max=9)
    head.bias[12:] = -torch.inf
    loss = piecewise_loss(hidden_KH, Cut(head, 10), targets_K)
    head.bias[12:] = -1e4
    assert loss.isfinite()
    torch.testing.assert_close(loss, piecewise_loss(hidden_KH, Cut(head, 10), targets_K))


@given(positions=st.integers(1, 5000), num_rows=st.integers(1, 300_000), chunk_logits=st.integers(1, 1 << 26))
def test_no_more_logits_are_made_at_one_time_than_asked_for_but_of_a_single_position(
    positions: int, num_rows: int, chunk_logits: int
) -> None:
    size = positions_at_once(positions, num_rows, chunk_logits)
    assert 1 <= size <= positions
    assert size == 1 or size * num_rows <= chunk_logits


@given(vocabulary=st.integers(1, 300_000), hidden=st.integers(1, 20_000))
def test_pieces_are_all_rows_in_order_and_smaller_than_a_block(vocabulary: int, hidden: int) -> None:
    pieces = row_pieces(vocabulary, hidden)
    assert [row for rows in pieces for row in (rows.start, rows.stop)][1:-1:2] == [rows.start for rows in pieces[1:]]
    assert (pieces[0].start, pieces[-1].stop) == (0, vocabulary)
    assert all(0 < len(rows) <= 3 * max(4096, hidden) for rows in pieces)
    assert len(pieces) == 1 or all(len(rows) == len(pieces[0]) for rows in pieces[:-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("positions", "vocabulary", "hidden"), [(96, 20000, 8), (96, 2048, 64), (512, 512, 256)])
def test_the_peak_is_forecast(positions: int, vocabulary: int, hidden: int, dtype: torch.dtype) -> None:
    hidden_KH, head, targets_K = case(positions, vocabulary, hidden, dtype=dtype)
    for chunk_logits in (CHUNK_LOGITS, positions * vocabulary // 8):
        with peak_of(torch.device("cpu")) as live:
            before = live.live_bytes
            (piecewise_loss(hidden_KH, WholeHead(head), targets_K, chunk_logits) / positions).backward()
        forecast = loss_bytes(positions, vocabulary, hidden, element_bytes=dtype.itemsize, chunk_logits=chunk_logits)
        assert live.peak_bytes - before == pytest.approx(forecast, rel=0.02)
        hidden_KH.grad = None


def test_a_long_batch_with_a_large_vocabulary_takes_less_than_half_a_gigabyte() -> None:
    positions, vocabulary = 4 * 1024, 128_256  # Llama 3's
    assert loss_bytes(positions, vocabulary, 4096, element_bytes=2) < 0.5e9 < 12 * positions * vocabulary
