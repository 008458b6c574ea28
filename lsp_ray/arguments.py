"""Command lines as people type them: dashes for underscores, negative numbers, an option's name half remembered."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from difflib import get_close_matches

from lsp_ray.errors import ConfigError

_NEGATIVE = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|-inf|-nan")


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
