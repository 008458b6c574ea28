"""Conversations in the form that chat templates take, from the forms that other tools write."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lsp_ray.errors import ConfigError

Message = dict[str, Any]

_SAME_ROLE = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "bard": "assistant",
    "ai": "assistant",
    "model": "assistant",
    "observation": "tool",
}
KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool")
_TEXT_PARTS = (None, "text", "input_text", "output_text")


def plain_messages(given: object) -> list[Message]:
    """Return messages of role and content, from role/content or ShareGPT's from/value; [] stays [].

    Roles of other tools get their usual name, parts of text are joined, tool calls' arguments become mappings, and keys
    without a value are left out: templates ask whether a key is there.

    Raises:
        ConfigError: It is no conversation, or has parts that are no text, such as images.
    """
    if not isinstance(given, list):
        raise _other_form(given)
    return [_plain(message) for message in given]


def _plain(message: object) -> Message:
    if not isinstance(message, Mapping):
        raise _other_form(message)
    names = {} if "role" in message or "content" in message else {"from": "role", "value": "content"}
    named: Message = {names.get(str(key), str(key)): value for key, value in message.items()}
    role, content = named.get("role"), named.get("content")
    if not isinstance(role, str):
        raise _other_form(message)
    plain = {key: value for key, value in named.items() if value is not None}
    plain |= {"role": _role(role), "content": _content(content, message)}
    if "tool_calls" in plain:
        plain["tool_calls"] = [_tool_call(call) for call in _listed(plain["tool_calls"], message)]
    return plain


def _role(role: str) -> str:
    lower = role.strip().lower()
    return _SAME_ROLE.get(lower, lower if lower in KNOWN_ROLES else role)


def _content(content: object, message: object) -> str:
    if isinstance(content, list):
        return "".join(_text_of(part, message) for part in content)
    if content is None or isinstance(content, str):
        return content or ""
    raise _other_form(message)


def _text_of(part: object, message: object) -> str:
    if not isinstance(part, Mapping):
        raise _other_form(message)
    kind, text = part.get("type"), part.get("text")
    if kind not in _TEXT_PARTS or (kind is None and "text" not in part):
        raise ConfigError("dataset", "hold messages of text alone", f"a part of type {kind or '/'.join(part)}")
    if not isinstance(text, str | None):
        raise _other_form(message)
    return text or ""


def _listed(calls: object, message: object) -> list[Any]:
    if not isinstance(calls, list):
        raise _other_form(message)
    return calls


def _tool_call(call: object) -> dict[str, Any]:
    """The call with its arguments as a mapping, which OpenAI's API writes as JSON text."""
    if not isinstance(call, Mapping):
        raise ConfigError("dataset", "hold tool calls that are mappings", repr(call)[:100])
    inner = call.get("function")
    if isinstance(inner, Mapping):
        return {**call, "function": _tool_call(inner)}
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        arguments = _mapping(arguments)
    if "arguments" in call and not isinstance(arguments, Mapping | None):
        raise ConfigError("dataset", "hold tool calls whose arguments are a mapping or JSON text", repr(call)[:100])
    return dict(call) | ({"arguments": arguments or {}} if "arguments" in call else {})


def _mapping(text: str) -> object:
    try:
        return json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError):
        return text


def _other_form(found: object) -> ConfigError:
    bound = "hold lists of role and content in column 'messages'"
    return ConfigError("dataset", bound, repr(found)[:100])


def without_nulls(value: Any) -> Any:
    """Without keys of null, at every depth: a file that types its columns has every key in every row."""
    if isinstance(value, Mapping):
        return {key: without_nulls(inside) for key, inside in value.items() if inside is not None}
    return [without_nulls(inside) for inside in value] if isinstance(value, list) else value
