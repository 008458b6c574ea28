"""The built-in data set: what functions of the running Python's standard library do, in their authors' words.

A pair is a function's source without its docstring (the prompt) and the docstring's first paragraph (the completion).
Nothing is downloaded, every machine has it, and the text is real.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

PROMPT = "Write the docstring of this Python function.\n\n{source}\n\nDocstring:\n"

# Lengths that let a typical prompt and completion fit in 128 tokens of a byte-level tokenizer.
MAX_SOURCE_CHARS = 280
MIN_DOCSTRING_CHARS = 12
MAX_DOCSTRING_CHARS = 200

_EVAL_SHARE = 0.1
_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"})

_Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True, kw_only=True)
class DocstringPair:
    """A question about a function and its answer."""

    prompt: str
    completion: str

    @property
    def is_held_out(self) -> bool:
        """Whether the pair belongs to the eval split: about 1 in 10, decided by the prompt's content alone.

        The same function therefore lies on the same side on every machine and under every seed.
        """
        digest = hashlib.sha256(self.prompt.encode()).digest()
        return int.from_bytes(digest[:4], "big") < _EVAL_SHARE * 2**32


def stdlib_pairs(folder: Path | None = None) -> list[DocstringPair]:
    """Read all pairs, without repeated prompts, in the order of file names and lines.

    Args:
        folder: Where to look for sources; the running Python's standard library unless given.

    Returns:
        About 5,000 pairs for CPython 3.11 to 3.13; none where the sources are not installed.
    """
    root = folder or Path(sysconfig.get_paths()["stdlib"])
    pairs: dict[str, DocstringPair] = {}
    for path in _source_files(root):
        for pair in _pairs_of_file(path):
            pairs.setdefault(pair.prompt, pair)
    return list(pairs.values())


def _source_files(root: Path) -> list[Path]:
    return [
        path for path in sorted(root.rglob("*.py")) if _SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts[:-1])
    ]


def _pairs_of_file(path: Path) -> Iterator[DocstringPair]:
    try:
        text = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
        module = ast.parse(text) if '"""' in text or "'''" in text else ast.Module(body=[], type_ignores=[])
    except (OSError, SyntaxError, ValueError):
        # the library ships files in old encodings and templates that are no Python
        return
    lines = text.split("\n")
    for function in _functions(module.body):
        pair = _pair(function, lines)
        if pair is not None:
            yield pair


def _functions(body: list[ast.stmt]) -> Iterator[_Function]:
    """Yield functions in the order of their lines: also methods, nested ones and those under an if or try."""
    for node in body:
        if isinstance(node, _Function):
            yield node
        for name in ("body", "handlers", "orelse", "finalbody"):
            yield from _functions(getattr(node, name, []))


def _pair(function: _Function, lines: list[str]) -> DocstringPair | None:
    """Return the function's pair, or None where it has no docstring, nothing but one, or one that says too little."""
    docstring = ast.get_docstring(function)
    if docstring is None or len(function.body) < 2:
        return None
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    if not MIN_DOCSTRING_CHARS <= len(paragraph) <= MAX_DOCSTRING_CHARS:
        return None
    literal = function.body[0]
    start = function.decorator_list[0].lineno if function.decorator_list else function.lineno
    # whole lines go: a statement may share the docstring's first or last line, but hardly ever does
    kept = lines[start - 1 : literal.lineno - 1] + lines[literal.end_lineno or literal.lineno : function.end_lineno]
    source = _shortened(dedent("\n".join(line for line in kept if line.strip())))
    return DocstringPair(prompt=PROMPT.format(source=source), completion=paragraph) if source else None


def _shortened(source: str) -> str:
    """Return the first whole lines of `source` that fit MAX_SOURCE_CHARS, `...` in place of what was cut."""
    if len(source) <= MAX_SOURCE_CHARS:
        return source
    head = source[:MAX_SOURCE_CHARS].rpartition("\n")[0]
    return f"{head}\n    ..." if head else ""
