"""HostThread: a thread that runs only while it is resumed, so that whoever resumes decides every interleaving."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

Predicate = Callable[[], bool]
T = TypeVar("T")


class SteppedCondition(threading.Condition):
    """For code that runs on HostThreads alone: what one of them waits for, its pause does; there is nothing to lock.

    Attributes:
        pause: Lets others run until the condition holds.
    """

    pause: Callable[[Predicate], None]

    def __enter__(self) -> bool:
        return True

    def __exit__(self, *_error: object) -> None:
        pass

    def notify_all(self) -> None:
        pass

    def wait_for(self, predicate: Callable[[], T], timeout: float | None = None) -> T:
        if not predicate():
            self.pause(lambda: bool(predicate()))
        return predicate()


class _EndedError(BaseException):
    """Unwinds a thread that nobody will resume."""


class HostThread:
    """Does one task after the other, in pieces between its pauses.

    Args:
        name: For whoever asks who it was.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._task: Callable[[], object] | None = None
        self._needs: Predicate | None = None
        self._error: BaseException | None = None
        self._is_ended = False
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def is_idle(self) -> bool:
        """Whether it has no task."""
        return self._task is None

    @property
    def can_go_on(self) -> bool:
        """Whether it has a task that waits for nothing."""
        return self._task is not None and (self._needs is None or self._needs())

    def begin(self, task: Callable[[], object]) -> None:
        """Give it a task; it starts when resumed."""
        assert self.is_idle, f"{self.name} has not done its last task"
        self._task = task

    def resume(self) -> None:
        """Let it run until its next pause or the task's end; what it raises is raised here."""
        self._go.release()
        self._stopped.acquire()
        if self._error is not None:
            raise self._error

    def pause(self, until: Predicate | None = None) -> None:
        """Called on the thread: let others run; with a condition, at least until it holds."""
        self._needs = until
        self._stopped.release()
        self._go.acquire()
        self._needs = None
        if self._is_ended:
            raise _EndedError

    def end(self) -> None:
        """Unwind a task that is under way and end the thread."""
        self._is_ended = True
        self._go.release()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self._go.acquire()
            if self._is_ended:
                return
            assert self._task is not None
            try:
                self._task()
            except _EndedError:
                return
            except BaseException as error:  # noqa: BLE001 - raised where the thread was resumed
                self._error = error
            self._task = None
            self._stopped.release()
