"""`python -m lsp_ray.generate`: a quick look at what a trained model answers, word by word."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lsp_ray.errors import ConfigError
from lsp_ray.passive_waiting import wait_passively


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 2 for what a person can mend."""
    options = _parser().parse_args(argv)
    wait_passively()
    try:
        if options.max_new_tokens < 1:
            raise ConfigError("max_new_tokens", "be at least 1", options.max_new_tokens)
        answer(options.model, options.prompt, max_new_tokens=options.max_new_tokens, raw=options.raw)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lsp_ray.generate",
        description="Let a trained model answer a prompt, greedily, on the GPU if there is one. Needs no network.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", type=Path, required=True, help="Folder of a finished run or of an export.")
    parser.add_argument("--prompt", required=True, help="What to answer or to continue.")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="Tokens of the answer, at most.")
    parser.add_argument("--raw", action="store_true", help="Continue the prompt as it is: no chat template.")
    return parser


def answer(folder: Path, prompt: str, *, max_new_tokens: int, raw: bool) -> None:
    """Print the model's greedy answer as it comes; through the chat template if the tokenizer has one.

    Raises:
        ConfigError: The folder holds no causal language model, or the prompt is empty.
    """
    import torch
    from transformers import GenerationConfig, TextStreamer

    from lsp_ray.models.load import load_tokenizer, tokens_of
    from lsp_ray.models.trained import load_trained
    from lsp_ray.special_tokens import prompt_ids

    model = load_trained(folder)
    if not model.can_generate():
        raise ConfigError("model", "be a causal language model", type(model).__name__)
    tokenizer = load_tokenizer(folder)
    text = prompt
    if tokenizer.chat_template and not raw:
        conversation = [{"role": "user", "content": prompt}]
        text = str(tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True))
    # a template has written what stands before a text
    ids = prompt_ids(tokenizer, [text])[0] if text is prompt else tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ConfigError("prompt", "have a token", prompt)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).eval()  # type: ignore[arg-type]
    tokens = tokens_of(model, tokenizer)
    input_ids = torch.tensor([ids], device=device)
    model.generate(  # type: ignore[operator]
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        generation_config=GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=list(tokens.ends) or None,
            pad_token_id=tokens.pad,
        ),
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
    )


if __name__ == "__main__":
    sys.exit(main())
