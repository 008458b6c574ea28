"""The peers through their own front doors: HF Trainer (full, PEFT's LoRA, GaLore) and DeepSpeed ZeRO-2 with offload.

Same model, bfloat16 weights, batches in the same order, one thread or the same GPU, and, as in lsp_ray, frozen
embeddings and no cuDNN attention. A peer runs in a process of its own (`run`): this module as a script (`main`).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lsp_ray.errors import ConfigError
from lsp_ray.process import PASSIVE_WAITING
from scripts.method_bench.ours import Outcome, gpu_name
from scripts.method_bench.tasks import rate_of

_MODULES = ("accelerate", "peft", "galore_torch", "deepspeed")
PEERS: Mapping[str, str] = dict(zip(("hf_full", "hf_lora", "hf_galore", "deepspeed"), _MODULES, strict=True))
"""By name: the module that must be there."""
_METHOD_OF = {"hf_full": "native", "hf_lora": "lora", "hf_galore": "galore", "deepspeed": "zero_offload"}


def is_there(peer: str) -> bool:
    """Whether what the peer needs is installed (the extra `bench`)."""
    return importlib.util.find_spec(PEERS[peer]) is not None


def run(peer: str, *, num_steps: int, options: Mapping[str, str]) -> Outcome:
    """Run a peer in a process of its own.

    Args:
        peer: Its name.
        num_steps: Of training.
        options: Of `python -m lsp_ray.run`: those that say which model and data.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "peer.json"
        command = [sys.executable, "-m", "scripts.method_bench.peers", peer, "--steps", str(num_steps)]
        command += ["--options", json.dumps(dict(options)), "--out", str(out)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=_environment())
        read = json.loads(out.read_text(encoding="utf-8"))
    return Outcome(
        step_s=tuple(read["step_s"]),
        losses=tuple(read["losses"]),
        scores={"loss": read["eval_loss"]},
        peak_bytes=read["peak_bytes"],
        note=read["note"],
    )


def build_cpu_adam() -> None:
    """Let DeepSpeed compile its optimizer, which takes minutes the first time; without it torch's takes its place."""
    command = [sys.executable, "-c", "from deepspeed.ops.op_builder import CPUAdamBuilder; CPUAdamBuilder().load()"]
    subprocess.run(command, check=False, stdout=subprocess.DEVNULL, env=_environment())


def has_cpu_adam() -> bool:
    """Whether DeepSpeed's optimizer is compiled."""
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    return any(root.glob("**/cpu_adam/cpu_adam.so"))


def _environment() -> dict[str, str]:
    own = {"TRANSFORMERS_VERBOSITY": "error"}
    if not gpu_name():
        own |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    # torch looks for this environment's ninja on the path
    return {
        **PASSIVE_WAITING,
        **os.environ,
        **own,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }


class _Bench:
    """The job that lsp_ray would run: its batches and its model."""

    def __init__(self, peer: str, *, num_steps: int, options: Mapping[str, str]) -> None:
        import torch

        from lsp_ray.config import GaloreConfig, LoraConfig
        from lsp_ray.models.layers import find_layers
        from lsp_ray.models.load import load_model
        from lsp_ray.run import parse
        from lsp_ray.runtime.prepare.job import prepare_job

        if gpu_name():
            torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every length, see CudaBackend
        else:
            torch.set_num_threads(1)
        asked = {**options, "--max_steps": str(num_steps), "--bf16": "true", "--method": "native"}
        asked |= {} if gpu_name() else {"--runtime.device": "cpu"}
        self.job = prepare_job(parse([word for pair in asked.items() for word in pair]), lambda _line: None)
        self.peer = peer
        self.note = ""
        self.lora, self.galore = LoraConfig(), GaloreConfig()
        self.learning_rate = rate_of(_METHOD_OF[peer])
        seed = self.job.config.seed
        self.model = load_model(self.job.model_folder, dtype=torch.bfloat16, task=self.job.task, seed=seed)
        find_layers(self.model)  # freezes the embeddings
        self.model.train()

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every example of every step, in lsp_ray's order, padded as its batch is."""
        for step in range(self.job.num_steps):
            (batch,) = self.job.micro_batches.step(step)
            for at in range(len(batch["input_ids"])):
                yield {name: tensor[at] for name, tensor in batch.items()}

    def eval_loss(self) -> float:
        """As lsp_ray measures it."""
        from lsp_ray.device.evaluate import mean_loss

        return mean_loss(self.model, self.job.micro_batches.eval_batches())


