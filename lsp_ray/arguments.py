"""Command lines as people type them: dashes for underscores, negative numbers, an option's name half remembered."""

from __future__ import annotations

import argparse
import re
from collections.abc import Collection, Sequence
from dataclasses import is_dataclass
from difflib import get_close_matches
from itertools import pairwise
from types import NoneType
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser, set_parsing_settings

from lsp_ray.errors import ConfigError

_Options = TypeVar("_Options")

_PARSER_KEY = re.compile(r'Parser key "(?P<field>[^"]+)":.*?(?:Got|Given) value:\s*(?P<value>.*?)\s*(?:Subtypes.*|$)')
_OF_TYPE = re.compile(r"argument --(?P<field>\w+): invalid (?P<kind>int|float) value: '(?P<value>.*)'")
_OF_CHOICE = re.compile(r"argument --(?P<field>\w+): invalid choice: '(?P<value>.*)' \(choose from (?P<choices>.*)\)")
_WORDS = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "text"}
_NEGATIVE = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|-inf|-nan")


def parse_options(
    kind: type[_Options], argv: Sequence[str], *, prog: str, description: str, config_file: bool = False
) -> _Options:
    """Return the dataclass that a command line asks for.

    Args:
        kind: A dataclass of options, which may hold others.
        argv: Arguments without the command's name.
        prog: The command, for --help.
        description: What it does, for --help.
        config_file: Whether --config names a YAML file of options.

    Raises:
        ConfigError: An option is unknown, or has a value that cannot work.
    """
    switches = {f"--{name}" for name, hint in _options_of(kind).items() if bool in (hint, *get_args(hint))}
    argv = spelled_out(argv, switches)
    set_parsing_settings(docstring_parse_attribute_docstrings=True)  # the text under each field is its help
    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False, allow_abbrev=False)
    if config_file:
        parser.add_argument("--config", action="config", help="YAML file with any of these options; later options win.")
    parser.add_class_arguments(kind)
    try:
        namespace = parser.parse_args(argv)
    except (argparse.ArgumentError, UnicodeDecodeError, OSError) as error:
        raise _config_error(kind, " ".join(str(error).split()), argv) from error
    made: _Options = _made(kind, namespace.as_dict())
    return made


class Parser(argparse.ArgumentParser):
    """One whose errors are of one line, as those of every other command are."""

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError of what was typed."""
        required, unknown = (message.partition(text)[2] for text in ("are required: ", "unrecognized arguments: "))
        if unknown:
            raise unknown_option(unknown, [option.lstrip("-") for option in self._option_string_actions])
        if required:
            raise ConfigError("options", f"have {required}, as --help says", None)
        if (of_type := _OF_TYPE.fullmatch(message)) is not None:
            raise ConfigError(of_type["field"], f"be {_WORDS[of_type['kind']]}", of_type["value"])
        if (of_choice := _OF_CHOICE.fullmatch(message)) is not None:
            choices = of_choice["choices"].replace("'", "")
            raise ConfigError(of_choice["field"], f"be one of {choices}", of_choice["value"])
        raise ConfigError("options", "be those that --help lists", message)


def spelled_out(argv: Sequence[str], switches: Collection[str]) -> list[str]:
    """Return arguments in the one form that the parser takes.

    Names get underscores; a number below 0 is joined to its option, as it would else look like one; a switch alone
    means true.
    """
    completed: list[str] = []
    for position, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        if not argument.startswith("--"):
            is_value = _NEGATIVE.fullmatch(argument) and completed and completed[-1].startswith("--")
            if is_value and "=" not in completed[-1]:
                completed[-1] += f"={argument}"
            else:
                completed.append(argument)
            continue
        name = "--" + name[2:].replace("-", "_")
        completed.append(f"{name}{equals}{value}")
        following = argv[position + 1] if position + 1 < len(argv) else "--"
        if name in switches and not equals and following.startswith("--"):
            completed.append("true")
    return completed


def unknown_option(given: str, names: Collection[str]) -> ConfigError:
    """The error for arguments that the parser does not know, with the option that may have been meant.

    Args:
        given: What was typed.
        names: All options, without dashes.
    """
    typed = next((word for word in given.split() if word.startswith("--")), given)
    wanted = typed.lstrip("-").partition("=")[0]
    by_last = {name.rpartition(".")[2]: name for name in names}
    close = get_close_matches(wanted, [*names, *by_last], n=1, cutoff=0.7)
    hint = f"did you mean --{by_last.get(close[0], close[0])}?" if close else ""
    return ConfigError("options", "be those that --help lists", given, hint=hint)


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


def _config_error(kind: Any, message: str, argv: Sequence[str]) -> ConfigError:
    """Say what jsonargparse found in the words of every other error."""
    found = _PARSER_KEY.search(message)
    if found is not None and (hint := _options_of(kind).get(found["field"])) is not None:
        return ConfigError(
            found["field"], f"be {_in_words(hint)}", {"None": "null"}.get(found["value"], found["value"])
        )
    named = next((value for option, value in pairwise([*argv, ""]) if option == "--config"), None)
    unknown = re.search(r"unrecognized arguments: (.*)", message)
    if unknown is None and named is not None:
        return ConfigError("config", "be a readable YAML file of the options that --help lists", named, hint=message)
    if unknown is None:
        return ConfigError("options", "be those that --help lists", message)
    return unknown_option(unknown[1], ["config", *_options_of(kind)])


def _options_of(owner: Any) -> dict[str, Any]:
    """The annotations of a dataclass's options, a nested one's after a dot."""
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(owner).items():
        inner = _options_of(hint) if is_dataclass(hint) else None
        found |= {name: hint} if inner is None else {f"{name}.{key}": value for key, value in inner.items()}
    return found


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
