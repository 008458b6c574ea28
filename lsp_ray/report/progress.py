"""Live progress of a run: a bar on a terminal, plain lines anywhere else.

Text from data (a sample answer, a file name) is shown as it is: never read as rich markup, its control
characters dropped. A terminal that breaks, or cannot show a character, never ends a run.
"""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from statistics import median
from types import TracebackType
from typing import IO, Self, cast

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from lsp_ray.report.duration import format_duration
from lsp_ray.trace import StepMetrics, WorkStream

RECENT_STEPS = 20
"""Step times that the ETA's median looks back on."""

_CONTROL = dict.fromkeys(code for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t")


class Progress:
    """Shows phases, steps and notes of one run; a context manager.

    On a terminal one live display stays at the bottom; otherwise every call writes one plain line without ANSI
    codes. Outside the `with` block the calls write plain lines too.

    Args:
        total_steps: Optimizer updates that the run will make; may be set later, once it is known.
        console: Where to write; by default standard output, whose failures are then ignored.
        clock: Seconds, never backwards.

    `steps_per_epoch`, `device` and `logging_steps` may be set as well, once they are known: steps show the epoch then,
    shares name the device, and one line in so many steps is written where there is no live display.
    """

    def __init__(
        self,
        total_steps: int = 0,
        console: Console | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or _tolerant_console()
        self._clock = clock
        self._start_s = self._phase_start_s = clock()
        self.total_steps = total_steps
        self.steps_per_epoch: float | None = None
        self.device = "gpu"
        self.logging_steps = 1
        self._step_times_s: deque[float] = deque(maxlen=RECENT_STEPS)
        self._live: Live | None = None
        self._spinner: Spinner | None = None
        self._doing = ""
        self._latest: StepMetrics | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(
                get_renderable=self._display, console=self._console, refresh_per_second=8, vertical_overflow="crop"
            )
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._spinner = None
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def note(self, text: str) -> None:
        """Write a line that stays, above the bar."""
        self._write(_clean(text))

    def phase(self, text: str) -> None:
        """Say what is being done now, outside the steps; the next step or phase ends it."""
        self._doing = " ".join(_clean(text).split())
        self._phase_start_s = self._clock()
        if self._live is None:
            self._write(f"[{self.elapsed}] {self._doing} ...")
        else:
            self._spinner = Spinner("dots" if _shows_unicode(self._console) else "line")
            self._live.refresh()

    @property
    def elapsed(self) -> str:
        """Time since the start, as `m:ss` or `h:mm:ss`."""
        return format_duration(self._clock() - self._start_s)

    def step(self, metrics: StepMetrics) -> None:
        """Show a finished step."""
        self._spinner, self._doing = None, ""
        self._latest = metrics
        if math.isfinite(metrics.step_time_s):
            self._step_times_s.append(metrics.step_time_s)
        if self._live is not None:
            self._live.refresh()
        elif self._is_logged(metrics.step):
            self._write("  ".join((*self._headline(metrics), stream_shares(metrics, self.device))))

    def _is_logged(self, step: int) -> bool:
        return step == 1 or step >= self.total_steps or step % max(self.logging_steps, 1) == 0

    def status(self) -> str:
        """Return in one line what is being done, and how far the run is; for other threads too."""
        latest, doing = self._latest, self._doing
        return " · ".join([*([self._phase_line()] if doing else []), *(self._headline(latest) if latest else ())])

    def _phase_line(self) -> str:
        return f"{self._doing} ({format_duration(self._clock() - self._phase_start_s)})"

    def _headline(self, metrics: StepMetrics) -> Iterable[str]:
        yield f"step {metrics.step}/{self.total_steps}"
        if self.steps_per_epoch:
            yield f"epoch {metrics.step / self.steps_per_epoch:.2f}"
        yield f"loss {metrics.loss:.4f}"
        yield f"lr {metrics.learning_rate:.2e}"
        yield f"{metrics.tokens_per_second:.0f} tokens/s"
        yield f"ETA {self._eta(metrics.step)}"

    def _eta(self, step: int) -> str:
        if not self._step_times_s:
            return "?"
        return format_duration(max(self.total_steps - step, 0) * median(self._step_times_s))

    def _write(self, line: str) -> None:
        self._console.print(Text(line), soft_wrap=True)

    def _display(self) -> RenderableType:
        """The live display; called from rich's refresh thread too."""
        rows: list[RenderableType] = []
        latest, spinner = self._latest, self._spinner
        if latest is not None:
            grid = Table.grid(padding=(0, 1), expand=True)
            grid.add_column(ratio=1)
            grid.add_column(no_wrap=True, overflow="crop")
            bar = ProgressBar(total=max(self.total_steps, 1), completed=latest.step)
            grid.add_row(bar, Text("  ".join(self._headline(latest))))
            rows.append(grid)
            shares = stream_shares(latest, self.device)
            rows.append(Text(shares, style="dim", no_wrap=True, overflow="crop"))
        if spinner is not None:
            spinner.update(text=Text(self._phase_line(), no_wrap=True, overflow="crop"))
            rows.append(spinner)
        return Group(*rows)


def stream_shares(metrics: StepMetrics, device: str) -> str:
    """Return each stream's busy share of the step time, e.g. `gpu 97 %  down 1 %  shards 23 %  up 1 %`.

    Args:
        metrics: Of the step.
        device: What computes: gpu or cpu.
    """
    busy_s = metrics.busy_by_stream
    names = {WorkStream.GPU: device, WorkStream.D2H: "down", WorkStream.CPU: "shards", WorkStream.H2D: "up"}
    shown = names if any(busy_s[stream] for stream in WorkStream if stream is not WorkStream.GPU) else [WorkStream.GPU]
    return "  ".join(f"{names[stream]} {_percent(busy_s[stream], metrics.step_time_s)} %" for stream in shown)


def _percent(part: float, whole: float) -> str:
    share = part / whole if whole > 0 else math.nan
    return f"{share * 100:.0f}" if math.isfinite(share) else "?"


def _clean(text: str) -> str:
    return text.translate(_CONTROL)


def _shows_unicode(console: Console) -> bool:
    return console.encoding.lower().startswith("utf")


def _tolerant_console() -> Console:
    stream = _TolerantStream(sys.stdout)
    # the stream alone decides: FORCE_COLOR and the like would put control codes into a log file
    return Console(file=cast(IO[str], stream), force_terminal=stream.isatty())


class _TolerantStream:
    """A text stream whose writes cannot fail: what cannot be encoded becomes `?`, a broken stream is ignored."""

    _BROKEN = (OSError, ValueError, AttributeError)  # a gone terminal, a closed stream, a stream that is None

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    @property
    def encoding(self) -> str:
        return getattr(self._stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        with suppress(*self._BROKEN):
            self._stream.write(text.encode(self.encoding, "replace").decode(self.encoding))
        return len(text)

    def flush(self) -> None:
        with suppress(*self._BROKEN):
            self._stream.flush()

    def isatty(self) -> bool:
        with suppress(*self._BROKEN):
            return self._stream.isatty()
        return False
