"""Job: all that is decided about a run before any actor starts."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import psutil
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_scheduler

from lsp_ray.config import RunConfig, Task
from lsp_ray.data.dataset import load_rows
from lsp_ray.data.micro_batches import MicroBatches
from lsp_ray.data.tokenize import TokenizedRows, tokenize_rows
from lsp_ray.errors import ConfigError
from lsp_ray.methods.lsp import lsp_payload_sizes, projected_shapes, subspace_dims
from lsp_ray.methods.units import full_payload_sizes
from lsp_ray.models.layers import Layer, find_layers
from lsp_ray.models.load import check_weights, load_skeleton, load_tokenizer
from lsp_ray.models.resolve import resolve_model
from lsp_ray.projection.projector_file import load_projectors
from lsp_ray.runtime.layout import Layout, plan_layout
from lsp_ray.runtime.slots import slot_bytes
from lsp_ray.schedule.policy import POLICIES

SAMPLE_TOKENS = 48
SPARE_STORE_BYTES = 96 << 20  # of the object store, beside the slots: the job's data, messages, and Ray's own minimum

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A validated run. Goes to the GPU actor as it is.

    `payload_sizes` are float32 elements a unit, empty where nothing leaves the device; `sample_inputs` are
    a held-out prompt's (a classifier's: a whole example's) model inputs, shown with the answer before and after.
    """

    config: RunConfig
    model_folder: Path
    task: Task
    label_names: tuple[str, ...]
    device: Device
    dtype: torch.dtype
    micro_batches: MicroBatches
    learning_rates: tuple[float, ...]
    payload_sizes: tuple[int, ...]
    subspace_dims: dict[str, int]
    layout: Layout
    sample_inputs: dict[str, list[int]]
    sample_expected: str

    @property
    def num_steps(self) -> int:
        """Optimizer updates."""
        return len(self.learning_rates)

    @property
    def whitens(self) -> bool:
        """Whether the shards take Adam's steps in whitened coordinates."""
        return self.config.method == "lsp" and self.config.lsp.whiten

    @property
    def staleness(self) -> int:
        """Steps by which deltas are late on purpose; see `Policy`."""
        return POLICIES[self.config.policy].staleness if self.payload_sizes else 0

    @property
    def measured_step(self) -> int:
        """The step over which device memory is measured: the second, which has deltas to add, if there is one."""
        return min(1, self.num_steps - 1)

    @property
    def store_bytes(self) -> int:
        """Shared memory that Ray's object store needs: all slots, down and up, and some to spare."""
        return 2 * sum(slot_bytes(numel) for numel in self.payload_sizes) + SPARE_STORE_BYTES

    @property
    def resolved_config(self) -> RunConfig:
        """The run's configuration with every default decided."""
        runtime = replace(
            self.config.runtime,
            num_shards=self.layout.num_shards or None,  # native has none
            policy=self.config.policy,
            device=self.device,
            device_threads=self.layout.device_threads,
            shard_threads=self.layout.shard_threads,
        )
        return replace(self.config, bf16=self.dtype == torch.bfloat16, runtime=runtime)


def prepare_job(config: RunConfig, note: Callable[[str], None]) -> Job:
    """Find model and data, check that they and the options fit together, and plan the run.

    Args:
        config: What was asked for.
        note: Told, a line at a time, what a person would want to know.

    Raises:
        ConfigError: Something cannot work.
    """
    if config.lsp.init_from is not None:  # an actor's working directory need not be this process's
        config = replace(config, lsp=replace(config.lsp, init_from=str(Path(config.lsp.init_from).absolute())))
    device = _device(config)
    dtype = _dtype(config, device, note)
    rows = load_rows(config.dataset, seed=config.seed)
    model_folder = resolve_model(config.model_name_or_path, log=note).absolute()
    tokenizer = load_tokenizer(model_folder)
    tokenized = tokenize_rows(rows, tokenizer, max_seq_length=config.max_seq_length)
    _note_data(tokenized, config, note)
    label_names = tuple(tokenized.label_names)
    skeleton = load_skeleton(model_folder, task=tokenized.task, num_labels=len(label_names))
    _check_positions(skeleton, tokenizer, config)
    check_weights(model_folder)
    layers = find_layers(skeleton)
    dims = subspace_dims(layers, config.lsp) if config.method == "lsp" else {}
    if config.method == "lsp" and config.lsp.init_from is not None:
        load_projectors(Path(config.lsp.init_from), projected_shapes(layers, config.lsp))  # complains before any actor
    payload_sizes = _payload_sizes(layers, config)
    micro_batches = MicroBatches(
        tokenized,
        tokenizer,
        batch_size=config.per_device_train_batch_size,
        accumulation=config.gradient_accumulation_steps,
        seed=config.seed,
        max_steps=config.max_steps,
        num_train_epochs=config.num_train_epochs,
        max_eval_samples=config.max_eval_samples,
    )
    _check_sizes(config, micro_batches.num_steps, len(tokenized.train))
    sample_inputs, sample_expected = _sample(tokenized, tokenizer)
    cores = len(os.sched_getaffinity(0))
    return Job(
        config=config,
        model_folder=model_folder,
        task=tokenized.task,
        label_names=label_names,
        device=device,
        dtype=dtype,
        micro_batches=micro_batches,
        learning_rates=tuple(_learning_rates(config, micro_batches.num_steps)),
        payload_sizes=tuple(payload_sizes),
        subspace_dims=dims,
        layout=plan_layout(config.runtime, payload_sizes, cores=cores, on_gpu=device == "cuda"),
        sample_inputs=sample_inputs,
        sample_expected=sample_expected,
    )


