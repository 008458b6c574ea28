"""Conversations as token ids: rendered by the model's chat template, with loss on the assistant's turns alone."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, TemplateSyntaxError, meta
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from lsp_ray.data.conversation import Message
from lsp_ray.errors import ConfigError

KWARGS = "chat_template_kwargs"
"""A column of mappings, as TRL has it, whose entries reach the template."""

_GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
_TRIES = 20  # conversations with a key, of which one may show that the template reads it
_FAILURES = (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedConversation:
    """Token ids, and for each whether the assistant says it."""

    input_ids: list[int]
    is_said: list[bool]
    num_rewritten: int = 0
    """Assistant's turns without loss, as the template writes them differently once others follow."""


def template_columns(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """Names beside the messages that the tokenizer's chat templates read, which a data set may give for each row."""
    templates = tokenizer.chat_template or ""
    found = {"tools", "documents", KWARGS} if templates else set()
    for template in templates.values() if isinstance(templates, dict) else [templates]:
        try:
            parsed = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION.sub("", template))
        except TemplateSyntaxError:
            continue  # is said where it is rendered
        found |= meta.find_undeclared_variables(parsed)
    own = {"messages", "add_generation_prompt", "continue_final_message", "raise_exception", "strftime_now"}
    return frozenset(found - own - set(tokenizer.special_tokens_map))


def encode_conversation(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    *,
    dataset: str,
    variables: Mapping[str, Any] | None = None,
) -> EncodedConversation:
    """Render one conversation.

    Args:
        messages: As `plain_messages` returns them.
        tokenizer: A fast one (it must tell character offsets) with a chat template.
        dataset: Name of the data set and the row, for errors.
        variables: What the template reads besides, such as tools.

    Returns:
        The mark that ends an assistant's turn counts as said; an assistant's first turn that answers nothing does not.

    Raises:
        ConfigError: The template refuses the messages.
    """
    given = _variables(variables or {}, dataset)
    if not messages:
        return EncodedConversation(input_ids=[], is_said=[])
    try:
        return _encoded(messages, tokenizer, given)
    except _FAILURES as error:
        try:
            return _encoded(_with_written_arguments(messages), tokenizer, given)
        except _FAILURES:
            pass
        roles = "/".join(str(message["role"]) for message in messages)
        bound = "hold conversations that the model's chat template takes"
        raise ConfigError("dataset", bound, roles, hint=f"in {dataset}: {' '.join(str(error).split())}") from error


def unread_names(
    conversations: Iterable[tuple[Sequence[Message], Mapping[str, Any]]], tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """Return the keys of messages, and the variables beside them, that change nothing of what the template writes.

    Args:
        conversations: Each with its variables, as `encode_conversation` takes them.
        tokenizer: One with a chat template.
    """
    tries: Counter[str] = Counter()
    is_read: set[str] = set()
    for messages, variables in conversations:
        keys = {key for message in messages for key in message} - {"role", "content"}
        given = {name for name, value in variables.items() if value}
        for name in sorted(keys | given):
            if name in is_read or tries[name] == _TRIES:
                continue
            tries[name] += 1
            without = [{key: value for key, value in message.items() if key != name} for message in messages]
            others = {key: value for key, value in variables.items() if key != name}
            if _written(messages, tokenizer, variables) != _written(without, tokenizer, others):
                is_read.add(name)
    return [name for name in tries if name not in is_read]


def _written(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, given: Mapping[str, Any]) -> list[int]:
    """What is trained of a conversation; nothing where the template refuses it."""
    with suppress(ConfigError):
        return encode_conversation(messages, tokenizer, dataset="", variables=given).input_ids
    return []


def _encoded(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any]
) -> EncodedConversation:
    template = str(tokenizer.get_chat_template(tools=variables.get("tools")))
    return (_by_marks if _GENERATION.search(template) else _by_prefixes)(messages, tokenizer, variables)


def _variables(given: Mapping[str, Any], dataset: str) -> dict[str, Any]:
    """What a row has for its template; tools and documents may be JSON text, as a whole or each."""
    variables = {name: value for name, value in given.items() if value is not None and name != KWARGS}
    variables |= _read(given.get(KWARGS)) or {}
    for name in ("tools", "documents"):
        value = _read(variables.get(name))
        read = [_read(item) for item in value] if isinstance(value, list) else value
        if read is not None and not (isinstance(read, list) and all(isinstance(item, dict) for item in read)):
            raise ConfigError(
                "dataset", f"hold lists of mappings in column '{name}'", repr(value)[:100], hint=f"in {dataset}"
            )
        variables[name] = read or None
    return variables


def _read(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError):
        return value


def _with_written_arguments(messages: Sequence[Message]) -> list[Message]:
    """Tool calls' arguments as JSON text, for templates that add them to a text."""

    def written(call: dict[str, Any]) -> dict[str, Any]:
        inner = call.get("function")
        if isinstance(inner, dict):
            return {**call, "function": written(inner)}
        return call | {"arguments": json.dumps(call.get("arguments", {}), ensure_ascii=False)}

    return [
        message | {"tool_calls": [written(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    ]


def _by_marks(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any]
) -> EncodedConversation:
    """The template itself marks what the assistant says, between {% generation %} and {% endgeneration %}."""
    encoding: Any = tokenizer.apply_chat_template(
        list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **variables
    )
    marks = [bool(mark) for mark in encoding["assistant_masks"]]
    return EncodedConversation(input_ids=list(encoding["input_ids"]), is_said=marks)


def _by_prefixes(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any]
) -> EncodedConversation:
    """An assistant's turn is what the conversation up to it adds to the one before it with the assistant's turn open.

    Some templates write a turn differently once others follow (they cut its reasoning): such turns carry no loss.
    """
    text = _render(messages, tokenizer, variables)
    spans = []
    turns = [at for at, message in enumerate(messages) if message["role"] == "assistant" and at > 0]
    for index in turns:
        before = _render(messages[:index], tokenizer, variables, open_turn=True)
        until = _render(messages[: index + 1], tokenizer, variables)
        if text.startswith(until) and until.startswith(before):
            spans.append((len(before), len(until)))
    # the template has written BOS where the model wants one
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    is_said = [any(start <= at < end for start, end in spans) for at, _ in encoding["offset_mapping"]]
    rewritten = len(turns) - len(spans)
    return EncodedConversation(input_ids=list(encoding["input_ids"]), is_said=is_said, num_rewritten=rewritten)


def _render(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    variables: Mapping[str, Any],
    *,
    open_turn: bool = False,
) -> str:
    options: dict[str, Any] = {**variables, "tokenize": False, "add_generation_prompt": open_turn}
    return str(tokenizer.apply_chat_template(list(messages), **options))
