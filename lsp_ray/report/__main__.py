"""`lsp-ray report`: report.html from what one run, or several, left."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from lsp_ray.arguments import Parser
from lsp_ray.errors import ConfigError
from lsp_ray.report.page import report
from lsp_ray.report.run_folder import REPORT, read_run


def main(argv: Sequence[str] | None = None, *, prog: str = "python -m lsp_ray.report") -> int:
    """Run the command line; returns the exit code: 0, or 2 for what a person can mend."""
    try:
        options = _parser(prog).parse_args(argv)
        output = options.output or (options.run_dir[0] if len(options.run_dir) == 1 else Path()) / REPORT
        runs = [read_run(path) for path in options.run_dir]
        _write(output, report(runs))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for run in runs:
        for complaint in run.complaints:
            print(f"{run.name}: {complaint}", file=sys.stderr)
    print(f"report: {output}")
    return 0


def _parser(prog: str = "python -m lsp_ray.report") -> Parser:
    parser = Parser(
        prog=prog,
        description="Write one HTML file about runs: loss, the four streams in a typical step, waiting, bias, memory.",
        allow_abbrev=False,
    )
    parser.add_argument("run_dir", nargs="+", type=Path, help="Output folder of a run; several are set side by side.")
    where = f"The file to write, where an older one is replaced; default: {REPORT}, of one run in its own folder."
    parser.add_argument("--output", type=Path, help=where)
    return parser


def _write(path: Path, document: str) -> None:
    try:
        path.write_text(document, encoding="utf-8")
    except OSError as error:
        raise ConfigError("output", f"be a file that can be written ({error.strerror})", str(path)) from error


if __name__ == "__main__":
    sys.exit(main())
