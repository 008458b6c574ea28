"""What holds for every method alike."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from lsp_ray.config import GaloreConfig, Method
from lsp_ray.models.loss import num_targets, summed_loss
from tests.tiny_jobs import run_on_threads, tiny_job


@pytest.mark.parametrize("method", get_args(Method))
def test_a_classifier_learns_with_every_method_and_its_checkpoint_holds_what_was_learnt(
    tmp_path: Path, method: Method
) -> None:
    galore = GaloreConfig(rank=16, update_proj_gap=10, scale=1.0)
    job = tiny_job(tmp_path, "bert", method=method, max_steps=30, learning_rate=1e-2, galore=galore)
    summary, _ = run_on_threads(job, tmp_path / "out")
    assert summary.eval_loss_after < 0.9 * summary.eval_loss_before
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    batches = job.micro_batches.eval_batches()
    with torch.no_grad():
        total = sum(float(summed_loss(model, batch)) for batch in batches)
    assert total / sum(map(num_targets, batches)) == pytest.approx(summary.eval_loss_after, rel=1e-4)
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists() == (method == "lora")
