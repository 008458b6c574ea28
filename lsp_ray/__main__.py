"""`lsp-ray`, or `python -m lsp_ray`: train, plan, chat, report, export."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

PROG = "lsp-ray"

_HELP = f"""\
usage: {PROG} COMMAND [OPTIONS]

Fine-tune large language models on the GPU you own.

  {PROG} plan --hardware rtx3060 --model_name_or_path my-llama   what fits, how fast, with which options
  {PROG} train --dataset notes.jsonl --output_dir my-run         fine-tune a model
  {PROG} chat my-run --base                                      talk to it, the untrained model beside it
  {PROG} report my-run other-run --output compared.html          losses, times and memory on one page
  {PROG} export my-run exported                                  a checked copy, with a model card

Every command lists its options with --help.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the command's exit code, or 2 for one that is unknown."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("--help", "-h", "help"):
        print(_HELP, end="")
        return 0 if words else 2
    if words[0] == "--version":
        from lsp_ray import __version__

        print(f"lsp_ray {__version__}")
        return 0
    if words[0] not in _COMMANDS:
        print(f"error: command must be one of {', '.join(_COMMANDS)}, got {words[0]!r}", file=sys.stderr)
        return 2
    return _COMMANDS[words[0]](words[1:])


def _train(words: Sequence[str]) -> int:
    if set(words) & {"--help", "-h"}:
        from lsp_ray.train_help import train_help

        print(train_help(), end="")
        return 0
    # imports take a while: Ctrl-C ends them without a traceback, unless a shell has it ignored
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from lsp_ray.run import main

    return main(["--help" if word == "--help_all" else word for word in words])


def _named(module: str, command: str) -> Callable[[Sequence[str]], int]:
    """The command that has a module of its own, imported when it is asked for; its help says how it was started."""

    def run(words: Sequence[str]) -> int:
        code: int = import_module(module).main(list(words), prog=f"{PROG} {command}")
        return code

    return run


_COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": _train,
    "plan": _named("lsp_ray.plan.__main__", "plan"),
    "chat": _named("lsp_ray.generate", "chat"),
    "report": _named("lsp_ray.report.__main__", "report"),
    "export": _named("lsp_ray.export", "export"),
}


if __name__ == "__main__":
    sys.exit(main())
