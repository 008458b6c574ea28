"""`python -m lsp_ray.run`: fine-tune a model, from options to checkpoint."""

from __future__ import annotations

import signal

# the imports below take a while: Ctrl-C ends them without a traceback, unless a shell has it ignored
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import is_dataclass
from itertools import pairwise
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser, set_parsing_settings

from lsp_ray.arguments import spelled_out, unknown_option
from lsp_ray.config import RunConfig
from lsp_ray.errors import ConfigError, LspRayError, StoppedError
from lsp_ray.launch import run_config
from lsp_ray.passive_waiting import wait_passively
from lsp_ray.runtime.stop_signal import StopSignal

_SWITCHES = (
    *("--bf16", "--gradient_checkpointing", "--torch_compile", "--load_best_model_at_end", "--lsp.balance"),
    *("--load_in_4bit", "--load_in_8bit"),
    "--runtime.dashboard",
)
_PARSER_KEY = re.compile(r'Parser key "(?P<field>[^"]+)":.*?(?:Got|Given) value:\s*(?P<value>.*?)\s*(?:Subtypes.*|$)')
_WORDS = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "text"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for what a person can mend, 1 for what failed underway."""
    wait_passively()
    with StopSignal() as stop:
        try:
            run_config(parse(sys.argv[1:] if argv is None else argv), stop=stop)
        except ConfigError as error:
            return _fail(f"error: {error}", 2)
        except StoppedError as error:
            return _fail(f"stopped {error}", stop.exit_code)
        except (LspRayError, OSError) as error:  # OSError: the disk is full where a log is written, or the like
            return _fail(f"failed: {error}", 1)
        except KeyboardInterrupt:
            return _fail("stopped at once; no checkpoint was written", stop.exit_code)
    return 0


def parse(argv: Sequence[str]) -> RunConfig:
    """Return the run that a command line asks for.

    Raises:
        ConfigError: An option is unknown, or has a value that cannot work.
    """
    argv = spelled_out(argv, _SWITCHES)
    set_parsing_settings(docstring_parse_attribute_docstrings=True)  # the text under each field is its help
    parser = ArgumentParser(
        prog="python -m lsp_ray.run",
        description="Fine-tune a language model on the GPU you own: sparse projectors, offloaded optimizer.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these options; later options win.")
    parser.add_class_arguments(RunConfig)
    try:
        namespace = parser.parse_args(argv)
    except (argparse.ArgumentError, UnicodeDecodeError, OSError) as error:
        raise _config_error(" ".join(str(error).split()), argv) from error
    config: RunConfig = _made(RunConfig, namespace.as_dict())
    return config


def _made(kind: Any, values: Any) -> Any:
    """The dataclass of parsed values; null means the default where it is no value of its own."""
    given = {}
    for name, hint in get_type_hints(kind).items():
        value = values.get(name) if isinstance(values, dict) else None
        if is_dataclass(hint):
            given[name] = _made(hint, value)
        elif isinstance(values, dict) and name in values and (value is not None or NoneType in get_args(hint)):
            given[name] = value
    return kind(**given)


def _config_error(message: str, argv: Sequence[str]) -> ConfigError:
    """Say what jsonargparse found in the words of every other error."""
    found = _PARSER_KEY.search(message)
    if found is not None and (hint := _hint(found["field"])) is not None:
        return ConfigError(found["field"], f"be {_in_words(hint)}", found["value"])
    named = next((value for option, value in pairwise([*argv, ""]) if option == "--config"), None)
    unknown = re.search(r"unrecognized arguments: (.*)", message)
    if unknown is None and named is not None:
        return ConfigError("config", "be a readable YAML file of the options that --help lists", named, hint=message)
    if unknown is None:
        return ConfigError("options", "be those that --help lists", message)
    return unknown_option(unknown[1], ["config", *_option_names(RunConfig)])


def _option_names(owner: Any) -> list[str]:
    """All options of a dataclass, a nested one's after a dot."""
    names = []
    for name, hint in get_type_hints(owner).items():
        names += [f"{name}.{inner}" for inner in _option_names(hint)] if is_dataclass(hint) else [name]
    return names


def _hint(field: str) -> Any:
    """The annotation of a (nested) option, or None."""
    owner: Any = RunConfig
    for part in field.split("."):
        hints = get_type_hints(owner) if is_dataclass(owner) else {}
        owner = hints.get(part)
    return owner


def _in_words(hint: Any) -> str:
    """What a person may give for an annotation."""
    if get_origin(hint) is Literal:
        values = ", ".join(map(str, get_args(hint)))
        return f"one of {values}" if len(get_args(hint)) > 1 else values
    if get_origin(hint) is dict:
        return 'a table, such as {"name": 0.1}'
    kinds = [kind for kind in get_args(hint) if kind is not NoneType] or [hint]
    return " or ".join(
        _in_words(kind) if get_args(kind) else _WORDS.get(kind.__name__, kind.__name__) for kind in kinds
    )


def _fail(line: str, code: int) -> int:
    with suppress(OSError):  # the terminal may be what has gone
        print(line, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
