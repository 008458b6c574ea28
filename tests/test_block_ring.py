"""Which blocks' weights are where, against the fewest copies there can be."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lsp_ray.schedule.block_ring import BlockRing, Bring


def uses_of(num_blocks: int, num_passes: int, num_pieces: int = 0) -> Iterator[tuple[int, int, bool]]:
    """Pass, block or piece, and whether it is backward."""
    for number in range(num_passes):
        yield from ((number, block, False) for block in range(num_blocks + num_pieces))
        yield from ((number, block, True) for block in reversed(range(num_blocks)))


def fewest_copies(uses: list[int], num_buffers: int) -> int:
    """Belady's, where each is there while the one before computes: what is absent takes the place of the last."""
    held: set[int] = set()
    num_copies = 0
    for place in range(len(uses)):
        for block in uses[place : place + 2]:
            if block in held:
                continue
            num_copies += 1
            if len(held) == num_buffers:
                rest = [*uses[place:], *held]
                held.remove(max(held, key=rest.index))
            held.add(block)
    return num_copies


def bring_all(ring: BlockRing) -> list[Bring]:
    """All that is wanted now, as a link without end would."""
    brought = []
    while (bring := ring.wanted()) is not None:
        ring.begin(bring)
        brought.append(bring)
    return brought


@given(st.integers(1, 9), st.integers(2, 9), st.integers(1, 4), st.integers(0, 5))
def test_every_block_and_piece_is_there_before_its_use_with_the_fewest_copies(
    num_blocks: int, num_buffers: int, num_passes: int, num_pieces: int
) -> None:
    ring = BlockRing(num_blocks, num_buffers, num_pieces)
    ring.begin_step(0, num_passes)
    uses = list(uses_of(num_blocks, num_passes, num_pieces))
    held: dict[int, int] = {}  # buffer -> block
    num_copies = 0
    for number, block, backward in uses:
        if block == 0 and not backward:
            ring.begin_pass()
        for bring in bring_all(ring):
            assert held.get(bring.buffer) == bring.evicts
            assert bring.evicts is None or bring.evicts != ring.at
            held[bring.buffer] = bring.block
            num_copies += 1
        per_pass = 2 * num_blocks + num_pieces
        here = per_pass * number + (per_pass - 1 - block if backward else block)
        assert block in held.values(), "brought while the one before computed"
        ring.use(block, backward=backward)
        assert held[ring.buffer_of(block)] == block
        wanted = ring.wanted()
        assert wanted is None or wanted.due > here
    fewest = fewest_copies([block for _, block, _ in uses], num_buffers)
    assert fewest <= num_copies < fewest + num_buffers, "as the last pass ends, what the next one needs comes up"


@given(st.integers(1, 5), st.integers(1, 3), st.integers(0, 4), st.integers(0, 2))
def test_a_deltas_deadline_is_the_number_of_the_forward_that_reads_it(
    num_blocks: int, num_passes: int, ahead: int, block: int
) -> None:
    ring, block = BlockRing(num_blocks, 2), block % num_blocks
    for step in range(3):
        ring.begin_step(step, num_passes)
        ring.begin_pass()
        first = 2 * num_blocks * num_passes * (step + ahead)
        assert ring.delta_due(step + ahead, block) == first + block
        for _ in range(num_passes - 1):
            ring.begin_pass()


def test_a_forward_that_is_run_again_in_the_backward_changes_nothing() -> None:
    ring = BlockRing(6, 2)
    ring.begin_pass()
    for block in range(6):
        ring.use(block, backward=False)
        bring_all(ring)
    assert ring.use(4, backward=True)
    before = ring.wanted()
    assert not ring.use(4, backward=False)
    assert ring.wanted() == before
    assert before == Bring(block=3, buffer=ring.buffer_of(5), evicts=5, due=8)


def test_what_nobody_foresaw_comes_up_first() -> None:
    """An evaluation's second batch begins where a backward was to follow."""
    ring = BlockRing(6, 3)
    for block in range(6):
        ring.use(block, backward=False)
        bring_all(ring)
    ring.use(0, backward=False)
    first, *_ = bring_all(ring)
    assert first.block == 0
    assert ring.at == 0


def test_one_buffer_is_too_few() -> None:
    with pytest.raises(AssertionError):
        BlockRing(4, 1)
