"""`lsp-ray chat` and `python -m lsp_ray.generate`: what a trained model answers, in one turn or several.

A prompt answers once; without one a conversation is read line by line. The model that the run began with can answer
beside the trained one.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lsp_ray.arguments import Parser
from lsp_ray.errors import ConfigError
from lsp_ray.process import prepare_process, uncollected

if TYPE_CHECKING:  # --help is answered before torch is imported
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_OF_THE_RUN = ""  # --base without a name
_GOODBYE = ("/exit", "/quit")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: Of an answer, at most.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_p: The likeliest tokens that have this probability together are drawn from.
        seed: Of the draws, the same in every turn.

    Raises:
        ConfigError: A value cannot work.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 42

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError("max_new_tokens", "be at least 1", self.max_new_tokens)
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError("temperature", "be a finite number of at least 0", self.temperature)
        if not 0 < self.top_p <= 1:
            raise ConfigError("top_p", "be above 0 and at most 1", self.top_p)


def main(argv: Sequence[str] | None = None, *, prog: str = "python -m lsp_ray.generate") -> int:
    """Run the command line; returns the exit code: 0, or 2 for what a person can mend."""
    prepare_process()
    try:
        _talk(_parser(prog).parse_args(argv))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _parser(prog: str = "python -m lsp_ray.generate") -> Parser:
    parser = Parser(
        prog=prog,
        description="Talk to a trained model, on the GPU if there is one. Needs no network.",
        epilog=f"Without --prompt every line is a turn of one conversation; an empty line or {_GOODBYE[0]} ends it.",
        allow_abbrev=False,
    )
    parser.add_argument("run_dir", nargs="?", type=Path, help="Folder of a finished run or of an export.")
    parser.add_argument("--model", type=Path, help="The same, by name.")
    parser.add_argument("--prompt", help="Answer this and end.")
    parser.add_argument("--system", help="What a conversation begins with, as the chat template has it.")
    parser.add_argument(
        "--base",
        nargs="?",
        const=_OF_THE_RUN,
        metavar="MODEL",
        help="Let the model that the run began with (or MODEL) answer beside it.",
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="Above 0 draws tokens; default: 0, likeliest.")
    parser.add_argument("--top_p", type=float, default=1.0, help="Draw from the likeliest tokens of this probability.")
    parser.add_argument("--seed", type=int, default=42, help="Of the draws.")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="Tokens of an answer, at most.")
    parser.add_argument("--raw", action="store_true", help="Continue what is typed as it is: no chat template.")
    return parser


def _talk(options: argparse.Namespace) -> None:
    sampling = Sampling(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
    )
    folder = options.run_dir or options.model
    if folder is None or (options.run_dir and options.model):
        raise ConfigError("model", "be the one folder of a finished run or of an export", options.model)
    base = None if options.base is None else options.base or _base_of(folder)
    speakers = list(_speakers(folder, base, raw=options.raw, system=options.system))
    for prompt in [options.prompt] if options.prompt is not None else _lines():
        for speaker in speakers:
            if len(speakers) > 1:
                print(f"[{speaker.name}]")
            speaker.answer(prompt, sampling)


def _base_of(folder: Path) -> str:
    """What the run began with."""
    import yaml

    with suppress(OSError, ValueError, TypeError, yaml.YAMLError):
        name = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["model_name_or_path"]
        if isinstance(name, str):
            return name
    raise ConfigError("base", "name a model where the folder has no config.yaml of a run", str(folder))


def _lines() -> Iterator[str]:
    """What is typed, until an empty line or the end of the input."""
    with suppress(ImportError):
        import readline  # noqa: F401  # arrow keys in input()
    asks = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(asks).strip()
        except EOFError:
            return
        if not line or line in _GOODBYE:
            return
        yield line


def _speakers(folder: Path, base: str | None, *, raw: bool, system: str | None) -> Iterator[Speaker]:
    with uncollected(is_own=True):
        from lsp_ray.models.load import load_tokenizer, silenced
        from lsp_ray.models.resolve import resolve_model
        from lsp_ray.models.trained import load_trained

    named = [("trained", folder)]
    if base is not None:
        named.insert(0, ("base", resolve_model(base, log=lambda line: print(line, file=sys.stderr))))
    for name, path in named:
        model = load_trained(path)
        if not model.can_generate():
            raise ConfigError("model", "be a causal language model", type(model).__name__)
        with silenced():
            yield Speaker(name, model, load_tokenizer(path), raw=raw, system=system)


class Speaker:
    """A model in a conversation; keeps what was said.

    Args:
        name: Shown where several answer.
        model: A causal language model; goes to the GPU if there is one.
        tokenizer: Its own.
        raw: Continue each prompt as it is, as also happens where the tokenizer has no chat template: every turn is then
            a text of its own.
        system: What the conversation begins with.
    """

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        raw: bool = False,
        system: str | None = None,
    ) -> None:
        import torch

        self.name = name
        self._tokenizer = tokenizer
        self._is_chat = bool(tokenizer.chat_template) and not raw
        self._said: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model: Any = model.to(self._device).eval()  # type: ignore[arg-type]

    def answer(self, prompt: str, sampling: Sampling, show: Callable[[str], None] | None = None) -> str:
        """Return the next answer, which is shown as it comes: printed, unless `show` takes its pieces.

        Raises:
            ConfigError: The prompt has no token, or the conversation has become longer than the model takes.
        """
        import torch
        from transformers import GenerationConfig

        from lsp_ray.models.load import tokens_of

        ids = self._ids(prompt)
        num_tokens = len(ids)
        if not num_tokens:
            raise ConfigError("prompt", "have a token", prompt)
        self._check_length(num_tokens)
        chosen: dict[str, Any] = {"do_sample": False}
        if sampling.temperature > 0:
            chosen = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        tokens = tokens_of(self._model, self._tokenizer)
        input_1S = torch.tensor([ids], device=self._device)
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(sampling.seed)
            output_1S = self._model.generate(
                input_ids=input_1S,
                attention_mask=torch.ones_like(input_1S),
                generation_config=GenerationConfig(
                    max_new_tokens=sampling.max_new_tokens,
                    eos_token_id=list(tokens.ends) or None,
                    pad_token_id=tokens.pad,
                    **chosen,
                ),
                streamer=_streamer(self._tokenizer, show),
            )
        said = str(self._tokenizer.decode(output_1S[0, num_tokens:], skip_special_tokens=True))
        if self._is_chat:
            self._said.append({"role": "assistant", "content": said})
        return said

    def _ids(self, prompt: str) -> list[int]:
        from lsp_ray.special_tokens import prompt_ids

        text = self._text(prompt)
        if not self._is_chat:
            return prompt_ids(self._tokenizer, [text])[0]
        # a template has written what stands before a text
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _text(self, prompt: str) -> str:
        if not self._is_chat:
            return prompt
        self._said.append({"role": "user", "content": prompt})
        return str(self._tokenizer.apply_chat_template(self._said, tokenize=False, add_generation_prompt=True))

    def _check_length(self, num_tokens: int) -> None:
        bound = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        if bound is not None and num_tokens >= bound:
            hint = "begin a new conversation" if len(self._said) > 1 else ""
            raise ConfigError("prompt", f"be below the {bound} tokens that the model takes", num_tokens, hint=hint)


def _streamer(tokenizer: PreTrainedTokenizerBase, show: Callable[[str], None] | None) -> Any:
    from transformers import TextStreamer

    streamer: Any = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    if show is not None:
        streamer.on_finalized_text = lambda text, stream_end=False: show(text)
    return streamer


if __name__ == "__main__":
    sys.exit(main())