def check_memory(job: Job) -> None:
    """Raise ConfigError where the slots do not fit into shared memory: Ray would go to the disk without a word."""
    needed = job.store_bytes
    free = min(psutil.virtual_memory().available, psutil.disk_usage("/dev/shm").free)
    if needed > free:
        smaller = "a smaller lsp.subspace_dim" if job.config.method == "lsp" else "method lsp"
        raise ConfigError(
            "method",
            f"fit its slots into the shared memory that is free ({free / 1e9:.2f} GB of {needed / 1e9:.2f} GB needed)",
            job.config.method,
            hint=f"{smaller} needs less; in Docker, --shm-size sets how much there is",
        )


def _device(config: RunConfig) -> Device:
    asked = config.runtime.device
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if asked == "cuda" and not torch.cuda.is_available():
        raise ConfigError("runtime.device", "be cpu or auto where torch finds no GPU", asked)
    return asked


def _dtype(config: RunConfig, device: str, note: Callable[[str], None]) -> torch.dtype:
    if device == "cuda":
        default = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # bfloat16 products take a seventh of float32's time with matrix units, 10 to 40 times it without (docs/log.md)
        default = "amx_bf16" in _cpu_flags()
        if config.bf16 and "_bf16" not in _cpu_flags():
            note("bf16: this CPU has no instructions for it; expect steps many times slower than with --bf16 false")
    return torch.bfloat16 if (default if config.bf16 is None else config.bf16) else torch.float32


def _check_sizes(config: RunConfig, num_steps: int, num_examples: int) -> None:
    batch_size = config.per_device_train_batch_size * config.gradient_accumulation_steps
    if batch_size > num_examples:
        raise ConfigError(
            "per_device_train_batch_size",
            f"make, times gradient_accumulation_steps, at most the {num_examples} training examples",
            config.per_device_train_batch_size,
        )
    if config.warmup_steps >= num_steps:
        raise ConfigError("warmup_steps", f"be below the {num_steps} steps of this run", config.warmup_steps)


def _cpu_flags() -> str:
    """What the processor can do, as Linux lists it."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""


def _payload_sizes(layers: Sequence[Layer], config: RunConfig) -> list[int]:
    if config.method == "lsp":
        return lsp_payload_sizes(layers, config.lsp)
    return full_payload_sizes(layers) if config.method == "zero_offload" else []


def _check_positions(skeleton: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: RunConfig) -> None:
    # RoBERTa's config counts two positions that no token can have; its tokenizer knows. Others say 1e30
    bound = min(getattr(skeleton.config, "max_position_embeddings", sys.maxsize), tokenizer.model_max_length)
    if config.max_seq_length > bound:
        raise ConfigError("max_seq_length", f"be at most {bound}, the positions of this model", config.max_seq_length)


def _learning_rates(config: RunConfig, num_steps: int) -> list[float]:
    """The whole schedule at once, from transformers' own scheduler, so that every actor agrees on it."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=config.learning_rate)
    scheduler = get_scheduler(config.lr_scheduler_type, optimizer, config.warmup_steps, num_steps)
    rates = []
    for _ in range(num_steps):
        rates.append(float(scheduler.get_last_lr()[0]))
        optimizer.step()
        scheduler.step()
    return rates


def _note_data(tokenized: TokenizedRows, config: RunConfig, note: Callable[[str], None]) -> None:
    note(f"data: {len(tokenized.train)} train and {len(tokenized.eval)} eval examples of {config.dataset}")
    if tokenized.num_truncated or tokenized.num_dropped:
        why = "had no label" if tokenized.task == "sequence_classification" else "had nothing to learn left"
        note(
            f"data: {tokenized.num_truncated} examples cut to {config.max_seq_length} tokens (--max_seq_length), "
            f"{tokenized.num_dropped} dropped as they {why}"
        )


def _sample(tokenized: TokenizedRows, tokenizer: PreTrainedTokenizerBase) -> tuple[dict[str, list[int]], str]:
    """The held-out example shown before and after: what the model is given, and what the data says."""
    row = tokenized.eval[0]
    ids = list(row["input_ids"])
    if tokenized.task == "sequence_classification":
        inputs = {name: list(values) for name, values in row.items() if name != "labels"}
        return inputs, f"label {tokenized.label_names[row['labels']]}"
    num_prompt = next(position for position, label in enumerate(row["labels"]) if label != -100)
    num_prompt = num_prompt or max(1, len(ids) // 2)  # plain text has no prompt: continue its first half
    return {"input_ids": ids[:num_prompt]}, str(tokenizer.decode(ids[num_prompt:], skip_special_tokens=True))
