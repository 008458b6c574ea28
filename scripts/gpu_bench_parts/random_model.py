"""A model of random weights made where it trains: no weights are ever on a disk or in the host's memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from lsp_ray.data.tokenize import TokenizedRows
from lsp_ray.models.load import load_config, silenced
from lsp_ray.runtime.actors import model_files
from lsp_ray.runtime.prepare import job_checks
from scripts.gpu_bench_parts.settings import Size

NUM_ROWS = 64


def write_folder(folder: Path, size: Size) -> Path:
    """Write all of a model but its weights: what a job is prepared from."""
    folder.mkdir(parents=True)
    shape: dict[str, Any] = dict(size.shape)
    LlamaConfig(pad_token_id=0, max_position_embeddings=size.seq_length, **shape).save_pretrained(folder)
    save_file({"none": torch.zeros(1)}, folder / "model.safetensors")  # a job looks at the heads of such files
    words = Tokenizer(WordLevel({"w0": 0, "w1": 1}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", unk_token="w0", eos_token="w1")
    tokenizer.save_pretrained(folder)
    return folder


def random_model(folder: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Return the model of the folder's config.json with weights drawn on the device, ready to train."""
    config = load_config(folder)
    config.use_cache = False
    torch.manual_seed(0)
    with silenced(), device:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    model.train()
    if not hasattr(model, "activation_checkpointing_enable"):  # its older name, where transformers is older than ours
        kind: Any = type(model)
        kind.activation_checkpointing_enable = kind.gradient_checkpointing_enable
    return model


@contextmanager
def made_on(device: torch.device) -> Iterator[None]:
    """Within the context a run of lsp_ray that loads its model gets one of random weights on the device."""

    def made(folder: Path, *, dtype: torch.dtype, on_meta: bool = False, **_options: object) -> PreTrainedModel:
        return random_model(folder, dtype, torch.device("meta") if on_meta else device)

    homes = [vars(module) for module in (job_checks, model_files)]
    loads = homes[0]["load_model"]
    for names in homes:
        names["load_model"] = made
    try:
        yield
    finally:
        for names in homes:
            names["load_model"] = loads


def random_rows(size: Size) -> TokenizedRows:
    """Rows of full length: nothing is padded, as with packed examples."""
    ids = _ids(size)

    def collate(chosen: Sequence[torch.Tensor]) -> Mapping[str, torch.Tensor]:
        rows_BS = torch.stack(list(chosen))
        return {"input_ids": rows_BS, "attention_mask": torch.ones_like(rows_BS), "labels": rows_BS.clone()}

    rows: Any = list(ids)
    return TokenizedRows(train=rows, eval=rows[:2], task="causal_lm", label_names=(), collate=collate)


def random_examples(size: Size) -> list[dict[str, torch.Tensor]]:
    """The same for transformers' Trainer."""
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in _ids(size)]


def _ids(size: Size) -> torch.Tensor:
    shape = NUM_ROWS, size.seq_length
    return torch.randint(int(size.shape["vocab_size"]), shape, generator=torch.Generator().manual_seed(0))
