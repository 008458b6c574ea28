"""Signals to a run in a process of its own."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from lsp_ray.runtime.checkpoint import checkpoints
from lsp_ray.runtime.saved_run import read_saved_run
from lsp_ray.runtime.stop_signal import ECHO_S, StopSignal
from tests.tiny import write_tiny_jsonl, write_tiny_model

DEADLINE_S = 180.0


def wait_until(happened: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not happened():
        assert time.monotonic() < deadline_s, f"within {DEADLINE_S:.0f} s: {what}"
        time.sleep(0.002)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run in a process group of its own, as a terminal would start it; what it prints goes into a file."""

    process: subprocess.Popen[bytes]
    out: Path
    log: Path

    @classmethod
    def start(cls, folder: Path, *options: str, sigint: str = "default", terminal: int | None = None) -> Run:
        """With a terminal, a descriptor, the run is in a session that this controls, and prints there alone."""
        # whatever this suite was started with: where signals are ignored, children have them ignored too
        signals = ["--default-signal=HUP", f"--{sigint}-signal=INT"]
        command = ["env", *signals, sys.executable, "-P", "-m", "lsp_ray.run", *options]
        if terminal is not None:
            command = ["setsid", "--ctty", *command]
        folder.mkdir()
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [*command, "--output_dir", str(folder / "out")],
                stdin=terminal,
                stdout=log if terminal is None else terminal,
                stderr=subprocess.STDOUT,
                start_new_session=terminal is None,
            )
        return cls(process=process, out=folder / "out", log=folder / "log")

    def said(self) -> str:
        return self.log.read_text()

    def num_lines(self) -> int:
        """Of metrics: steps made."""
        metrics = self.out / "metrics.jsonl"
        return metrics.read_text().count("\n") if metrics.exists() else 0

    def wait_for_step(self) -> None:
        start = self.num_lines()
        wait_until(lambda: self.num_lines() > start or self.process.poll() is not None, "a step")
        assert self.process.poll() is None, self.said()

    def send(self, number: signal.Signals) -> None:
        os.killpg(self.process.pid, number)  # as a terminal does

    def send_to_all(self, number: signal.Signals) -> None:
        """As systemd's KillMode=control-group does: to Ray's processes too, and these first."""
        driver = psutil.Process(self.process.pid)
        for process in (*driver.children(recursive=True), driver):
            with suppress(psutil.NoSuchProcess):  # an idle process of Ray's may just have ended
                process.send_signal(number)

    def ends(self) -> int:
        return self.process.wait(DEADLINE_S)


@dataclass(frozen=True, slots=True, kw_only=True)
class Belongings:
    """The processes that a run has started, by command line, and the shared memory that they have mapped."""

    processes: dict[psutil.Process, str]
    segments: set[str]

    @classmethod
    def of(cls, run: Run) -> Belongings:
        children = psutil.Process(run.process.pid).children(recursive=True)
        names = {child: " ".join(child.cmdline()) for child in children}
        for actor in ("ray::GpuActor", "ray::ShardActor"):
            assert any(actor in name for name in names.values())
        segments = set().union(*(mapped(child.pid) for child in children))
        assert segments  # the slots: no file has a name any more, so only who maps it keeps its memory
        return cls(processes=names, segments=segments)

    def are_gone(self, *, but: str = "nothing") -> bool:
        left = [process for process, name in self.processes.items() if but not in name and is_alive(process)]
        return not left and not any(mapped(pid) & self.segments for pid in psutil.pids())


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def mapped(pid: int) -> set[str]:
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:  # another user's, or gone
        return set()
    return {line.split(maxsplit=5)[5] for line in lines if "/dev/shm/" in line}


@dataclass(frozen=True, slots=True, kw_only=True)
class Runs:
    """Runs without an end, all started at once, as most of a start is waiting; `twice` has long steps."""

    once: Run
    twice: Run
    killed: Run
    closed: Run
    master: int  # end of the terminal of `closed`


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_model(folder / "model", "llama")
    write_tiny_jsonl(folder / "data.jsonl", "prompt_completion", 400)
    options = ["--model_name_or_path", str(folder / "model"), "--dataset", str(folder / "data.jsonl")]
    options += ["--runtime.num_shards", "1", "--lsp.subspace_dim", "16", "--lsp.nnz_per_row", "2"]
    options += ["--max_steps", "100000", "--max_eval_samples", "8", "--save_steps", "0", "--save_minutes", "0"]
    long = ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "300"]
    master, terminal = pty.openpty()
    started = Runs(
        once=Run.start(folder / "once", *options),
        twice=Run.start(folder / "twice", *options, *long),
        killed=Run.start(folder / "killed", *options, sigint="ignore"),
        closed=Run.start(folder / "closed", *options, terminal=terminal),
        master=master,
    )
    os.close(terminal)
    try:
        yield started
    finally:
        for run in (started.once, started.twice, started.killed, started.closed):
            run.process.kill()
            run.process.wait()


