"""HappensBefore: vector clocks of host threads and streams, and the accesses to buffers that they must order."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

Clock = Mapping[str, int]  # agent -> the last of its epochs that is known to be over


class RaceError(AssertionError):
    """Two conflicting accesses that nothing orders."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """What an agent did to a buffer in one of its epochs."""

    agent: str
    epoch: int
    is_write: bool
    what: str


class HappensBefore:
    """An agent (a host thread or a stream) knows its own past, and that of others as far as it was told.

    Fidge, "Timestamps in message-passing systems that preserve the partial ordering", 1988; accesses are kept as in
    Flanagan and Freund, "FastTrack", 2009: the last write and the reads since.
    """

    def __init__(self) -> None:
        self._known: dict[str, dict[str, int]] = {}
        self._epochs: dict[str, int] = {}
        self._accesses: dict[int, list[Access]] = {}  # address of the storage -> accesses
        self.num_checked = 0

    def tell(self, agent: str) -> Clock:
        """What the agent knows now, its own past included; what it does from here on is not part of it."""
        epoch = self._epochs.get(agent, 0)
        self._epochs[agent] = epoch + 1
        return {**self._known.get(agent, {}), agent: epoch}

    def learn(self, agent: str, told: Clock) -> None:
        """Let all that was told be over before whatever the agent does next."""
        known = self._known.setdefault(agent, {})
        for other, epoch in told.items():
            known[other] = max(known.get(other, -1), epoch)

    def access(self, agent: str, buffer: torch.Tensor, what: str, *, is_write: bool) -> None:
        """Note an access to the buffer's storage.

        Raises:
            RaceError: An earlier one conflicts with it, and the agent does not know it to be over.
        """
        key = address(buffer)
        now = Access(agent=agent, epoch=self._epochs.get(agent, 0), is_write=is_write, what=what)
        earlier = self._accesses.get(key, [])
        for access in earlier:
            self.num_checked += 1
            if (is_write or access.is_write) and not self._knows(agent, access):
                raise RaceError(f"{now.what} by {agent} is not ordered after {access.what} by {access.agent}")
        self._accesses[key] = [now] if is_write else [*(a for a in earlier if a.agent != agent or a.is_write), now]

    def forget(self, key: int, *, known_to: Collection[str], handed_to: Collection[str]) -> None:
        """The storage at the address is let go: its memory may be used again after what `known_to` know to be over.

        Raises:
            RaceError: Somebody else may still use it, and the allocator was not told.
        """
        for access in self._accesses.pop(key, []):
            if access.agent not in handed_to and not any(self._knows(agent, access) for agent in known_to):
                raise RaceError(f"a buffer is let go while {access.what} by {access.agent} may not be over")

    def _knows(self, agent: str, access: Access) -> bool:
        return agent == access.agent or self._known.get(agent, {}).get(access.agent, -1) >= access.epoch


def address(buffer: torch.Tensor) -> int:
    """The same for all views of one storage."""
    return buffer.untyped_storage().data_ptr()
