"""What `lsp-ray train --help` shows: examples first, then the options that most runs need."""

from __future__ import annotations

import ast
import inspect
import shutil
import textwrap
from dataclasses import fields

from lsp_ray import config
from lsp_ray.config import LspConfig, RunConfig

COMMON = (
    *("model_name_or_path", "dataset", "output_dir", "method", "num_train_epochs", "max_steps", "learning_rate"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "max_seq_length", "gradient_checkpointing"),
    *("eval_steps", "save_steps", "resume_from_checkpoint", "report_port"),
)
_LSP = "subspace_dim"
_INDENT = 6
_MAX_WIDTH = 100

_HEAD = """\
usage: lsp-ray train [OPTIONS]

  lsp-ray train                                            a first run, on data made on the spot
  lsp-ray train --model_name_or_path ~/models/my-llama --dataset notes.jsonl --output_dir my-run
  lsp-ray train --config my-run/config.yaml --output_dir my-run --resume_from_checkpoint last

The options that most runs need; --help_all lists every one.

  --config FILE
      YAML file with any of these options; later options win.
"""


def train_help() -> str:
    """Return the text, as wide as the terminal is, at most 100 columns."""
    width = min(shutil.get_terminal_size((_MAX_WIDTH, 24)).columns, _MAX_WIDTH)
    return _HEAD + "".join(_entry(RunConfig, name, width) for name in COMMON) + _entry(LspConfig, _LSP, width, "lsp.")


def _entry(owner: type, name: str, width: int, prefix: str = "") -> str:
    default = next(field.default for field in fields(owner) if field.name == name)
    shown = str(default).lower() if isinstance(default, bool) else default
    head = f"  --{prefix}{name}" + (f" (default: {shown})" if default is not None else "")
    margin = " " * _INDENT
    text = textwrap.fill(_text(owner, name), max(width, 40), initial_indent=margin, subsequent_indent=margin)
    return f"{head}\n{text}\n"


def _text(owner: type, name: str) -> str:
    """The text under a field of a configuration."""
    module = ast.parse(inspect.getsource(config))
    body = next(node for node in module.body if isinstance(node, ast.ClassDef) and node.name == owner.__name__).body
    place = next(
        index
        for index, node in enumerate(body)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == name
    )
    following = body[place + 1]
    assert isinstance(following, ast.Expr), f"{name} has no text under it"
    assert isinstance(following.value, ast.Constant), f"{name} has no text under it"
    return str(following.value.value)