def assert_saved(run: Run) -> None:
    """All that was done is in the run's only checkpoint, and that is whole: the run can go on."""
    [(done, folder)] = checkpoints(run.out).items()
    assert read_saved_run(folder).step == done == run.num_lines()


def test_a_terminal_that_closes_ends_the_run_with_a_checkpoint(runs: Runs) -> None:
    run = runs.closed
    run.wait_for_step()
    os.close(runs.master)
    assert run.ends() == 128 + signal.SIGHUP
    assert_saved(run)


def test_ctrl_c_finishes_the_step_saves_and_leaves_nothing_behind(runs: Runs) -> None:
    run = runs.once
    run.wait_for_step()
    belongings = Belongings.of(run)
    run.send(signal.SIGINT)
    assert run.ends() == 130
    assert "stopping once all that is done is saved; a second time stops at once" in run.said()
    assert "to go on: python -m lsp_ray.run --config " in run.said().splitlines()[-1]
    assert_saved(run)
    assert f"stopped after {run.num_lines()} of 100000 steps" in run.said()
    assert "Traceback" not in run.said()
    wait_until(belongings.are_gone, "nothing is left")


def test_sigterm_to_all_waits_for_a_long_step_and_a_second_one_stops_at_once(runs: Runs) -> None:
    run = runs.twice
    run.wait_for_step()
    belongings = Belongings.of(run)
    run.send_to_all(signal.SIGTERM)
    run.send(signal.SIGTERM)  # the same wish
    run.send(signal.SIGHUP)
    wait_until(lambda: "stopping once" in run.said(), "the first signal is noticed")
    time.sleep(ECHO_S)
    run.send(signal.SIGTERM)
    assert run.ends() == 143
    assert run.said().splitlines()[-1] == "stopped at once; no checkpoint was written"
    assert "Traceback" not in run.said()
    wait_until(belongings.are_gone, "nothing is left")


def test_a_driver_that_is_killed_leaves_no_actor_and_no_shared_memory(runs: Runs) -> None:
    run = runs.killed
    run.wait_for_step()
    belongings = Belongings.of(run)
    os.kill(run.process.pid, signal.SIGINT)  # it was started with that ignored, as a shell does for `… &`
    for process in belongings.processes:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)
    run.wait_for_step()
    run.wait_for_step()
    assert run.said().count("starting again") == 0
    run.process.kill()
    run.process.wait()
    # two agents of Ray's, which hold nothing, take a minute more
    wait_until(lambda: belongings.are_gone(but="Agent"), "nothing is left")


def loads(run: Run) -> bool:
    """Whether the program has begun to import what it needs: PyYAML's library is among the first that it maps."""
    return "_yaml" in Path(f"/proc/{run.process.pid}/maps").read_text()


@pytest.mark.parametrize("delay_s", [0.0, 0.05, 0.15, 0.4])
def test_ctrl_c_while_the_program_still_loads_shows_no_traceback(tmp_path: Path, delay_s: float) -> None:
    run = Run.start(tmp_path / "run")
    try:
        wait_until(lambda: loads(run), "the program starts")
        time.sleep(delay_s)  # any moment will do
        run.send(signal.SIGINT)
        assert run.ends() in (-signal.SIGINT, 130)
        assert "Traceback" not in run.said()
        assert not run.out.exists()
    finally:
        run.process.kill()
        run.process.wait()


def test_where_sigint_was_ignored_it_stays_so() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGTERM)
            assert stop.exit_code == 143
            handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
            assert handlers == (signal.SIG_IGN, signal.SIG_DFL)  # a third one would end even what hangs
            os.kill(os.getpid(), signal.SIGHUP)  # but not the shell's after the kernel's
    finally:
        signal.signal(signal.SIGINT, before)
