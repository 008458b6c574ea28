"""Jobs on tiny models and data, and runs of them on threads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lsp_ray.config import LspConfig, RunConfig, RuntimeConfig
from lsp_ray.models.load import load_model
from lsp_ray.runtime.actors.thread_workers import ThreadWorkers
from lsp_ray.runtime.fine_tune import Summary, fine_tune
from lsp_ray.runtime.prepare.job import Job, prepare_job
from lsp_ray.runtime.training import FineTuneWorkers, Stop
from lsp_ray.trace import StepMetrics
from tests.tiny import CLASSIFIERS, VOCAB_SIZE, Family, deep_model, write_tiny_jsonl, write_tiny_model


class Recorder:
    """A listener that keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.phases: list[str] = []
        self.steps: list[StepMetrics] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def phase(self, text: str) -> None:
        self.phases.append(text)

    def step(self, metrics: StepMetrics) -> None:
        self.steps.append(metrics)

    def saved(self, checkpoint: Path) -> None:
        """Its note says so."""

    def has_enough(self) -> bool:
        return False


def tiny_config(folder: Path, family: Family = "llama", **changes: Any) -> RunConfig:
    """A run on a tiny model and data, both written into the folder if they are not there yet."""
    model, data = folder / family, folder / f"{family}.jsonl"
    if not model.exists():
        write_tiny_model(model, family)
        write_tiny_jsonl(data, "sentence_label" if family in CLASSIFIERS else "prompt_completion", 200)
    config = RunConfig(
        model_name_or_path=str(model),
        dataset=str(data),
        output_dir=str(folder / "out"),
        max_steps=6,
        learning_rate=3e-3,
        max_eval_samples=16,
        bf16=False,
        lsp=LspConfig(subspace_dim=16, nnz_per_row=2, calibration_batches=2),
        runtime=RuntimeConfig(device="cpu", num_shards=1, device_threads=1, shard_threads=1),
    )
    runtime = replace(config.runtime, **changes.pop("runtime", {}))
    lsp = replace(config.lsp, **changes.pop("lsp", {}))
    return replace(config, runtime=runtime, lsp=lsp, **changes)


def deepen(folder: Path, family: Family, num_blocks: int, num_rows: int = VOCAB_SIZE) -> None:
    """Let `tiny_config` find a model of so many blocks, and rows of its embeddings, in the folder."""
    tiny_config(folder, family)
    deep_model(family, num_blocks, num_rows).save_pretrained(folder / family)


def tiny_job(folder: Path, family: Family = "llama", **changes: Any) -> Job:
    """The job of `tiny_config`."""
    return prepare_job(tiny_config(folder, family, **changes), lambda _line: None)


def run_job(
    job: Job, workers: FineTuneWorkers, output_dir: Path, listener: Recorder | None = None, stop: Stop | None = None
) -> tuple[Summary, Recorder]:
    """Fine-tune into a folder, a new one unless a run goes on."""
    output_dir.mkdir(parents=True, exist_ok=job.saved is not None)
    listener = listener or Recorder()
    return fine_tune(job, workers, output_dir, listener, str, stop), listener


def run_on_threads(
    job: Job, output_dir: Path, listener: Recorder | None = None, stop: Stop | None = None
) -> tuple[Summary, Recorder]:
    """Fine-tune with the actors' work on threads of this process."""
    workers = ThreadWorkers(job)
    try:
        return run_job(job, workers, output_dir, listener, stop)
    finally:
        workers.close()


def saved_weights(job: Job, output_dir: Path) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors, by name."""
    model = load_model(output_dir, dtype=job.dtype, task=job.task, label_names=job.label_names)
    return dict(model.state_dict())


def weights_after(folder: Path, name: str, **changes: Any) -> dict[str, torch.Tensor]:
    """Those that a run of `tiny_job` on threads saves, in a folder of this name."""
    job = tiny_job(folder, **changes)
    run_on_threads(job, folder / name)
    return saved_weights(job, folder / name)


def assert_same_bits(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
