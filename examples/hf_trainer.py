"""An ordinary script for transformers' Trainer; the lines that end in `# lsp_ray` make it train in LSP's subspaces.

python examples/hf_trainer.py --model MODEL --data notes.jsonl --output_dir out
"""

import argparse

from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from lsp_ray import LSPAdamW  # lsp_ray

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True, help="A local folder or a hub id.")
parser.add_argument("--data", required=True, help="A JSON Lines file with a column `text`.")
parser.add_argument("--output_dir", required=True)
parser.add_argument("--max_steps", type=int, default=100)
parser.add_argument("--subspace_dim", type=int, default=256)
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.model)
model = AutoModelForCausalLM.from_pretrained(options.model)
rows = load_dataset("json", data_files=options.data, split="train")
rows = rows.map(lambda row: tokenizer(row["text"], truncation=True, max_length=128), remove_columns=rows.column_names)

optimizer = LSPAdamW.for_model(model, lr=1e-4, optim_args=f"d={options.subspace_dim},r=8")  # lsp_ray
trainer = Trainer(
    model=model,
    args=TrainingArguments(options.output_dir, max_steps=options.max_steps, per_device_train_batch_size=4),
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    train_dataset=rows,
    processing_class=tokenizer,
    optimizers=(optimizer, None),  # lsp_ray
)
trainer.train()
trainer.save_model()
