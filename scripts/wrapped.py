"""Pages with lines that can be read; what is a table, a heading or a fenced block stays as it is."""

from __future__ import annotations

import re
import textwrap

WIDTH = 100
_ITEM = re.compile(r"(?:- |\d+\. )?")


def wrapped(page: str) -> str:
    """Return a Markdown page whose paragraphs and list items have lines of at most 100 characters."""
    lines: list[str] = []
    is_fenced = False
    for block in re.split(r"(\n)", page):
        if block.startswith("```"):
            is_fenced = not is_fenced
        if is_fenced or len(block) <= WIDTH or block.startswith(("|", "#", "!", " ", "```")):
            lines.append(block)
            continue
        found = _ITEM.match(block)
        indent = " " * len(found[0] if found else "")
        lines.append(
            textwrap.fill(block, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
        )
    return "".join(lines)
