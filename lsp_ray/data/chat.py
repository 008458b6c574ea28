"""Conversations as token ids: rendered by the model's chat template, with loss on the assistant's turns alone."""

from __future__ import annotations

import re
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from lsp_ray.data.dataset import check_length
from lsp_ray.errors import ConfigError

Message = dict[str, Any]

_MARKS_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def encode_conversation(
    messages: object, tokenizer: PreTrainedTokenizerBase, *, dataset: str
) -> tuple[list[int], list[bool]]:
    """Render one conversation.

    Args:
        messages: A list of mappings with `role` and `content`; other keys go to the template where they have values.
        tokenizer: A fast one (it must tell character offsets) with a chat template.
        dataset: Name of the data set, for errors.

    Returns:
        Token ids, and for each whether the assistant says it. The mark that ends an assistant's turn counts as said;
        an assistant's first turn that answers nothing does not.

    Raises:
        ConfigError: The messages have another form, or the template refuses them.
    """
    plain = _plain_messages(messages, dataset)
    try:
        if _MARKS_GENERATION.search(str(tokenizer.get_chat_template())):
            return _by_marks(plain, tokenizer)
        return _by_prefixes(plain, tokenizer)
    except TemplateError as error:
        roles = "/".join(str(message["role"]) for message in plain)
        bound = "hold conversations that the model's chat template takes"
        raise ConfigError("dataset", bound, roles, hint=f"in {dataset}: {error}") from error


def _plain_messages(messages: object, dataset: str) -> list[Message]:
    """Return messages without keys that have no value; content given as text parts is joined."""
    if not isinstance(messages, list) or not messages or not all(_is_message(message) for message in messages):
        bound = "hold lists of role and content in column 'messages'"
        raise ConfigError("dataset", bound, repr(messages)[:100], hint=f"in {dataset}")
    plain = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            content = "".join(part.get("text") or "" for part in content)
        check_length(dataset, "messages", len(content or ""))
        # files with optional keys read as null where a message has none, and templates ask whether a key is there
        plain.append({key: value for key, value in message.items() if value is not None} | {"content": content or ""})
    return plain


def _is_message(message: object) -> bool:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    content = message.get("content")
    if isinstance(content, list):
        return all(isinstance(part, dict) and isinstance(part.get("text"), str | None) for part in content)
    return isinstance(content, str | None)


def _by_marks(messages: list[Message], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """The template itself marks what the assistant says, between {% generation %} and {% endgeneration %}."""
    encoding: Any = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return list(encoding["input_ids"]), [bool(mark) for mark in encoding["assistant_masks"]]


def _by_prefixes(messages: list[Message], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """An assistant's turn is what the conversation up to it adds to the one before it with the assistant's turn open.

    Some templates write a turn differently once others follow (they cut its reasoning): such turns carry no loss.
    """
    text = _render(messages, tokenizer)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant" and index > 0:
            before = _render(messages[:index], tokenizer, open_turn=True)
            until = _render(messages[: index + 1], tokenizer)
            if text.startswith(until) and until.startswith(before):
                spans.append((len(before), len(until)))
    # the template has written BOS where the model wants one
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    is_said = [any(start <= at < end for start, end in spans) for at, _ in encoding["offset_mapping"]]
    return list(encoding["input_ids"]), is_said


def _render(messages: list[Message], tokenizer: PreTrainedTokenizerBase, *, open_turn: bool = False) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=open_turn))
