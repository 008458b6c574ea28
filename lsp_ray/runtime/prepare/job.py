"""Job: all that is decided about a run before any actor starts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from lsp_ray.config import BUILT_IN_LENGTH, RunConfig, Task
from lsp_ray.data.chat import template_columns
from lsp_ray.data.dataset import load_rows
from lsp_ray.data.final_numbers import Question, find_questions
from lsp_ray.data.micro_batches import MicroBatches
from lsp_ray.data.paths import absolute_path
from lsp_ray.data.tokenize import LONGEST, TokenizedRows, tokenize_rows
from lsp_ray.device.compiled_blocks import check_compiler
from lsp_ray.errors import ConfigError
from lsp_ray.methods.lsp import projector_sizes
from lsp_ray.models.layers import find_layers
from lsp_ray.models.load import load_config, load_skeleton, load_tokenizer, num_positions
from lsp_ray.models.resolve import resolve_config, resolve_model
from lsp_ray.models.text_reach import unreached_by_text
from lsp_ray.optim.codec import Codec
from lsp_ray.optim.sums import SummedPart
from lsp_ray.runtime.checkpoints.saved_run import FIELD, SavedRun, check_same_run, read_saved_run
from lsp_ray.runtime.prepare.beginning import check_beginning
from lsp_ray.runtime.prepare.device_choice import (
    Device,
    choose_bf16,
    choose_device,
    choose_gpus,
    device_bytes,
    length_multiple,
)
from lsp_ray.runtime.prepare.job_checks import check_method, check_model, check_sizes, with_delta
from lsp_ray.runtime.prepare.job_notes import data_notes, method_notes, model_notes
from lsp_ray.runtime.prepare.layout import Layout, layout_of
from lsp_ray.runtime.prepare.learning_rates import learning_rates
from lsp_ray.runtime.prepare.machines import Machine
from lsp_ray.runtime.prepare.payloads import (
    BlockInputs,
    block_inputs,
    payload_sizes_of,
    room_of,
    streamed_bytes_of,
    sums_of,
)
from lsp_ray.runtime.prepare.sample import sample_of
from lsp_ray.runtime.prepare.weights_home import with_weights
from lsp_ray.runtime.watch.metrics_file import METRICS, read_metrics
from lsp_ray.schedule.delta_room import DeltaRoom
from lsp_ray.schedule.policy import POLICIES
from lsp_ray.sim.store import payload_bytes, store_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A validated run. Goes to the GPU actor as it is.

    `payload_sizes` are elements a unit, empty where nothing leaves the device; `sums` their parts where the shards add
    up all updates, None where the device does; `begins_with` is the file of what another run trained that this one
    begins with; `quantized` says that linears of the base are; `streamed_bytes` are those of frozen weights that stay
    in main memory, 0 where they are on the device, and `weight_buffers` the blocks whose weights are then on the device
    at one time; `inputs` are the blocks', None where they do not leave the device; `delta_room` is for what comes up,
    None where all of a step's deltas may wait on the device; `sample_inputs` are a held-out prompt's (a classifier's: a
    whole example's) model inputs, shown with the answer before and after; `questions` are answered in evaluations.
    `unreached` are names of parameters that stay as they are. `saved` is the checkpoint to go on from, see `resumed`.
    """

    config: RunConfig
    model_folder: Path
    task: Task
    label_names: tuple[str, ...]
    num_weights: int
    unreached: frozenset[str]
    device: Device
    dtype: torch.dtype
    micro_batches: MicroBatches
    learning_rates: tuple[float, ...]
    payload_sizes: tuple[int, ...]
    sums: tuple[tuple[SummedPart, ...], ...] | None
    begins_with: Path | None
    delta_room: DeltaRoom | None
    quantized: bool
    streamed_bytes: int
    weight_buffers: int
    inputs: BlockInputs | None
    subspace_dims: dict[str, tuple[int, int]]
    layout: Layout
    sample_inputs: dict[str, list[int]]
    sample_expected: str
    questions: tuple[Question, ...]
    saved: SavedRun | None = None

    @property
    def first_step(self) -> int:
        """The first update to make, counted from 0."""
        return self.saved.step if self.saved else 0

    @property
    def num_steps(self) -> int:
        """Optimizer updates."""
        return len(self.learning_rates)

    @property
    def is_regression(self) -> bool:
        """Whether the model's only output is to be near a number."""
        return self.task == "sequence_classification" and len(self.label_names) == 1

    @property
    def data_digest(self) -> str:
        """See `MicroBatches.digest`."""
        return self.micro_batches.digest()

    @property
    def codec(self) -> Codec:
        """Of what crosses the link."""
        return Codec(self.config.runtime.payload_dtype)

    @property
    def bytes_each_way(self) -> int:
        """What crosses the link in a step, down and up alike."""
        return sum(payload_bytes(numel, self.codec.payload_dtype) for numel in self.payload_sizes)

    @property
    def speculates(self) -> bool:
        """Whether updates may have to be made again once all gradients of their step are known."""
        return bool(self.payload_sizes) and (self.config.max_grad_norm > 0 or self.config.on_nonfinite == "skip")

    @property
    def staleness(self) -> int:
        """Steps by which deltas are late on purpose; see `Policy`."""
        return POLICIES[self.config.policy].staleness if self.payload_sizes else 0

    @property
    def gives_back(self) -> bool:
        """Whether updates begin with what they can give back of the base's rounding; to 8 bits that is too little."""
        config = self.config
        return config.method == "lsp" and config.load_in_4bit and self.begins_with is None and self.saved is None

    @property
    def begins_with_updates(self) -> bool:
        """Whether the sums of updates are not zero before the first one."""
        return self.begins_with is not None or self.gives_back

    @property
    def measured_step(self) -> int:
        """The step over which device memory is measured: the second, which has deltas to add, if there is one."""
        return min(1, self.num_steps - 1)

    @property
    def store_bytes(self) -> int:
        """Shared memory that Ray's object store needs: all slots, and some to spare."""
        return store_bytes(
            self.payload_sizes,
            self.layout.shard_of_unit,
            speculates=self.speculates,
            payload_dtype=self.codec.payload_dtype,
            summed=self.sums is not None,
            num_parts=self.config.replicas,
        )

    @property
    def device_limit_bytes(self) -> int | None:
        """Of the device's memory that a GPU actor may take; None: all there is."""
        asked_gb = self.config.runtime.device_memory_gb
        return None if asked_gb is None else int(asked_gb * 1e9)

    @property
    def has_parts_to_divide(self) -> bool:
        """Whether GPUs may compute unlike many parts of a step; an emulated machine's are all alike."""
        return 1 < self.layout.num_gpus < self.config.replicas and self.config.runtime.emulate is None

    def with_parts(self, gpu_of_part: tuple[int, ...]) -> Job:
        """The run with the parts of a step divided so among the GPUs; its results do not depend on that."""
        return replace(self, layout=replace(self.layout, gpu_of_part=gpu_of_part))

    @property
    def resolved_config(self) -> RunConfig:
        """The run's configuration with every default decided."""
        runtime = replace(
            self.config.runtime,
            num_shards=-(-self.layout.num_shards // len(self.layout.homes)) or None,  # native has none
            policy=self.config.policy,
            device=self.device,
            num_gpus="auto",  # free: another machine has as many as it has
            device_threads=self.layout.device_threads,
            shard_threads=self.layout.shard_threads,
            cuda_graphs=self.config.uses_graphs,
        )
        return replace(
            self.config,
            model_name_or_path=absolute_path(self.config.model_name_or_path),
            dataset=absolute_path(self.config.dataset),
            max_steps=self.config.steps,
            num_train_epochs=self.config.epochs,
            bf16=self.dtype == torch.bfloat16,
            runtime=runtime,
        )


def prepare_job(
    config: RunConfig,
    note: Callable[[str], None],
    rows: TokenizedRows | None = None,
    machines: Sequence[Machine] = (),
) -> Job:
    """Find model and data, check that they and the options fit together, and plan the run.

    Args:
        config: What was asked for.
        note: Told, a line at a time, what a person would want to know.
        rows: What to train on in place of `config.dataset`.
        machines: Of the cluster, the driver's first; none: this one alone.

    Raises:
        ConfigError: Something cannot work.
    """
    if config.lsp.init_from is not None:  # an actor's working directory need not be this process's
        config = replace(config, lsp=replace(config.lsp, init_from=str(Path(config.lsp.init_from).absolute())))
    device = _device(config, machines)
    config = choose_gpus(config, device, note, machines)
    dtype = torch.bfloat16 if choose_bf16(config, device, note, machines) else torch.float32
    asked = load_config(resolve_config(config.model_name_or_path, log=note))  # before its weights are fetched
    config, quantized = with_delta(config, asked, device, note)
    model_folder = resolve_model(config.model_name_or_path, log=note).absolute()
    tokenizer = load_tokenizer(model_folder)
    tokenized = rows or _tokenized(config, tokenizer, num_positions(load_config(model_folder), tokenizer))
    config = _with_length(config, tokenized)
    label_names = tuple(tokenized.label_names)
    skeleton = load_skeleton(model_folder, task=tokenized.task, num_labels=len(label_names))
    check_model(skeleton, model_folder, tokenizer, tokenized, config, dtype)
    unreached = unreached_by_text(skeleton)
    layers = find_layers(skeleton, unreached)
    config, weight_buffers = with_weights(
        config,
        load_config(model_folder),
        skeleton,
        layers,
        device_bytes(config, device),
        note,
        quantized=quantized,
        bf16=dtype == torch.bfloat16,
    )
    check_method(layers, config)
    sizes = projector_sizes(layers, config.lsp) if config.method == "lsp" else {}
    payload_sizes = payload_sizes_of(layers, config, quantized=quantized)
    sums = sums_of(layers, config, quantized=quantized)
    begins_with = None
    if config.method == "lsp" and config.lsp.init_from is not None and config.resume_from_checkpoint is None:
        start = Path(config.lsp.init_from)
        begins_with = check_beginning(start, config.lsp, sizes, sums, model_folder, quantized=quantized, note=note)
    micro_batches = MicroBatches(
        tokenized,
        tokenizer,
        batch_size=config.per_device_train_batch_size,
        accumulation=config.micro_batches_per_step,
        seed=config.seed,
        max_steps=config.steps,
        num_train_epochs=config.epochs,
        max_eval_samples=config.max_eval_samples,
        length_multiple=length_multiple(skeleton, config, device),
        pack_to=config.seq_length if config.packing else None,
        groups_by_length=config.train_sampling_strategy == "group_by_length",
    )
    check_sizes(config, micro_batches.num_steps, micro_batches.num_rows)
    for line in (
        *model_notes(skeleton, load_config(model_folder), unreached),
        *method_notes(config, layers, sizes),
        *data_notes(tokenized, config, micro_batches.num_steps),
    ):
        note(line)
    sample_inputs, sample_expected = sample_of(tokenized, tokenizer)
    return Job(
        config=config,
        model_folder=model_folder,
        task=tokenized.task,
        label_names=label_names,
        num_weights=sum(parameter.numel() for parameter in skeleton.parameters()),
        unreached=unreached,
        device=device,
        dtype=dtype,
        micro_batches=micro_batches,
        learning_rates=learning_rates(config, micro_batches.num_steps),
        payload_sizes=tuple(payload_sizes),
        sums=sums,
        begins_with=begins_with,
        delta_room=room_of(layers, payload_sizes, config),
        quantized=quantized,
        streamed_bytes=streamed_bytes_of(skeleton, layers, config, dtype, quantized=quantized),
        weight_buffers=weight_buffers,
        inputs=block_inputs(skeleton, layers, config, micro_batches, dtype) if config.parks_inputs else None,
        subspace_dims={name: size.dims for name, size in sizes.items()},
        layout=layout_of(config, payload_sizes, machines, on_gpu=device == "cuda"),
        sample_inputs=sample_inputs,
        sample_expected=sample_expected,
        questions=tuple(find_questions(tokenized, tokenizer, config.max_eval_answers)),
    )


def _device(config: RunConfig, machines: Sequence[Machine]) -> Device:
    device = choose_device(config, machines)
    if config.torch_compile:
        check_compiler(device)
    return device


def _tokenized(config: RunConfig, tokenizer: PreTrainedTokenizerBase, positions: int) -> TokenizedRows:
    rows = load_rows(config.dataset, seed=config.seed, template_columns=template_columns(tokenizer))
    longest = min(LONGEST, positions)
    return tokenize_rows(rows, tokenizer, max_seq_length=config.asked_length, longest=longest)


def _with_length(config: RunConfig, tokenized: TokenizedRows) -> RunConfig:
    """The run with the length that was decided; that of rows that were given matters for nothing but answers."""
    return replace(config, max_seq_length=config.asked_length or tokenized.max_seq_length or BUILT_IN_LENGTH)


def laid_out(job: Job, machines: Sequence[Machine]) -> Job:
    """Return the job for what is left of its cluster; what it computes does not depend on that."""
    num_gpus = job.layout.num_gpus
    if job.device == "cuda":
        num_gpus = min(num_gpus, max(1, sum(machine.num_gpus for machine in machines)))
    config = replace(job.config, runtime=replace(job.config.runtime, num_gpus=num_gpus))
    layout = layout_of(config, job.payload_sizes, machines, on_gpu=job.device == "cuda")
    return replace(job, config=config, layout=layout)


def resumed(job: Job, folder: Path) -> Job:
    """Return the job from a checkpoint of it on.

    Raises:
        ConfigError: The checkpoint is not whole, or the job differs from the one that wrote it; or all steps are made
            and their metrics lost.
    """
    saved = read_saved_run(folder)
    config = json.loads(json.dumps(asdict(job.resolved_config)))  # as a file holds it
    check_same_run(saved, config, device=job.device, staleness=job.staleness, digest=job.data_digest)
    if saved.step > job.num_steps:
        raise ConfigError(FIELD, f"be of at most {job.num_steps} steps", str(folder))
    if saved.step == job.num_steps and not any(read_metrics(folder.parent / METRICS, saved.step)):
        bound = f"have its run's {METRICS} beside it, as no step is left to measure"
        raise ConfigError(FIELD, bound, str(folder), hint="it holds the trained model already")
    return replace(job, saved=saved, begins_with=None)
