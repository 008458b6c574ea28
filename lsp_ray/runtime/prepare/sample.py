"""The held-out example that is shown before and after a run."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from lsp_ray.data.tokenize import TokenizedRows

SAMPLE_TOKENS = 48


def sample_of(tokenized: TokenizedRows, tokenizer: PreTrainedTokenizerBase) -> tuple[dict[str, list[int]], str]:
    """What the model is given, a prompt's inputs or a classifier's example, and what the data says."""
    row = tokenized.eval[0]
    if tokenized.collate is not None:  # only a collator knows the columns: those of a batch of one
        row = {name: values[0].tolist() for name, values in tokenized.collate([row]).items()}
    ids = list(row["input_ids"])
    if tokenized.task == "sequence_classification":
        inputs = {name: list(values) for name, values in row.items() if name != "labels"}
        label = row["labels"]
        return inputs, f"label {tokenized.label_names[label] if len(tokenized.label_names) > 1 else f'{label:.4g}'}"
    num_prompt = next(position for position, label in enumerate(row["labels"]) if label != -100)
    num_prompt = num_prompt or max(1, len(ids) // 2)  # plain text has no prompt: continue its first half
    return {"input_ids": ids[:num_prompt]}, str(tokenizer.decode(ids[num_prompt:], skip_special_tokens=True))
