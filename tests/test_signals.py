"""Signals to a run in a process of its own."""

from __future__ import annotations

import os
import pty
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import pytest

from lsp_ray.run import main, parse
from lsp_ray.runtime.checkpoints.checkpoint import checkpoints
from lsp_ray.runtime.prepare.job import prepare_job
from lsp_ray.runtime.stop_signal import ECHO_S, StopSignal
from tests.signalled import Run, To, assert_same_end, assert_saved, tiny_options, wait_until
from tests.tiny_jobs import run_on_threads


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
    """Runs without an end, all started at once, as most of a start is waiting; so are their steps, on a slow link."""

    once: Run
    twice: Run
    killed: Run
    closed: Run
    master: int  # end of the terminal of `closed`


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    folder = tmp_path_factory.mktemp("runs")
    options = tiny_options(folder / "tiny", "--max_steps", "100000", "--save_steps", "0", "--save_minutes", "0")
    options += ["--runtime.link_gbps", "4e-5"]  # two tenths of a second for a step's gradients
    long = ["--runtime.link_gbps", "2e-6"]
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
            run.end_at_once()


def sessions(run: Run) -> list[Path]:
    """Folders of the run's Rays, which end with the driver's number."""
    return list(Path(tempfile.gettempdir(), "ray").glob(f"session_*_{run.process.pid}"))


def assert_saved_once(run: Run) -> None:
    assert len(checkpoints(run.out)) == 1
    assert_saved(run)


def test_a_terminal_that_closes_ends_the_run_with_a_checkpoint(runs: Runs) -> None:
    run = runs.closed
    os.set_blocking(runs.master, False)

    def has_stepped() -> bool:
        with suppress(BlockingIOError):
            os.read(runs.master, 1 << 16)  # a terminal that nobody reads fills up, and whoever prints there waits
        return run.num_lines() > 0

    wait_until(has_stepped, "a step")
    os.close(runs.master)
    assert run.ends() == 128 + signal.SIGHUP
    assert_saved_once(run)


def test_ctrl_c_finishes_the_step_saves_and_leaves_nothing_behind(runs: Runs) -> None:
    run = runs.once
    run.wait_for_step()
    belongings = Belongings.of(run)
    run.send(signal.SIGINT)
    assert run.ends() == 130
    assert "stopping once all that is done is saved; a second time stops at once" in run.said()
    assert "to go on: python -m lsp_ray.run --config " in run.said().splitlines()[-1]
    assert_saved_once(run)
    assert f"stopped after {run.num_lines()} of 100000 steps" in run.said()
    assert "Traceback" not in run.said()
    wait_until(belongings.are_gone, "nothing is left")
    assert not sessions(run)


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


# others are in the tests above and all six ways in scripts/stop_ways.py: each costs a start
IN_TURN: list[tuple[To, signal.Signals]] = [("group", signal.SIGTERM), ("tree", signal.SIGHUP)]


@pytest.mark.timeout(600)  # it starts three times
def test_a_run_that_is_stopped_again_and_again_ends_with_the_bits_of_one_left_alone(tmp_path: Path) -> None:
    options = tiny_options(tmp_path / "tiny", "--gradient_accumulation_steps", "8", "--max_steps", "40")
    reference = parse([*options, "--output_dir", str(tmp_path / "reference")])
    run_on_threads(prepare_job(reference, lambda _line: None), tmp_path / "reference")
    going_on: list[str] = []
    for to, number in IN_TURN:
        run = Run.start(tmp_path / "stopped", *options, *going_on)
        try:
            run.wait_for_step()
            run.send(number, to)
            assert run.ends() == 128 + number, (to, number, run.said())
        finally:
            run.end_at_once()
        assert_saved(run)
        going_on = ["--resume_from_checkpoint", "last"]
    run = Run.start(tmp_path / "stopped", *options, *going_on)
    assert run.ends() == 0, run.said()
    assert not sessions(run)
    assert_same_end(run.out, tmp_path / "reference")


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
        run.end_at_once()


def test_a_signal_that_is_held_is_answered_at_the_end() -> None:
    went_on: list[bool] = []

    def load(stop: StopSignal) -> None:
        with stop.held():
            os.kill(os.getpid(), signal.SIGINT)
            went_on.append(True)

    with StopSignal() as stop:
        with pytest.raises(KeyboardInterrupt):
            load(stop)
        assert went_on
        assert stop.exit_code == 130
        assert not stop.requested()
    with StopSignal() as stop, stop.held():
        pass


def test_ctrl_c_of_which_a_library_makes_an_error_of_imports_is_no_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(*_args: object, is_interrupted: bool, **_options: object) -> None:
        try:
            if is_interrupted:
                os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt as error:
            raise ModuleNotFoundError("no such class") from error
        raise ModuleNotFoundError("no such package")

    monkeypatch.setattr("lsp_ray.run.run_config", partial(load, is_interrupted=True))
    assert main([]) == 130
    assert capsys.readouterr().err == "stopped at once; what was not saved is lost\n"
    monkeypatch.setattr("lsp_ray.run.run_config", partial(load, is_interrupted=False))
    with pytest.raises(ModuleNotFoundError, match="no such package"):
        main([])


def test_sigterm_while_ray_starts_is_answered_and_leaves_nothing(tmp_path: Path) -> None:
    run = Run.start(tmp_path / "run", *tiny_options(tmp_path / "tiny", "--max_steps", "3"))
    driver = psutil.Process(run.process.pid)

    def started() -> list[psutil.Process]:
        return [child for child in driver.children(recursive=True) if "gcs_server" in child.name()]

    try:
        wait_until(lambda: bool(started()), "Ray starts")
        children = driver.children(recursive=True)
        run.send(signal.SIGTERM, "driver")
        assert run.ends() == 143, run.said()
        assert run.said().splitlines()[-1] == "stopped at once; what was not saved is lost"
        assert not run.out.exists()
        wait_until(lambda: not any(map(is_alive, children)), "Ray's processes are gone")
    finally:
        run.end_at_once()


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
