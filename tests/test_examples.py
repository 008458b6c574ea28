"""The examples run, and change as few lines of an ordinary script as they promise."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tiny import write_tiny_jsonl, write_tiny_model

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_model(folder / "model", "llama")
    write_tiny_jsonl(folder / "data.jsonl", "text", 40)
    return folder


@pytest.mark.usefixtures("cluster")
@pytest.mark.filterwarnings("default")  # other libraries' own
@pytest.mark.parametrize(("script", "most"), [("hf_trainer.py", 3), ("ray_trainer.py", 5)])
def test_an_example_trains_and_few_of_its_lines_are_ours(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, most: int
) -> None:
    ours = [line for line in (EXAMPLES / script).read_text().splitlines() if line.endswith("# lsp_ray")]
    assert 0 < len(ours) <= most
    out = tmp_path / "out"
    options = ["--model", tiny / "model", "--data", tiny / "data.jsonl", "--output_dir", out, "--max_steps", 3]
    monkeypatch.setattr(sys, "argv", [script, *map(str, options), "--subspace_dim", "16"])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    before, after = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (tiny / "model", out))
    assert not torch.equal(before["model.layers.0.mlp.up_proj.weight"], after["model.layers.0.mlp.up_proj.weight"])
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
