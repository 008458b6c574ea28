"""Special tokens: the one place that decides what pads, what ends an answer, and what stands before a text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lsp_ray.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialTokens:
    """Ids that have a row in the model's embeddings."""

    pad: int
    """Fills batches."""
    ends: tuple[int, ...]
    """Each ends an answer; none where nothing names one."""


def special_tokens(tokenizer: Any, config: Any, generation: Any, num_rows: int) -> SpecialTokens:
    """Decide from tokenizer, config.json and generation_config.json; ids outside of the embeddings say nothing.

    Args:
        tokenizer: The model's.
        config: Its configuration.
        generation: Its generation configuration; None where it has none.
        num_rows: Of its embeddings.

    Raises:
        ConfigError: The tokenizer names no token that could pad.
    """
    sources = [tokenizer, config.get_text_config(), generation]
    ends = _valid(sources, "eos_token_id", num_rows)
    pads = _valid([tokenizer], "pad_token_id", num_rows) + _valid([tokenizer], "eos_token_id", num_rows)
    if not pads:
        bound = "have a tokenizer with a pad or an end token"
        raise ConfigError("model_name_or_path", bound, getattr(tokenizer, "name_or_path", ""))
    return SpecialTokens(pad=pads[0], ends=tuple(dict.fromkeys(ends)))


def _valid(sources: Iterable[Any], name: str, num_rows: int) -> list[int]:
    """Ids in the order of the sources, of which one may name several."""
    found = []
    for source in sources:
        value = getattr(source, name, None)
        ids = value if isinstance(value, list | tuple) else [value]
        found += [one for one in ids if isinstance(one, int) and not isinstance(one, bool) and 0 <= one < num_rows]
    return found


def prompt_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts that go on: what the tokenizer puts before a text, but for one that has it, and nothing after.

    A tokenizer that ends every text would else end the prompt before its answer.
    """
    before, after = _added(tokenizer)
    encoding = tokenizer(list(texts), return_attention_mask=False, verbose=False)
    rows = []
    for ids in encoding["input_ids"]:
        inside = ids[: len(ids) - len(after)]
        carries = bool(before) and inside[len(before) : 2 * len(before)] == before
        rows.append(inside[len(before) :] if carries else inside)
    return rows


def end_of(tokenizer: Any, text: str, ids: Sequence[int]) -> list[int]:
    """What ends a text whose ids are these: the tokenizer's EOS, nothing where it has none or the text has it."""
    eos = tokenizer.eos_token_id
    if eos is None or ids[-1:] == [eos] or text.rstrip().endswith(tokenizer.eos_token):
        return []
    return [eos]


def _added(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text."""
    plain, full = (tokenizer("a", add_special_tokens=added, verbose=False)["input_ids"] for added in (False, True))
    for start in range(len(full) - len(plain) + 1) if plain else ():
        if full[start : start + len(plain)] == plain:
            return full[:start], full[start + len(plain) :]
    return [], []
