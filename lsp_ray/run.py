"""`python -m lsp_ray.run`: fine-tune a model, from options to checkpoint."""

from __future__ import annotations

import signal

# the imports below take a while: Ctrl-C ends them without a traceback, unless a shell has it ignored
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import sys
from collections.abc import Sequence
from contextlib import suppress

from lsp_ray.arguments import parse_options
from lsp_ray.config import RunConfig
from lsp_ray.errors import ConfigError, LspRayError, RayLostError, StoppedError
from lsp_ray.launch import run_config
from lsp_ray.process import prepare_process
from lsp_ray.runtime.stop_signal import StopSignal

_AT_ONCE = "stopped at once; what was not saved is lost"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for what a person can mend, 1 for what failed underway."""
    prepare_process()
    with StopSignal() as stop:
        try:
            run_config(parse(sys.argv[1:] if argv is None else argv), stop=stop)
        except ConfigError as error:
            return _fail(f"error: {error}", 2)
        except StoppedError as error:
            return _fail(f"stopped {error}", stop.exit_code)
        except RayLostError as error:
            return 1 if error.told == str(error) else _fail(f"failed: {error}", 1)
        except (LspRayError, OSError) as error:  # OSError: the disk is full where a log is written, or the like
            return _fail(f"failed: {error}", 1)
        except KeyboardInterrupt:
            return _fail(_AT_ONCE, stop.exit_code)
        except ImportError:
            if stop.number is None or stop.requested():
                raise
            return _fail(_AT_ONCE, stop.exit_code)  # while it loads, transformers makes this of an interrupt
    return 0


def parse(argv: Sequence[str]) -> RunConfig:
    """Return the run that a command line asks for.

    Raises:
        ConfigError: An option is unknown, or has a value that cannot work.
    """
    return parse_options(
        RunConfig,
        argv,
        prog="python -m lsp_ray.run",
        description="Fine-tune a language model on the GPU you own: sparse projectors, offloaded optimizer.",
        config_file=True,
    )


def _fail(line: str, code: int) -> int:
    with suppress(OSError):  # the terminal may be what has gone
        print(line, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
