"""A Ray cluster of several machines, all of them this one: a raylet each, at loopback addresses of their own."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil

RAY = Path(sys.executable).with_name("ray")
START_TIMEOUT_S = 90.0
HEALTH_CHECKS = {  # a machine that is gone or frozen is known to be in seconds
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}


class Machines:
    """Some raylets.

    Attributes:
        address: Of the first one.
        environment: Of who joins them.
    """

    def __init__(self, folder: Path, *, store_bytes: int) -> None:
        token = folder / "token"
        token.write_text(secrets.token_hex(32), encoding="utf-8")
        token.chmod(0o600)
        self._folder, self._store_bytes = folder, store_bytes
        self._raylets: list[subprocess.Popen[bytes]] = []
        self._port = _free_port()
        self.address = f"127.0.0.2:{self._port}"
        self.environment = {
            **os.environ,
            **HEALTH_CHECKS,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "OMP_WAIT_POLICY": "passive",
        }

    def start(self) -> psutil.Process:
        """Add one; returns its raylet's process once all know it."""
        number = len(self._raylets) + 1
        where = ["--head", f"--port={self._port}"] if number == 1 else [f"--address={self.address}"]
        command = [
            str(RAY),
            "start",
            *where,
            f"--node-ip-address=127.0.0.{number + 1}",  # Ray takes 127.0.0.1 for one that others cannot reach
            "--num-cpus=3",
            f"--object-store-memory={self._store_bytes}",
            "--include-log-monitor=false",
            "--disable-usage-stats",
            "--block",
        ]
        if number == 1:
            command += ["--include-dashboard=false", f"--temp-dir={self._folder / 'ray'}"]
        with (self._folder / f"raylet-{number}.log").open("wb") as log:
            started = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)
        self._raylets.append(started)
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline_s and started.poll() is None:
            for child in psutil.Process(started.pid).children(recursive=True):
                if child.name() == "raylet" and b"Ray runtime started" in Path(log.name).read_bytes():
                    return child
            time.sleep(0.05)
        raise AssertionError(Path(log.name).read_text())

    def stop(self) -> None:
        """End all, the first one last, and whatever they have started."""
        for started in reversed(self._raylets):
            _end(started)


def _end(started: subprocess.Popen[bytes]) -> None:
    processes = [psutil.Process(started.pid)] if started.poll() is None else []
    processes += [child for process in processes for child in process.children(recursive=True)]
    for process in processes:
        for how in (signal.SIGCONT, signal.SIGKILL):
            try:
                process.send_signal(how)
            except psutil.NoSuchProcess:
                break
    started.wait(30)
    psutil.wait_procs(processes, timeout=30)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@contextmanager
def machines(number: int, *, store_bytes: int = 160 << 20) -> Iterator[tuple[Machines, list[psutil.Process]]]:
    """So many; yields them and their raylets."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lsp-nodes-", ignore_cleanup_errors=True)))
        own = Machines(folder, store_bytes=store_bytes)
        stack.callback(own.stop)
        yield own, [own.start() for _ in range(number)]