def _hf(bench: _Bench, folder: str) -> tuple[list[float], list[float]]:
    """Transformers' Trainer; returns seconds and losses by step."""
    from torch.utils.data import IterableDataset
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Rows(IterableDataset[dict[str, Any]]):
        def __iter__(self) -> Iterator[dict[str, Any]]:
            return bench.rows()

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.step_s: list[float] = []

        def on_step_begin(self, *_args: Any, **_kwargs: Any) -> None:
            self._start_s = time.monotonic()

        def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
            _finish()
            self.step_s.append(time.monotonic() - self._start_s)

    options: dict[str, Any] = {"optim": "adamw_torch_fused"}
    model: Any = bench.model
    if bench.peer == "hf_galore":
        galore = bench.galore
        args = f"rank={galore.rank}, update_proj_gap={galore.update_proj_gap}, scale={galore.scale}"
        options = {"optim": "galore_adamw", "optim_target_modules": ["self_attn", "mlp"], "optim_args": args}
    if bench.peer == "hf_lora":
        from peft import LoraConfig, get_peft_model

        rank, alpha = bench.lora.r, bench.lora.lora_alpha
        lora = LoraConfig(
            task_type="CAUSAL_LM",
            r=rank,
            lora_alpha=alpha,  # type: ignore[arg-type]
            target_modules="all-linear",
        )
        model = get_peft_model(model, lora)
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=bench.job.num_steps,
        per_device_train_batch_size=bench.job.config.per_device_train_batch_size,
        learning_rate=bench.learning_rate,
        lr_scheduler_type="linear",
        max_grad_norm=0.0,  # as lsp_ray by default
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=not gpu_name(),
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
    clock = Clock()
    trainer = Trainer(model=model, args=arguments, train_dataset=Rows(), callbacks=[clock])
    trainer.train()
    return clock.step_s, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def _deepspeed(bench: _Bench, _folder: str) -> tuple[list[float], list[float]]:
    """DeepSpeed's engine, gradients and optimizer state offloaded; returns seconds and losses by step."""
    import deepspeed
    import torch

    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517", "RANK": "0", "WORLD_SIZE": "1"})
    os.environ["LOCAL_RANK"] = "0"
    compiled = has_cpu_adam()
    bench.note = "with DeepSpeedCPUAdam" if compiled else "with torch's AdamW, as DeepSpeedCPUAdam is not compiled"
    parameters: dict[str, Any] = {"lr": bench.learning_rate, "weight_decay": 0.0}
    optimizer = {"type": "AdamW", "params": parameters | ({} if compiled else {"torch_adam": True})}
    config = {
        "train_batch_size": bench.job.config.per_device_train_batch_size,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        "zero_force_ds_cpu_optimizer": compiled,
        "optimizer": optimizer,
    }
    trained = [parameter for parameter in bench.model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=bench.model, model_parameters=trained, config=config)
    if not gpu_name():
        torch.set_num_threads(1)
    step_s, losses = [], []
    for step, rate in enumerate(bench.job.learning_rates):
        (batch,) = bench.job.micro_batches.step(step)
        start_s = time.monotonic()
        loss = engine(**{name: tensor.to(engine.device) for name, tensor in batch.items()}).loss
        engine.backward(loss)
        for group in engine.optimizer.param_groups:
            group["lr"] = rate / bench.job.config.learning_rate * bench.learning_rate
        engine.step()
        losses.append(float(loss.detach()))
        _finish()
        step_s.append(time.monotonic() - start_s)
    return step_s, losses


def _finish() -> None:
    """Wait for what a GPU still computes."""
    import torch

    if gpu_name():
        torch.cuda.synchronize()


def _peak_bytes() -> int | None:
    import torch

    return torch.cuda.max_memory_allocated() if gpu_name() else None


def main() -> None:
    """Run one peer and write what it took."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("peer", choices=list(PEERS))
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--options", type=json.loads, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    try:
        bench = _Bench(options.peer, num_steps=options.steps, options=options.options)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    train = _deepspeed if options.peer == "deepspeed" else _hf
    with tempfile.TemporaryDirectory() as folder:
        step_s, losses = train(bench, folder)
    read: dict[str, Any] = {"step_s": step_s, "losses": losses, "peak_bytes": _peak_bytes(), "note": bench.note}
    read["eval_loss"] = bench.eval_loss()
    options.out.write_text(json.dumps(read), encoding="utf-8")


if __name__ == "__main__":
    main()
