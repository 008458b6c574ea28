"""What one process tells another one arrives whole and in order, however the socket cuts it, and in few reads."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lsp_ray.runtime.transport.messages import AT_ONCE, Ear, tell


class Dripping(Connection):
    """One to which the next piece comes whenever it is read; then it ends."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        ours, theirs = socket.socketpair()
        super().__init__(ours.detach())
        self._theirs = Connection(theirs.detach())
        self._pieces = list(pieces)
        self.num_reads = 0

    def fileno(self) -> int:
        self.num_reads += 1
        if self._pieces:
            os.write(self._theirs.fileno(), self._pieces.pop(0))
        else:
            self._theirs.close()
        return super().fileno()


def crossing(*messages: object) -> bytes:
    """What the socket carries."""
    with tempfile.TemporaryFile() as file, Connection(os.dup(file.fileno()), readable=False) as connection:
        for message in messages:
            tell(connection, message)
        file.seek(0)
        return file.read()


def cut(text: bytes, places: Sequence[int]) -> list[bytes]:
    at = sorted({0, len(text), *(place % len(text) for place in places)})
    return [text[start:end] for start, end in pairwise(at)]


def same(one: Any, other: Any) -> bool:
    return one[0] == other[0] and all(np.array_equal(a, b) for a, b in zip(one[1], other[1], strict=True))


def test_one_read_takes_all_messages_that_are_there() -> None:
    connection = Dripping([crossing("first", ("second", 2), None)])
    ear = Ear(connection)
    assert [ear.heard() for _ in range(3)] == ["first", ("second", 2), None]
    assert connection.num_reads == 1
    assert not ear.rest


@given(
    arrays=st.lists(st.integers(0, 1000).map(lambda size: np.arange(size, dtype=np.float32)), max_size=3),
    texts=st.lists(st.text(max_size=300), min_size=1, max_size=4),
    places=st.lists(st.integers(0, 1 << 20), max_size=8),
)
def test_messages_arrive_however_they_are_cut(arrays: list[Any], texts: list[str], places: list[int]) -> None:
    messages = [(text, arrays) for text in texts]
    pieces = cut(crossing(*messages), places)
    connection = Dripping(pieces)
    ear = Ear(connection)
    assert all(same(ear.heard(), message) for message in messages)
    assert not ear.rest
    assert connection.num_reads <= len(pieces)


def test_an_array_larger_than_a_read_goes_to_its_place_and_what_follows_it_is_not_lost() -> None:
    message = "large", [np.arange(AT_ONCE, dtype=np.float32)]
    text = crossing(message, "after")
    ear = Ear(Dripping([text[place : place + AT_ONCE] for place in range(0, len(text), AT_ONCE)]))
    assert same(ear.heard(), message)
    assert ear.heard() == "after"


@pytest.mark.parametrize("size", [0, 3, 20])
def test_what_has_come_whole_is_heard_before_the_end_and_of_the_rest_nothing_is_left(size: int) -> None:
    whole, half = crossing("whole"), crossing("half")[:size]
    ear = Ear(Dripping([whole + half]))
    assert ear.heard() == "whole"
    assert len(ear.rest) == size
    with pytest.raises(EOFError):
        ear.heard()
    assert not ear.rest


def test_an_end_amid_a_large_array_is_an_end() -> None:
    ear = Ear(Dripping([crossing(("large", [np.zeros(2 * AT_ONCE, np.uint8)]))[:AT_ONCE]]))
    with pytest.raises(EOFError):
        ear.heard()
    assert not ear.rest
