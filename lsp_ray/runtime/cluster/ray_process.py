"""RayProcess: how Ray's own processes start here, so that a signal to a run reaches its driver alone."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

from ray._private import services, utils, worker
from ray._private.node import Node

_DEAF_TO = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class RayProcess(services.ConsolePopen):
    """In a session of its own, and deaf to what a terminal or a service manager sends; what it starts inherits both.

    So the driver ends a run in order, with its actors' help, whoever else was sent the signal: its process group, its
    control group. Ray lets the kernel kill these processes when the driver dies.

    Attributes:
        started: Their numbers, since `starting_apart` was entered.
    """

    started: ClassVar[list[int]] = []

    def __init__(self, command: Sequence[str], **options: Any) -> None:
        before_exec = options.pop("preexec_fn")

        def prepare() -> None:
            before_exec()
            signal.pthread_sigmask(signal.SIG_BLOCK, _DEAF_TO)

        super().__init__(command, preexec_fn=prepare, start_new_session=True, **options)
        self.started.append(self.pid)

    def terminate(self) -> None:
        """Ray sends SIGTERM first and waits a second for each process; no process here would hear it."""
        self.kill()


@contextmanager
def starting_apart() -> Iterator[None]:
    """Within the context what Ray starts is a `RayProcess`, and Ray takes SIGTERM from nobody: it has no such setting.

    Its own handler ends the process without a word, from the middle of Ray's start on. Nor does it start two programs
    of its own, which have nothing to do on one machine and load for a second: one reads logs aloud, which `ray.init` is
    told not to listen to, one adds machines and takes them away.
    """
    before, set_handler = services.ConsolePopen, utils.set_sigterm_handler
    helpers = Node.start_log_monitor, Node.start_monitor
    RayProcess.started.clear()
    services.ConsolePopen = RayProcess  # type: ignore[misc, assignment]
    Node.start_log_monitor = Node.start_monitor = lambda _node: None  # type: ignore[method-assign]
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        utils.set_sigterm_handler = lambda _handler: None
    try:
        yield
    finally:
        services.ConsolePopen = before  # type: ignore[misc]
        utils.set_sigterm_handler = set_handler
        Node.start_log_monitor, Node.start_monitor = helpers  # type: ignore[method-assign]


@contextmanager
def saying_nothing() -> Iterator[None]:
    """Within the context Ray's driver writes nothing to standard output: of a lost actor a run says more, in a line.

    Ray prints a paragraph, and in the place of a raylet that is gone its log; no setting of its own keeps it quiet.
    """
    before = worker.print_to_stdstream
    worker.print_to_stdstream = lambda *_args, **_options: None
    try:
        yield
    finally:
        worker.print_to_stdstream = before
