"""The script of hf_trainer.py on the Ray runtime: the lines that end in `# lsp_ray` are all that it takes.

python examples/ray_trainer.py --model MODEL --data notes.jsonl --output_dir out
"""

import argparse

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, TrainingArguments

from lsp_ray import LspConfig  # lsp_ray
from lsp_ray import LSPTrainer as Trainer  # lsp_ray

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True, help="A local folder or a hub id.")
parser.add_argument("--data", required=True, help="A JSON Lines file with a column `text`.")
parser.add_argument("--output_dir", required=True, help="New or empty.")
parser.add_argument("--max_steps", type=int, default=100)
parser.add_argument("--subspace_dim", type=int, default=256)
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.model)
model = AutoModelForCausalLM.from_pretrained(options.model)
rows = load_dataset("json", data_files=options.data, split="train")
rows = rows.map(lambda row: tokenizer(row["text"], truncation=True, max_length=128), remove_columns=rows.column_names)

trainer = Trainer(
    model=model,
    args=TrainingArguments(options.output_dir, max_steps=options.max_steps, per_device_train_batch_size=4),
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    train_dataset=rows,
    processing_class=tokenizer,
    lsp=LspConfig(subspace_dim=options.subspace_dim),  # lsp_ray
)
trainer.train()  # writes the checkpoint to output_dir
