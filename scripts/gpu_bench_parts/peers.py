"""The peers through their own front doors: HF's Trainer with several optimizers, PEFT's LoRA, DeepSpeed's ZeRO-2.

Same model, bfloat16 weights, full rows and, as in lsp_ray, frozen embeddings, no clipping and no cuDNN attention.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lsp_ray.config import LoraConfig
from lsp_ray.models.layers import find_layers
from scripts.gpu_bench_parts.phases import Phase, Ran, StepClock, peak_bytes, reset_peak, synchronize
from scripts.gpu_bench_parts.random_model import random_examples, random_model
from scripts.gpu_bench_parts.settings import Setting, Size

LEARNING_RATE = 1e-5


def run_peer(setting: Setting, size: Size, folder: Path, device: torch.device, phases: Sequence[Phase]) -> Ran:
    """Run the phases one after the other; the first only warms up."""
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every length, see CudaBackend
    model = random_model(folder, torch.bfloat16, device)
    find_layers(model)  # freezes the embeddings
    observed = _Observed(phases, device)
    if setting.name == "deepspeed":
        loss = _deepspeed(model, size, device, observed)
    else:
        loss = _trainer(setting.name, model, size, device, observed)
    return Ran(step_s=observed.step_s, exposed_s=None, peak_bytes=peak_bytes(device), last_loss=loss)


class _Observed:
    """Goes through the phases as steps begin and end."""

    def __init__(self, phases: Sequence[Phase], device: torch.device) -> None:
        self._phases, self._device = phases, device
        self._left, self._at = 0, -1
        self.step_s: list[list[float]] = []
        self.num_steps = sum(phase.num_steps for phase in phases)

    def begin(self) -> None:
        """A step begins."""
        if self._left == 0:
            self._at += 1
            self._left = self._phases[self._at].num_steps
            synchronize(self._device)
            self._phases[self._at].watch.start()
            self._clock = StepClock(self._device)
            self._clock.mark()

    def end(self) -> None:
        """All of a step is launched."""
        self._clock.mark()
        self._left -= 1
        if self._left == 0:
            self.step_s.append(self._clock.seconds())
            self._phases[self._at].watch.stop()
            if self._at == 0:
                reset_peak(self._device)


def _trainer(name: str, model: Any, size: Size, device: torch.device, observed: _Observed) -> float:
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    class Steps(TrainerCallback):
        def on_step_begin(self, *_args: Any, **_kwargs: Any) -> None:
            observed.begin()

        def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
            observed.end()

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=observed.num_steps,
            per_device_train_batch_size=size.batch_size,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,  # as lsp_ray by default
            optim="paged_adamw_8bit" if name == "hf_paged_adam" else "adamw_torch_fused",
            gradient_checkpointing=size.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False} if size.gradient_checkpointing else None,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            use_cpu=device.type == "cpu",
            disable_tqdm=True,
        )
        rows: Any = random_examples(size)
        trained = _with_adapters(model) if name == "hf_lora" else model
        trainer = Trainer(model=trained, args=arguments, train_dataset=rows, callbacks=[Steps()])
        trainer.remove_callback(PrinterCallback)
        return float(trainer.train().training_loss)


def _with_adapters(model: PreTrainedModel) -> Any:
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    ours = LoraConfig()
    lora = PeftLoraConfig(
        task_type="CAUSAL_LM",
        r=ours.r,
        lora_alpha=ours.lora_alpha,  # type: ignore[arg-type]
        target_modules="all-linear",
    )
    return get_peft_model(model, lora)


def _deepspeed(model: PreTrainedModel, size: Size, device: torch.device, observed: _Observed) -> float:
    """DeepSpeed's engine, gradients and optimizer state offloaded."""
    import deepspeed

    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517", "RANK": "0", "WORLD_SIZE": "1"})
    os.environ["LOCAL_RANK"] = "0"
    if size.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    config = {
        "train_batch_size": size.batch_size,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": device.type == "cuda"}},
        "optimizer": {"type": "AdamW", "params": {"lr": LEARNING_RATE, "weight_decay": 0.0}},
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=config)
    batches = _batches(size)
    for _ in range(observed.num_steps):
        observed.begin()
        loss = engine(**{name: tensor.to(device) for name, tensor in next(batches).items()}).loss
        engine.backward(loss)
        engine.step()
        observed.end()
    return float(loss.detach())


def _batches(size: Size) -> Iterator[dict[str, torch.Tensor]]:
    rows = random_examples(size)
    while True:
        for at in range(0, len(rows) - size.batch_size + 1, size.batch_size):
            chosen = rows[at : at + size.batch_size]
            yield {name: torch.stack([row[name] for row in chosen]) for name in chosen[0]}
