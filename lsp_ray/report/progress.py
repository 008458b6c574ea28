"""Live progress of a run: a bar on a terminal, plain lines anywhere else.

Text from data (a sample answer, a file name) is shown as it is: never read as rich markup, its control
characters dropped. A terminal that breaks, or cannot show a character, never ends a run.
"""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Iterable
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
    """

    def __init__(self, total_steps: int = 0, console: Console | None = None) -> None:
        self._console = console or _tolerant_console()
        self.total_steps = total_steps
        self._step_times_s: deque[float] = deque(maxlen=RECENT_STEPS)
        self._live: Live | None = None
        self._phase: Spinner | None = None
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
        self._phase = None
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def note(self, text: str) -> None:
        """Write a line that stays, above the bar."""
        self._write(_clean(text))

    def phase(self, text: str) -> None:
        """Say what is being done now, outside the steps; the next step or phase ends it."""
        line = self._doing = " ".join(_clean(text).split())
        if self._live is None:
            self._write(f"{line} ...")
        else:
            name = "dots" if _shows_unicode(self._console) else "line"
            self._phase = Spinner(name, Text(line, no_wrap=True, overflow="crop"))
            self._live.refresh()

    def step(self, metrics: StepMetrics) -> None:
        """Show a finished step."""
        self._phase, self._doing = None, ""
        self._latest = metrics
        if math.isfinite(metrics.step_time_s):
            self._step_times_s.append(metrics.step_time_s)
        if self._live is None:
            self._write("  ".join((*self._headline(metrics), stream_shares(metrics))))
        else:
            self._live.refresh()

    def status(self) -> str:
        """Return in one line what is being done, and how far the run is; for other threads too."""
        latest, doing = self._latest, self._doing
        return " · ".join([*([doing] if doing else []), *(self._headline(latest) if latest is not None else ())])

    def _headline(self, metrics: StepMetrics) -> Iterable[str]:
        yield f"step {metrics.step}/{self.total_steps}"
        yield f"loss {metrics.loss:.4f}"
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
        latest, phase = self._latest, self._phase
        if latest is not None:
            grid = Table.grid(padding=(0, 1), expand=True)
            grid.add_column(ratio=1)
            grid.add_column(no_wrap=True, overflow="crop")
            bar = ProgressBar(total=max(self.total_steps, 1), completed=latest.step)
            grid.add_row(bar, Text("  ".join(self._headline(latest))))
            rows.append(grid)
            rows.append(Text(stream_shares(latest), style="dim", no_wrap=True, overflow="crop"))
        if phase is not None:
            rows.append(phase)
        return Group(*rows)


def stream_shares(metrics: StepMetrics) -> str:
    """Return each stream's busy share of the step time, e.g. `gpu 97 %  d2h 1 %  cpu 23 %  h2d 1 %`."""
    busy_s = metrics.busy_by_stream
    return "  ".join(f"{stream} {_percent(busy_s[stream], metrics.step_time_s)} %" for stream in WorkStream)


def format_duration(seconds: float) -> str:
    """Return `m:ss` or `h:mm:ss`, and `?` for what is not a time."""
    if not (math.isfinite(seconds) and seconds >= 0):
        return "?"
    minutes, whole_seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{whole_seconds:02}" if hours else f"{minutes}:{whole_seconds:02}"


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
