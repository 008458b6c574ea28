"""StopSignal: Ctrl-C, SIGTERM and a terminal that is closed, at once or when it is convenient."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ECHO_S = 0.5  # timeout(1), service managers and shells send one wish to a process more than once


class StopSignal:
    """Within the context SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt in the main thread, but see `deferred`.

    From then on they have their usual effect, so that one more ends even a process whose cleaning up hangs; but that of
    a terminal that is closed, which kernel and shell both send, has none. A signal that was ignored before stays so, as
    a shell has it for SIGINT of what it starts in the background, and nohup for SIGHUP.

    The exception alone cannot tell which of them it was: Ray passes on a plain KeyboardInterrupt, whatever a handler
    raised while it waited.

    Attributes:
        number: Of the last signal received; None before the first.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._on_request: Callable[[], None] | None = None
        self._requested_s: float | None = None
        self._is_held = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.getsignal(number) for number in _SIGNALS}
        self.take()
        return self

    def __exit__(self, *_error: object) -> None:
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def take(self) -> None:
        """Set the handlers; once more after Ray's start, as Ray sets one of its own."""
        if threading.current_thread() is threading.main_thread():
            self._set(self._receive)

    @contextmanager
    def deferred(self, on_request: Callable[[], None]) -> Iterator[None]:
        """Within the context a first signal is only noted, and `on_request` called; one more after a while raises."""
        self._on_request = on_request
        try:
            yield
        finally:
            self._on_request = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within the context a first signal waits for its end, to raise there; one more ends the process.

        For imports, in which libraries make other errors of an interrupt, abort, or go on as if there were none.
        """
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False
        if self.number is not None:
            raise KeyboardInterrupt

    def requested(self) -> bool:
        """Whether a signal was noted."""
        return self._requested_s is not None

    @property
    def exit_code(self) -> int:
        """As a shell has it: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP."""
        return 128 + (self.number or signal.SIGINT)

    def _receive(self, number: int, _frame: object) -> None:
        now_s = time.monotonic()
        if self._requested_s is not None and (number == signal.SIGHUP or now_s < self._requested_s + ECHO_S):
            return
        self.number = number
        if self._on_request is not None and self._requested_s is None:
            self._requested_s = now_s
            # on a thread of its own: the main one may have been interrupted in the middle of writing a line
            threading.Thread(target=self._on_request, daemon=True).start()
            return
        self._set(signal.SIG_DFL)
        if not self._is_held:
            raise KeyboardInterrupt

    def _set(self, handler: Any) -> None:
        for number in _SIGNALS:
            is_ignored = self._before.get(number) is signal.SIG_IGN
            is_echo = handler is signal.SIG_DFL and number == signal.SIGHUP
            signal.signal(number, signal.SIG_IGN if is_ignored or is_echo else handler)
