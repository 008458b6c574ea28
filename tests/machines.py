"""A Ray cluster of several machines, all of them this one, started as docs/cluster.md says: a raylet each.

They have loopback addresses of their own in place of the page's, and say that they have a GPU each; see `gpu_places`.
"""

from __future__ import annotations

import os
import re
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

PAGE = Path(__file__).resolve().parent.parent / "docs" / "cluster.md"
HEAD, OTHER = re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)[:2]
START_TIMEOUT_S = 90.0


class Machines:
    """Some raylets.

    Attributes:
        address: Of the first one.
        environment: Of who joins them.
    """

    def __init__(self, folder: Path, *, store_bytes: int) -> None:
        self._folder, self._store_bytes = folder, store_bytes
        self._raylets: list[subprocess.Popen[bytes]] = []
        self._port = _free_port()
        self.address = f"127.0.0.2:{self._port}"
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "HOME": str(folder),  # the token is there
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "OMP_WAIT_POLICY": "passive",
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        }

    def start(self) -> psutil.Process:
        """Add one; returns its raylet's process once all know it."""
        number = len(self._raylets) + 1
        commands = HEAD if number == 1 else OTHER
        commands = commands.replace("192.168.0.10:6379", self.address).replace("--port=6379", f"--port={self._port}")
        # Ray takes 127.0.0.1 for an address that others cannot reach, and looks for another one
        commands = re.sub(r"192\.168\.0\.1\d", f"127.0.0.{number + 1}", commands)
        commands = re.sub(r"--object-store-memory=\d+", f"--object-store-memory={self._store_bytes}", commands)
        own = ["--num-cpus=3", "--num-gpus=1", "--include-log-monitor=false", "--block"]
        if number == 1:
            own += ["--include-dashboard=false", f"--temp-dir={self._folder / 'ray'}"]
        command = ["bash", "-ec", f"{commands.strip()} {' '.join(own)}"]
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
