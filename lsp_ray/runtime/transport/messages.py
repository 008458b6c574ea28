"""Messages over a connection: pickles, and arrays of NumPy beside them without a copy before the socket's."""

from __future__ import annotations

import os
import pickle
import struct
from multiprocessing.connection import Connection
from typing import Any

AT_ONCE = 1 << 16  # bytes read at once where nothing larger is known to come
_HEAD = struct.Struct("!QQ")  # bytes of the pickle, number of arrays; the bytes of each array follow, then the pickle


def tell(connection: Connection, message: object) -> None:
    """Send a message."""
    buffers: list[pickle.PickleBuffer] = []
    text = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL, buffer_callback=buffers.append)
    arrays = [buffer.raw() for buffer in buffers]
    sizes = struct.pack(f"!{len(arrays)}Q", *(array.nbytes for array in arrays)) if arrays else b""
    _write(connection, _HEAD.pack(len(text), len(arrays)) + sizes + text)
    for array in arrays:
        _write(connection, array)


def _write(connection: Connection, content: bytes | memoryview) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(connection.fileno(), rest) :]


class Ear:
    """Hears what `tell` sent. It reads whatever has come, which may be several messages and a part of one."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._come: bytes = b""
        self._num_heard = 0  # bytes of these

    @property
    def holds_more(self) -> bool:
        """Whether a message, or the beginning of one, is read and not heard."""
        return self._num_heard < len(self._come)

    def heard(self) -> Any:
        """Wait for the next message.

        Raises:
            EOFError: The other side is gone.
            OSError: So it is, or the connection is closed.
        """
        size, num_arrays = _HEAD.unpack(self._next(_HEAD.size))
        if not num_arrays:
            return pickle.loads(self._next(size))
        sizes = struct.unpack(f"!{num_arrays}Q", self._next(8 * num_arrays))
        text = self._next(size)
        return pickle.loads(text, buffers=[self._next(size) for size in sizes])

    def _next(self, size: int) -> bytes | bytearray:
        """The next bytes."""
        start, end = self._num_heard, self._num_heard + size
        if end <= len(self._come):
            self._num_heard = end
            return self._come[start:end]
        held, self._come, self._num_heard = self._come[start:], b"", 0
        if size > AT_ONCE:
            return self._filled(bytearray(size), held)
        while len(held) < size:
            come = os.read(self._connection.fileno(), AT_ONCE)
            if not come:
                raise EOFError
            held += come
        self._come, self._num_heard = held, size
        return held[:size]

    def _filled(self, whole: bytearray, held: bytes) -> bytearray:
        """Read what is missing of it to its place."""
        rest = memoryview(whole)
        rest[: len(held)] = held
        rest = rest[len(held) :]
        while rest:
            num_read = os.readv(self._connection.fileno(), [rest])
            if not num_read:
                raise EOFError
            rest = rest[num_read:]
        return whole
