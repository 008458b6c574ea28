"""What can be measured: sizes of models, and methods of this project and of its peers."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lsp_ray.config import Method

OURS: Mapping[str, Method] = {"lsp": "lsp", "native": "native", "lora": "lora", "zero_offload": "zero_offload"}
PEERS: Mapping[str, str] = {
    "hf": "accelerate",
    "hf_lora": "peft",
    "hf_paged_adam": "bitsandbytes",
    "deepspeed": "deepspeed",
}
"""By name: the module that must be there."""
NEEDS = {"lora": "peft", **PEERS}
# a card that is there for minutes: first what tells most, of every size, then what is slow to set up
FIRST = ("lsp", "native", "hf", "hf_lora", "lora")
LATER = ("zero_offload", "hf_paged_adam", "deepspeed")
NAMES = (*FIRST, *LATER)


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A Llama of random weights, and a step of it.

    Attributes:
        shape: Of its LlamaConfig.
        batch_size: Examples in a step.
        seq_length: Tokens of each.
        gradient_checkpointing: Whether blocks run again in the backward.
        dims: Subspaces of lsp.
        setup_s: About what a measurement takes on a GPU before its first step.
    """

    shape: Mapping[str, int | bool]
    batch_size: int
    seq_length: int
    gradient_checkpointing: bool
    dims: tuple[int, ...]
    setup_s: float

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.batch_size * self.seq_length


def _shape(
    hidden: int, intermediate: int, layers: int, heads: int, *, kv: int, words: int, tied: bool
) -> dict[str, int | bool]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": words,
        "tie_word_embeddings": tied,
    }


SIZES = {
    "tiny": Size(
        shape=_shape(64, 128, 2, 4, kv=2, words=128, tied=True),
        batch_size=2,
        seq_length=16,
        gradient_checkpointing=True,
        dims=(16,),
        setup_s=0.0,
    ),
    "1b": Size(
        shape=_shape(2048, 5632, 22, 32, kv=4, words=49152, tied=True),
        batch_size=4,
        seq_length=512,
        gradient_checkpointing=False,
        dims=(256, 1024),
        setup_s=10.0,
    ),
    "3b": Size(
        shape=_shape(3200, 8640, 26, 32, kv=32, words=32000, tied=False),
        batch_size=4,
        seq_length=1024,
        gradient_checkpointing=True,
        dims=(1024, 2048),
        setup_s=15.0,
    ),
    "7b": Size(
        shape=_shape(4096, 11008, 32, 32, kv=32, words=32000, tied=False),
        batch_size=4,
        seq_length=1024,
        gradient_checkpointing=True,
        dims=(1024, 2048),
        setup_s=25.0,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One measurement; `dim` is the subspace of lsp, which runs on Ray's actors or on threads in their place."""

    size: str
    name: str
    dim: int | None = None
    on_ray: bool = False

    @property
    def title(self) -> str:
        """What the table calls it."""
        words = [self.name, *([] if self.dim is None else [f"d={self.dim}"]), *(["ray"] if self.on_ray else [])]
        return " ".join(words)

    @property
    def missing(self) -> str | None:
        """A module that it needs and that is not installed."""
        module = "ray" if self.on_ray else NEEDS.get(self.name)
        return module if module is not None and importlib.util.find_spec(module) is None else None


def settings_of(sizes: Sequence[str], only: Sequence[str], *, on_ray: bool = False) -> list[Setting]:
    """Everything asked for, in the order in which it is worth a card's time; `on_ray`: lsp on Ray as well."""
    return [
        Setting(size=size, name=name, dim=dim, on_ray=through)
        for names in (FIRST, LATER)
        for size in sizes
        for name in names
        if name in only
        for dim in (SIZES[size].dims if name == "lsp" else (None,))
        for through in ((False, True) if on_ray and name == "lsp" else (False,))
    ]
