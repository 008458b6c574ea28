"""Columns: how a row's value becomes the text that is kept of it. What is kept says what the file says."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from lsp_ray.data.conversation import KNOWN_ROLES, plain_messages, without_nulls
from lsp_ray.data.text_file import WrittenFloat, WrittenInt
from lsp_ray.errors import ConfigError

MAX_TEXT_BYTES = 10_000_000  # two Bibles; tokenising all of what is then cut off would look like a hang

_WHOLE = re.compile(r"-?(0|[1-9][0-9]*)")
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?(nan|inf|infinity)", re.IGNORECASE)
_INT64 = 2**63


class Column(Protocol):
    """Of a shape's column."""

    def keep(self, value: object) -> str | None:
        """Return what is kept of a value; None where there is none.

        Raises:
            ConfigError: It cannot be used; the caller adds the row.
        """


class TextColumn:
    """Text as it stands; numbers, true and false as they are written."""

    def __init__(self, spelled: str) -> None:
        self._spelled = spelled
        self.others: Counter[str] = Counter()
        """How many values are no text, by what they are."""

    def keep(self, value: object) -> str | None:
        """See `Column`."""
        if value is None:
            return None
        if not isinstance(value, str):
            value = self._written(value)
        check_text(value, self._spelled)
        return value

    def _written(self, value: object) -> str:
        if not isinstance(value, int | float):
            bound = f"hold text in column '{self._spelled}'"
            raise ConfigError("dataset", bound, repr(value)[:100])
        self.others["true or false" if isinstance(value, bool) else "numbers"] += 1
        if isinstance(value, bool):
            return "true" if value else "false"
        return value.text if isinstance(value, WrittenInt | WrittenFloat) else repr(value)


class JsonColumn:
    """Any value, as JSON."""

    def __init__(self, spelled: str) -> None:
        self._spelled = spelled

    def keep(self, value: object) -> str | None:
        """See `Column`."""
        if value is None:
            return None
        text = json.dumps(value, ensure_ascii=False)
        check_text(text, self._spelled)
        return text


class ConversationColumn:
    """Conversations in the form of `plain_messages`, as JSON."""

    def __init__(self, spelled: str, *, typed: bool) -> None:
        self._json = JsonColumn(spelled)
        self._typed = typed  # then null is what every row has that lacks a key of another
        self.roles: Counter[str] = Counter()
        self.num_empty_answers = 0

    def keep(self, value: object) -> str | None:
        """See `Column`."""
        if value is None:
            return None
        if isinstance(value, str):
            value = _parsed(value)
        messages = plain_messages(without_nulls(value) if self._typed else value)
        self.roles.update(message["role"] for message in messages)
        self.num_empty_answers += any(
            message["role"] == "assistant" and set(message) == {"role", "content"} and not message["content"].strip()
            for message in messages
        )
        return self._json.keep(messages)

    def notes(self) -> list[str]:
        """What a person would want to know of the conversations read."""
        notes = []
        odd = [role for role in self.roles if role not in KNOWN_ROLES]
        if odd:
            notes.append(f"roles other than {', '.join(KNOWN_ROLES)} carry no loss: {', '.join(odd[:5])}")
        if self.num_empty_answers:
            notes.append(f"{self.num_empty_answers} conversations have an empty answer, which teaches to end at once")
        return notes


class LabelColumn:
    """Labels as they are written; what they are is decided when all are known."""

    def __init__(self, spelled: str, *, written: bool) -> None:
        self._spelled = spelled
        self._written = written  # in a CSV file a number is no other than its text
        self._kinds: set[type] = set()
        self.was_whole_floats = False

    def keep(self, value: object) -> str | None:
        """See `Column`."""
        if value is None or value == "":
            return None
        if not isinstance(value, str | int | float):
            bound = f"hold whole numbers or names in column '{self._spelled}'"
            raise ConfigError("dataset", bound, repr(value)[:100])
        self._kinds.add(self._kind(value))
        if isinstance(value, WrittenInt | WrittenFloat):
            return value.text
        text = str(value)
        check_text(text, self._spelled)
        return text

    def _kind(self, value: str | float) -> type:
        if isinstance(value, str) and self._written:
            text = value.strip()
            return int if _WHOLE.fullmatch(text) else float if _NUMBER.fullmatch(text) and not _padded(text) else str
        return next(kind for kind in (bool, int, float, str) if isinstance(value, kind))

    def typed(self, texts: Sequence[str | None]) -> Sequence[str | bool | float | None]:
        """Return the labels: whole numbers or numbers where all are, else names.

        Whole numbers with a decimal point beside gaps are classes: so are written those of a table that has gaps.
        """
        if self._kinds == {bool} and not self._written:
            return [None if text is None else text == "True" for text in texts]
        if not self._kinds or not self._kinds <= {int, float}:
            return texts
        numbers = [None if text is None else float(text) for text in texts]
        known = {number for number in numbers if number is not None}
        if self._kinds == {int}:
            whole = [None if text is None else int(text) for text in texts]
            fits = all(number is None or -_INT64 <= number < _INT64 for number in whole)
            return whole if fits else texts
        if None in numbers and all(number.is_integer() for number in known):
            self.was_whole_floats = True
            return [None if number is None else int(number) for number in numbers]
        return numbers


def check_text(text: str, spelled: str) -> None:
    """Raise ConfigError where a row's text in a column is too long or cannot be written as UTF-8."""
    try:
        num_bytes = len(text) if text.isascii() else len(text.encode())
    except UnicodeEncodeError as error:
        bound = f"hold text in column '{spelled}' that UTF-8 can write"
        raise ConfigError("dataset", bound, repr(text)[:100]) from error
    check_length(num_bytes, spelled)


def check_length(num_bytes: int | None, spelled: str, *, where: str = "") -> None:
    """Raise ConfigError where a row's text in a column is too long; None: there is no row."""
    if num_bytes is not None and num_bytes > MAX_TEXT_BYTES:
        bound = f"hold at most {MAX_TEXT_BYTES} bytes of text in a row of column '{spelled}'"
        hint = f"{f'in {where}; ' if where else ''}max_seq_length would cut most of it off"
        raise ConfigError("dataset", bound, num_bytes, hint=hint)


def _padded(text: str) -> bool:
    """Whether zeros stand before the number: then it is a code, such as 007."""
    digits = text.lstrip("+-")
    return digits[:1] == "0" and digits[1:2].isdigit()


def _parsed(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
