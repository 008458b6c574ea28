"""Attention of causal models without a mask that transformers would have to look at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lsp_ray.config import Task
from lsp_ray.errors import ConfigError

# In these a token's output depends on no later token, wherever padding is on the right.
CAUSAL_FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gpt2", "opt")

_WITHOUT_MASK = "lsp_ray_causal"


def is_plainly_causal(config: PreTrainedConfig, length: int) -> bool:
    """Whether every token of at most `length` attends to all before it and nothing else, in a family known for it."""
    window = getattr(config, "sliding_window", None)
    return config.model_type in CAUSAL_FAMILIES and (window is None or length <= window)


@contextmanager
def without_mask(model: PreTrainedModel) -> Iterator[None]:
    """Within the context a plainly causal model's forward builds no mask and looks at none, whatever it is given.

    transformers reads the mask's values in every forward, for which the host waits for a GPU, and with padding in it
    loses flash attention and repeats keys and values for all heads that share them. It builds none for an attention
    that it knows no mask for; ours is its own of another name, so a block that is computed again outside the context
    (gradient checkpointing) does the same. Attention other than sdpa stays as it is.
    """
    before = model.config._attn_implementation
    if before != "sdpa":
        yield
        return
    AttentionInterface.register(_WITHOUT_MASK, sdpa_attention_forward)
    model.config._attn_implementation = _WITHOUT_MASK
    try:
        yield
    finally:
        model.config._attn_implementation = before


def check_packing(config: PreTrainedConfig, task: Task, length: int) -> None:
    """Raise ConfigError where rows of `length` tokens cannot hold several examples that do not see each other."""
    if task != "causal_lm":
        raise ConfigError("packing", "be false for a classifier", True)
    if not is_plainly_causal(config, length) or config._attn_implementation != "sdpa":
        known = ", ".join(CAUSAL_FAMILIES)
        hint = f"every token must see all {length} tokens of a row; only {known} are known to use a mask as it is"
        raise ConfigError("packing", f"be false for this {config.model_type} model", True, hint=hint)


def block_mask(examples_BS: torch.Tensor) -> torch.Tensor:
    """Return the boolean (B, 1, S, S) mask of packed rows: tokens attend to earlier ones of their own example.

    Args:
        examples_BS: The number of the example of every token; padding has one of its own.
    """
    length = examples_BS.shape[1]
    causal_SS = torch.ones(length, length, dtype=torch.bool, device=examples_BS.device).tril()
    return (examples_BS[:, None, :, None] == examples_BS[:, None, None, :]) & causal_SS
