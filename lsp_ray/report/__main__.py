"""`python -m lsp_ray.report`: report.html from what one run, or several, left."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lsp_ray.errors import ConfigError
from lsp_ray.report.page import report
from lsp_ray.report.run_folder import read_run


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 2 for what a person can mend."""
    options = _parser().parse_args(argv)
    try:
        runs = [read_run(path) for path in options.run_dir]
        _write(options.output, report(runs))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for run in runs:
        for complaint in run.complaints:
            print(f"{run.name}: {complaint}", file=sys.stderr)
    print(f"report: {options.output}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lsp_ray.report",
        description="Write one HTML file about runs: loss, the four streams in a typical step, waiting, bias, memory.",
        allow_abbrev=False,
    )
    parser.add_argument("run_dir", nargs="+", type=Path, help="Output folder of a run; several are set side by side.")
    parser.add_argument(
        "--output", type=Path, default=Path("report.html"), help="The file to write; an older one is replaced."
    )
    return parser


def _write(path: Path, document: str) -> None:
    try:
        path.write_text(document, encoding="utf-8")
    except OSError as error:
        raise ConfigError("output", f"be a file that can be written ({error.strerror})", str(path)) from error


if __name__ == "__main__":
    sys.exit(main())
