"""DeviceSide: a job's model on the device, from loading to saving. What the GPU actor does, without Ray."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from lsp_ray.data.final_numbers import share_right
from lsp_ray.device.backend import Backend, CpuBackend
from lsp_ray.device.compiled_blocks import CompiledBlocks
from lsp_ray.device.cuda import CudaBackend
from lsp_ray.device.evaluate import class_scores, generate, language_scores, mean_loss, number_scores, predict
from lsp_ray.device.fused_norms import fuse_norms
from lsp_ray.device.host_activations import HostActivations
from lsp_ray.device.judge import Judge
from lsp_ray.device.projected_linear import InSubspace
from lsp_ray.device.refit import Refitter
from lsp_ray.device.refit_file import load_refits, save_refits
from lsp_ray.device.refit_follower import RefitFollower
from lsp_ray.device.shared_weights import SharedWeights, WeightsPlace
from lsp_ray.device.step_report import StepReport
from lsp_ray.device.streamed_weights import StreamedWeights
from lsp_ray.device.switch import Takeover
from lsp_ray.device.trained_digest import trained_digest
from lsp_ray.device.trained_file import load_trained, save_trained
from lsp_ray.device.unit import SummedUnit
from lsp_ray.device.worker import DeviceWorker
from lsp_ray.errors import LspRayError
from lsp_ray.methods.galore import GaloreShard
from lsp_ray.methods.lsp import take_projectors
from lsp_ray.models.layers import find_layers
from lsp_ray.models.load import load_tokenizer, tokens_of
from lsp_ray.optim.moments_file import load_moments, save_moments
from lsp_ray.projection.projector_file import FILE_NAME, load_projectors
from lsp_ray.runtime.actors.decided import Decided, SetupReport, on_cpu
from lsp_ray.runtime.actors.kept_back import load_kept_back, save_kept_back
from lsp_ray.runtime.actors.model_files import ModelFiles, apart, save_linears
from lsp_ray.runtime.actors.throttle import Throttle
from lsp_ray.runtime.actors.trained_parts import (
    News,
    activations_of,
    brought,
    build,
    local_shard_of,
    part_seconds,
    refitter_of,
    telling_due,
    throttle_of,
)
from lsp_ray.runtime.checkpoints.checkpoint import STATE, TRAINED, writing
from lsp_ray.runtime.checkpoints.saved_run import FIELD, SavedRun, reading
from lsp_ray.runtime.prepare.beginning import damaged_updates
from lsp_ray.runtime.prepare.job import Job
from lsp_ray.runtime.prepare.sample import SAMPLE_TOKENS

if TYPE_CHECKING:
    from peft import PeftModel

_BASES = "galore_bases.safetensors"


class DeviceSide:
    """Call `setup` first; construction does nothing slow.

    Args:
        job: The run.
        tell: Told of `News`, on any thread.
        gpu: Its number; the first one learns projectors, measures and saves for all.
    """

    worker: DeviceWorker
    shared: SharedWeights | None = None  # with others of this machine

    def __init__(self, job: Job, tell: Callable[[News], None], gpu: int = 0) -> None:
        self._gpu, self._job, self._tell = gpu, job, tell
        on_gpu, limit_bytes = job.device == "cuda", job.device_limit_bytes
        self.backend: Backend = CudaBackend(limit_bytes=limit_bytes) if on_gpu else CpuBackend()
        self._files = ModelFiles(job, torch.device("cpu") if job.config.streams else self.backend.device)
        self.progress = ""
        self._is_loaded = self._is_set_up = False
        self._linears: Sequence[tuple[str, InSubspace]] = []
        self._adapters: PeftModel | None = None
        self._compiled: CompiledBlocks | None = None
        self._weights: StreamedWeights | None = None
        self._activations: HostActivations | None = None

    def share(self, place: WeightsPlace | None) -> None:
        """Before all else: load the model for others of this machine too, or take it from one; see `SharedWeights`."""
        self.shared = SharedWeights(place)
        self._load(None)

    def pace(self) -> float:
        """Before `setup`: seconds that a micro-batch takes here, forward and backward."""
        self._load(None)
        return part_seconds(self._job, self._model, self.backend, self._say)

    def divide(self, gpu_of_part: tuple[int, ...]) -> None:
        """Before `setup`: compute these parts of a step."""
        self._job = self._job.with_parts(gpu_of_part)

    def setup(self, host_slots: Sequence[torch.Tensor] = (), decided: Decided | None = None) -> SetupReport:
        """Load, wrap and fit, or take what the first GPU decided; lock the pages of the slots if a GPU copies there."""
        job, config = self._job, self._job.config
        self._load(decided)
        layers = find_layers(self._model, job.unreached)
        throttle = decided.throttle if decided else throttle_of(job, self._model, layers, self.backend, self._say)
        trained = build(job, self._model, layers, decided, self.backend.device, self._say)
        units, self._linears, self._adapters = trained.units, trained.linears, trained.adapters
        sent = [unit.numel for unit in units] if config.offloads else []
        assert sent == list(job.payload_sizes), "the model's units are not those that the job was planned for"
        self._refitter = refitter_of(job, units, self._gpu, self._tell)
        self._local_shard = local_shard_of(job, units, self.backend.device)
        self.worker = DeviceWorker(
            self._model,
            units,
            self.backend,
            learning_rates=job.learning_rates,
            weight_decay=config.weight_decay,
            seed=config.seed,
            on_gradients=self._tell,
            on_due=telling_due(self._gpu, self._tell) if job.delta_room is not None else None,
            local_shard=self._local_shard,
            refitter=self._refitter,
            judge=Judge(units, max_grad_norm=config.max_grad_norm, skips=config.on_nonfinite == "skip"),
            measured_step=job.measured_step,
            staleness=job.staleness,
            codec=job.codec,
            graphs=self.backend.has_graphs and config.uses_graphs,
            num_parts=len(job.layout.gpu_of_part),
            own_parts=job.layout.parts_of(self._gpu),
            weights=self._weights,
            limit_bytes=job.device_limit_bytes if job.device == "cpu" else None,
            activations=self._activations,
        )
        if config.torch_compile:
            self._compiled = CompiledBlocks(layers, self.backend.device)
        self.keep_to(throttle)
        first_step = self._take_up(job.saved, decided)
        self._is_set_up = True
        self._micro_batches = job.micro_batches.read_ahead(
            job.num_steps - first_step, first_step=first_step, page_locked=job.device == "cuda"
        )
        pageable = [slot for slot in host_slots if job.device == "cuda" and not self.backend.page_lock(slot)]
        return SetupReport(
            unfitted=trained.unfitted,
            num_pageable=len(pageable) + sum(moved.num_pageable for moved in self._moved),
            throttle=throttle,
            gpu_of_part=job.layout.gpu_of_part,
            missing=trained.missing,
        )

    def decided(self) -> Decided:
        """After `setup`: what other GPUs are to be given; its tensors are on the CPU."""
        begun = {name: own.delta_DE.cpu() for name, own in apart(self._linears)} if self._job.gives_back else {}
        return Decided(throttle=self._kept_to, projectors=on_cpu(self._linears), deltas=begun)

    def hand_over(self, step: int, weights: Path) -> Decided:
        """While the next forward waits for the first delta of `step`: leave all that it begins with in a file.

        Raises:
            CheckpointError: It cannot be written.
        """
        assert self.worker.is_before(step), f"deltas of step {step} have been added"
        with writing(weights.parent):
            save_trained(self.worker.units, weights)
        return Decided(throttle=self._kept_to, projectors=on_cpu(self._linears), step=step, weights=weights)

    def digest(self) -> int:
        """Between two steps: a number that tells whether what is trained is the same on other GPUs."""
        self.worker.settle()
        return trained_digest(self.worker.units)

    def take(self, takeover: Takeover) -> None:
        """Let these projectors be the next ones, on a GPU that does not learn them; called on any thread."""
        assert isinstance(self._refitter, RefitFollower), "the first GPU learns them itself"
        self._refitter.take(takeover)

    def copy_totals(self, unit: int, total: torch.Tensor) -> None:
        """After `setup`: copy what the shard's sum is to begin with, see `SummedUnit`."""
        cast(SummedUnit, self.worker.units[unit]).copy_totals(total)

    def keep_to(self, throttle: Throttle) -> None:
        """Between two steps: slow the link down to this from now on."""
        self._kept_to = throttle
        self.worker.slow_down(throttle.link())

    def run_step(self, step: int, host_slots: Sequence[torch.Tensor] = ()) -> StepReport:
        """Run the next optimizer update; `step` must be the one after the last."""
        return self.worker.run_step(step, next(self._micro_batches), host_slots)

    def drain(self) -> None:
        """See `DeviceWorker.drain`."""
        self.worker.drain()

    def evaluate(self) -> dict[str, float]:
        """Scores on the held-out examples, by name; what a task is measured by, its mean `loss` first."""
        job = self._job
        self.worker.flush()
        batches = job.micro_batches.eval_batches()
        if job.task == "sequence_classification":
            return (number_scores if job.is_regression else class_scores)(self._model, batches)
        scores = language_scores(self._model, batches)
        if job.questions:
            prompts = [question.prompt for question in job.questions]
            answers = generate(self._model, prompts, job.config.seq_length, self._tokens)
            texts = [str(self._tokenizer.decode(ids, skip_special_tokens=True)) for ids in answers]
            scores["answer_accuracy"] = share_right(job.questions, texts)
        return scores

    def eval_loss(self) -> float:
        """Between two steps: the mean loss on the held-out examples, with what the next forward would add first.

        Under a stale policy the last deltas are not in it; nothing changes for the steps to come.
        """
        self.worker.settle()
        return mean_loss(self._model, self._job.micro_batches.eval_batches())

    def sample(self) -> Sequence[float]:
        """The model's answer to the sample prompt: token ids, a classifier's label, or a number."""
        self.worker.flush()
        if self._job.task == "causal_lm":
            return generate(self._model, [self._job.sample_inputs["input_ids"]], SAMPLE_TOKENS, self._tokens)[0]
        inputs = {name: torch.tensor([ids]) for name, ids in self._job.sample_inputs.items()}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        return predict(self._model, inputs)

    def take_weights(self, checkpoint: Path) -> None:
        """After the last step: go back to the weights of a checkpoint of this run, for evaluation and saving.

        Raises:
            ConfigError: It is damaged.
        """
        self.worker.flush()
        with reading(checkpoint), torch.no_grad():
            merged = {name: linear for name, linear in apart(self._linears) if linear.is_merged}
            if not self._job.config.keeps_base:
                self._model.load_state_dict(self._files.load(checkpoint).state_dict())
            else:
                if merged:
                    base = self._files.load(self._job.model_folder)
                    for name, linear in merged.items():
                        linear.weight.copy_(base.get_parameter(f"{name}.weight"))
                load_trained(self.worker.units, checkpoint / TRAINED)
            if self._linears:
                sizes = {name: module.projector.sizes for name, module in self._linears}
                take_projectors(self._linears, load_projectors(checkpoint / STATE / FILE_NAME, sizes, field=FIELD))

    def abandon(self, error: LspRayError) -> None:
        """See `DeviceWorker.abandon`."""
        if self._is_set_up:
            self.worker.abandon(error)

    def close(self) -> None:
        """See `DeviceWorker.close`."""
        if self._is_set_up:
            self.worker.close()
        else:
            for moved in self._moved:
                moved.close()
        if self._compiled is not None:
            self._compiled.close()

    def save(self, folder: Path) -> None:
        """Write the model with every delta added, and the projectors or adapters beside it.

        Raises:
            CheckpointError: It cannot be written.
        """
        self.worker.flush()
        with writing(folder):
            self._files.save(folder, self._model, self._tokenizer, self._adapters, self._linears)
            self._files.save_delta(folder, self._model, self.worker.units, self._linears)
            self._files.save_beginning(folder, self.worker.units, self._linears)

    def save_state(self, folder: Path) -> None:
        """Between two steps: write this side's part of a checkpoint, see `runtime.checkpoints.checkpoint`.

        Raises:
            CheckpointError: It cannot be written.
        """
        kept_back = self.worker.settle()
        state = folder / STATE
        with writing(folder):
            self._files.save(folder, self._model, self._tokenizer, self._adapters, self._linears, is_checkpoint=True)
            save_linears(state, self._linears)
            if isinstance(self._refitter, Refitter):
                save_refits(state, self._refitter.state())
            if self._local_shard is not None:
                save_moments(state / "moments-0.safetensors", self._local_shard.states)
            if isinstance(self._local_shard, GaloreShard):
                self._local_shard.save_bases(state / _BASES)
            if self._job.config.keeps_base:
                save_trained(self.worker.units, folder / TRAINED)
            save_kept_back(state, kept_back)

    def _load(self, decided: Decided | None) -> None:
        if self._is_loaded:
            return
        torch.set_num_threads(self._job.layout.device_threads)
        self._say("loading the model")
        self._tokenizer = load_tokenizer(self._job.model_folder)
        self._model = self._files.load_base(decided, self.shared)
        self._weights = brought(self._job, self._model, self.backend, self.shared)
        self._model.train()
        fuse_norms(self._model)
        self._tokens = tokens_of(self._model, self._tokenizer)
        if self._job.config.recomputes:
            self._model.activation_checkpointing_enable({"use_reentrant": False})
        self._activations = activations_of(self._job, self._model, self.backend, self._weights)
        for moved in self._moved:
            moved.start()
        self._is_loaded = True

    def _take_up(self, saved: SavedRun | None, decided: Decided | None) -> int:
        """Go on from another GPU's weights or a checkpoint, or begin with what another run trained; returns where."""
        if decided is not None and decided.weights is not None:
            load_trained(self.worker.units, decided.weights)
            self.worker.resume(decided.step, {})
            return decided.step
        if saved is not None:
            self._restore(saved)
        elif self._job.begins_with is not None:
            with damaged_updates(self._job.config.lsp.init_from):
                load_trained(self.worker.units, self._job.begins_with)
        return self._job.first_step

    def _restore(self, saved: SavedRun) -> None:
        with reading(saved.folder):
            if isinstance(self._refitter, Refitter):
                load_refits(saved.state, self._refitter, field=FIELD)
            if self._local_shard is not None:
                load_moments(saved.moments, self._local_shard.states, num_updates=saved.step)
            if isinstance(self._local_shard, GaloreShard):
                self._local_shard.load_bases(saved.state / _BASES)
            if self._job.config.keeps_base:
                load_trained(self.worker.units, saved.folder / TRAINED)
            kept_back = load_kept_back(saved.state, self._job, saved.step)
        self.worker.resume(saved.step, kept_back)

    @property
    def _moved(self) -> Sequence[StreamedWeights | HostActivations]:
        """What crosses the link behind the compute, on threads of its own."""
        return [moved for moved in (self._weights, self._activations) if moved is not None]

    def _say(self, what: str) -> None:
        self.progress = what
