"""Line: what an actor's thread asks a keeper, of its own machine or another one; see `NodeKeeper`."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

from lsp_ray.errors import WorkerLostError
from lsp_ray.runtime.transport.lanes import Failure, fail
from lsp_ray.runtime.transport.messages import Ear, tell
from lsp_ray.runtime.transport.network import Address, dial


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """Which keeper an actor asks, and which of the keeper's slots are its own."""

    keeper: Address
    index: int = 0


class Line:
    """A connection; for one thread."""

    def __init__(self, address: Address) -> None:
        self._connection = dial(address)
        self._ear, self._host = Ear(self._connection), address.host

    def ask(self, method: str, *args: Any) -> Any:
        """Call a method of the keeper's and wait for what it returns.

        Raises:
            WorkerLostError: It is gone.
            LspRayError: What it raised.
        """
        try:
            tell(self._connection, (method, args))
            result = self._ear.heard()
        except (EOFError, OSError) as error:
            raise WorkerLostError(f"what passes payloads on at {self._host} is lost ({method})") from error
        if isinstance(result, Failure):
            fail(result, f"keeper at {self._host}: {method}")
        return result

    def close(self) -> None:
        """End it."""
        self._connection.close()


class Lines:
    """One to each keeper for each thread that asks."""

    def __init__(self) -> None:
        self._own = threading.local()

    def ask(self, address: Address, method: str, *args: Any) -> Any:
        """See `Line.ask`; by this thread's, and after a loss by a new one."""
        lines: dict[Address, Line] = self._own.__dict__.setdefault("lines", {})
        if address not in lines:
            lines[address] = Line(address)
        try:
            return lines[address].ask(method, *args)
        except WorkerLostError:
            lines.pop(address).close()
            raise
