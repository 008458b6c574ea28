"""ReportServer: the report page of a run in progress, for browsers on this machine.

It answers GET of the page and nothing else, and takes 5 % of one core's time at most, however many look at it.
"""

from __future__ import annotations

import math
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread

from lsp_ray.errors import ConfigError
from lsp_ray.report.page import live_report, live_script
from lsp_ray.report.run_folder import read_run

HOST = "127.0.0.1"
FRESH_S = 2.0
POLL_S = 0.1  # that long `close` may take
MAX_SHARE = 0.05  # of the time, spent on making pages


class ReportServer:
    """Holds its port from the start on, and answers from `serve` on.

    Args:
        port: On 127.0.0.1; 0 takes any that is free.
        clock: Seconds, never backwards.

    Raises:
        ConfigError: The port is not free.
    """

    def __init__(self, port: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        try:
            self._server = _Server((HOST, port), _Handler)
        except OSError as error:
            raise ConfigError("report_port", f"be a free port of {HOST} ({error.strerror})", port) from error
        self._thread: Thread | None = None

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{HOST}:{self._server.server_address[1]}/"

    def serve(self, folder: Path, status: Callable[[], str]) -> None:
        """Answer from now on.

        Args:
            folder: The run's output folder.
            status: Says in one line what the run does at the moment; called from other threads.
        """
        self._server.page = _Page(folder, status, self._clock)
        self._thread = Thread(target=self._server.serve_forever, args=(POLL_S,), name="report", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Give the port back."""
        if self._thread is not None:
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()


@contextmanager
def report_server(port: int | None) -> Iterator[ReportServer | None]:
    """Open a ReportServer; without a port there is none."""
    if port is None:
        yield None
        return
    server = ReportServer(port)
    try:
        yield server
    finally:
        server.close()


class _Page:
    """The page, made anew where someone asks and the last one is not fresh."""

    def __init__(self, folder: Path, status: Callable[[], str], clock: Callable[[], float]) -> None:
        self._folder, self._status, self._clock = folder, status, clock
        self._lock = Lock()
        self._document = b""
        self._fresh_until_s = -math.inf

    def document(self) -> bytes:
        with self._lock:
            start_s = self._clock()
            if start_s >= self._fresh_until_s:
                run = replace(read_run(self._folder), complaints=())  # of course it is not complete yet
                self._document = live_report(run, self._status()).encode()
                end_s = self._clock()
                self._fresh_until_s = end_s + max(FRESH_S, (end_s - start_s) / MAX_SHARE)
            return self._document


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    page: _Page

    def handle_error(self, request: object, client_address: object) -> None:
        """A browser that goes away, or a page that cannot be made, is no matter of the run's."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = 10.0  # of a connection on which nothing is asked

    def do_GET(self) -> None:
        name = self.headers.get("Host", "").rpartition(":")[0]
        if name not in (HOST, "localhost"):  # a page elsewhere whose name was made to lead here
            self._answer(403, b"Only for 127.0.0.1 and localhost.\n", "text/plain")
        elif self.path != "/":
            self._answer(404, b"There is only /.\n", "text/plain")
        else:
            self._answer(200, self.server.page.document(), "text/html; charset=utf-8")

    def version_string(self) -> str:
        return "lsp_ray"

    def log_message(self, *_args: object) -> None:
        """The terminal shows the run."""

    def _answer(self, status: int, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", _POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(content)


_DIGEST = b64encode(sha256(live_script().encode()).digest()).decode()
_POLICY = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{_DIGEST}'; connect-src 'self'"
