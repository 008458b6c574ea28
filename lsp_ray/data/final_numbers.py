"""Questions whose worked answers end in a number after ####, as in GSM8K, and how many a model gets right."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from transformers import PreTrainedTokenizerBase

from lsp_ray.data.tokenize import IGNORED, TokenizedRows
from lsp_ray.errors import ConfigError

_FINAL = re.compile(r"####\s*(-?)\$?\s*(\d[\d,]*(?:\.\d+)?)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Token ids of a held-out prompt, and the number that its answer ends in."""

    prompt: tuple[int, ...]
    number: Decimal


def final_number(text: str) -> Decimal | None:
    """The number after the last ####, without thousands' commas and currency; None where there is none."""
    found = _FINAL.findall(text)
    return Decimal(found[-1][0] + found[-1][1].replace(",", "")) if found else None


def find_questions(tokenized: TokenizedRows, tokenizer: PreTrainedTokenizerBase, max_questions: int) -> list[Question]:
    """Return the first held-out rows, at most `max_questions`, whose answer was not cut off before its number.

    Raises:
        ConfigError: `max_questions` is above 0 and no row is such a question.
    """
    questions: list[Question] = []
    for row in tokenized.eval if max_questions and tokenized.task == "causal_lm" else ():
        if len(questions) == max_questions:
            break
        num_prompt = next(at for at, label in enumerate(row["labels"]) if label != IGNORED)
        number = final_number(str(tokenizer.decode(row["input_ids"][num_prompt:], skip_special_tokens=True)))
        if num_prompt and number is not None:
            questions.append(Question(prompt=tuple(row["input_ids"][:num_prompt]), number=number))
    if max_questions and not questions:
        bound = "be 0 where no held-out answer ends in #### and a number within max_seq_length"
        raise ConfigError("max_eval_answers", bound, max_questions)
    return questions


def share_right(questions: Sequence[Question], answers: Sequence[str]) -> float:
    """Share of the answers that end in their question's number."""
    pairs = zip(questions, answers, strict=True)
    return sum(final_number(answer) == question.number for question, answer in pairs) / len(questions)
