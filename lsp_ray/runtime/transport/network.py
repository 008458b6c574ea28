"""Connections between machines of one cluster, for lanes to actors on other ones.

Who connects proves that it knows the run's key before anything it says is unpickled; what crosses is not encrypted.
Clocks of two machines begin anywhere: `Clock` says what to add to another one's.
"""

from __future__ import annotations

import secrets
import socket
import struct
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from types import TracebackType
from typing import Self

from lsp_ray.errors import WorkerLostError

GAP_TIMEOUT_S = 20.0  # how long nothing may come through before a connection counts as lost
HANDSHAKE_TIMEOUT_S = 5.0  # one who connects and says nothing keeps others waiting no longer
WAIT_TIMEOUT_S = 60.0  # of one who is let in after some of these
_NUM_LOOKS = 16  # at another clock; the quickest is the most exact


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where a machine listens, and what who connects has to know; the key is shown nowhere."""

    host: str
    port: int
    key: bytes = field(repr=False)


class Door:
    """Listens on one of this machine's addresses; use as a context.

    Args:
        host: The address, as other machines reach it.
        timeout_s: How long `accept` waits.
    """

    def __init__(self, host: str, timeout_s: float) -> None:
        self._listener = socket.create_server((host, 0))
        self._listener.settimeout(timeout_s)
        self.address = Address(host=host, port=self._listener.getsockname()[1], key=secrets.token_bytes(32))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.close()

    def accept(self) -> Connection:
        """The next one to connect that knows the key.

        Raises:
            TimeoutError: Nobody did in time.
        """
        while True:
            connection = self.admit(self.come())
            if connection is not None:
                return connection

    def come(self) -> socket.socket:
        """The next one to connect, who may be anybody.

        Raises:
            TimeoutError: Nobody did in time.
        """
        return self._listener.accept()[0]

    def admit(self, came: socket.socket) -> Connection | None:
        """A connection to who has come, if that one knows the key; else None."""
        with suppress(AuthenticationError, EOFError, OSError):
            connection = _lasting(came)
            try:
                deliver_challenge(connection, self.address.key)
                answer_challenge(connection, self.address.key)
                _set_patience(connection, 0.0)
            except BaseException:
                connection.close()
                raise
            return connection
        came.close()
        return None


def dial(address: Address) -> Connection:
    """Connect to a door.

    Raises:
        WorkerLostError: It does not answer, or is another run's.
    """
    try:
        connection = _lasting(socket.create_connection((address.host, address.port), GAP_TIMEOUT_S))
        _set_patience(connection, WAIT_TIMEOUT_S)
        answer_challenge(connection, address.key)
        deliver_challenge(connection, address.key)
        _set_patience(connection, 0.0)
    except (AuthenticationError, EOFError, OSError) as error:
        why = f"{socket.gethostname()} does not reach the run at {address.host}:{address.port}"
        raise WorkerLostError(f"{why} ({error}); a firewall between them must let it") from error
    return connection


class Clock:
    """Another machine's monotonic clock, seen from here."""

    def __init__(self) -> None:
        self._looks: deque[tuple[float, float]] = deque(maxlen=_NUM_LOOKS)

    def look(self, asked_s: float, theirs_s: float, answered_s: float) -> None:
        """Note what it said between two moments of this machine's clock."""
        self._looks.append((answered_s - asked_s, (asked_s + answered_s) / 2 - theirs_s))

    @property
    def has_looked(self) -> bool:
        """Whether it is known."""
        return bool(self._looks)

    @property
    def offset_s(self) -> float:
        """What to add to its times; wrong by at most half of what the quickest of the last answers took."""
        return min(self._looks)[1]


def _lasting(ours: socket.socket) -> Connection:
    """A connection that sends at once, and that a machine which is gone ends in time."""
    ours.settimeout(None)
    ours.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    quarter_s = int(GAP_TIMEOUT_S / 4)
    for name, value in (
        ("TCP_KEEPIDLE", quarter_s),
        ("TCP_KEEPINTVL", quarter_s),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", int(1000 * GAP_TIMEOUT_S)),
    ):
        ours.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    connection = Connection(ours.detach())
    _set_patience(connection, HANDSHAKE_TIMEOUT_S)
    return connection


def _set_patience(connection: Connection, timeout_s: float) -> None:
    """How long receiving waits; 0: as long as it takes."""
    with socket.socket(fileno=connection.fileno()) as ours:
        try:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", int(timeout_s), 0))
        finally:
            ours.detach()
