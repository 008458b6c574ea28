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
    if not buffers:
        _write(connection, _HEAD.pack(len(text), 0) + text)
        return
    arrays = [buffer.raw() for buffer in buffers]
    sizes = struct.pack(f"!{len(arrays)}Q", *(array.nbytes for array in arrays))
    _write(connection, _HEAD.pack(len(text), len(arrays)) + sizes + text)
    for array in arrays:
        _write(connection, array)


def _write(connection: Connection, content: bytes | memoryview) -> None:
    number = connection.fileno()
    num_written = os.write(number, content)
    while num_written < len(content):
        num_written += os.write(number, memoryview(content)[num_written:])


class Ear:
    """Hears what `tell` sent. It reads whatever has come, which may be several messages and a part of one.

    Attributes:
        rest: What is read and not heard: messages, or the beginning of one.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.rest = b""

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
        rest = self.rest
        if len(rest) < size > AT_ONCE:
            return self._large(size)
        self.rest = b""  # of one whose other half never comes nothing is left
        while len(rest) < size:
            come = os.read(self._connection.fileno(), AT_ONCE)
            if not come:
                raise EOFError
            rest += come
        self.rest = rest[size:]
        return rest[:size]

    def _large(self, size: int) -> bytearray:
        """What is missing of it is read to its place."""
        whole = bytearray(size)
        whole[: len(self.rest)] = self.rest
        missing = memoryview(whole)[len(self.rest) :]
        self.rest = b""
        while missing:
            num_read = os.readv(self._connection.fileno(), [missing])
            if not num_read:
                raise EOFError
            missing = missing[num_read:]
        return whole
