"""The configuration of a run: frozen dataclasses that validate and never change.

Field names are HF TrainingArguments' where it has one. The text under each field is its help on the
command line. What follows from a value is a property; nothing here imports torch or ray.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from lsp_ray.errors import ConfigError
from lsp_ray.hardware import EmulatedMachine

Bits = Literal[4, 8]
Delta = Literal["merged", "apart"]
Fit = Literal["closed_form", "paper", "random"]
Method = Literal["lsp", "zero_offload", "native", "lora", "galore"]
PayloadDtype = Literal["bfloat16", "float32", "int8"]
Task = Literal["causal_lm", "sequence_classification"]
PolicyName = Literal["sequential", "delayed", "layerwise_fcfs", "layerwise", "earliest_deadline"]
ShardNodes = Literal["auto", "driver", "all"]
Weights = Literal["device", "host"]
WeightsAsked = Literal["device", "host", "auto"]
ReportTo = Literal["none", "tensorboard", "wandb"]
SamplingStrategy = Literal["random", "group_by_length"]
SchedulerType = Literal[  # transformers' own, but for the two that look at losses: reduce_lr_on_plateau and greedy
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
]

BUILT_IN_DATASET = "stdlib-docstrings"
BUILT_IN_STEPS, BUILT_IN_LENGTH = 40, 128  # a first run is to be quick

MAX_SEED = 2**32 - 1
MAX_PORT = 2**16 - 1


def _at_least(name: str, value: float | None, bound: float) -> None:
    """Raise ConfigError unless value is None or a finite number ≥ bound."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(name, "be a finite number", value)
    if value is not None and value < bound:
        raise ConfigError(name, f"be at least {bound}", value)


def _above_zero(name: str, value: float | None) -> None:
    """Raise ConfigError unless value is None or a finite number > 0."""
    if value is not None and not (math.isfinite(value) and value > 0):
        raise ConfigError(name, "be above 0", value)


def _check_address(address: str | None) -> None:
    """Raise ConfigError unless it is one that a driver on a machine of the cluster can join."""
    if address is None or address == "auto":
        return
    host, _, port = address.rpartition(":")
    if address.startswith("ray://"):
        hint = "start the run on one of the cluster's machines, with auto"
        raise ConfigError("runtime.address", "be HOST:PORT or auto; Ray's client does not do", address, hint=hint)
    if not host or not port.isdecimal():
        raise ConfigError("runtime.address", "be HOST:PORT or auto", address)


def _no_nulls(config: Any, prefix: str = "") -> None:
    """Raise ConfigError where a field that needs a value has None."""
    for known in fields(config):
        if getattr(config, known.name) is None and "None" not in str(known.type):
            raise ConfigError(prefix + known.name, "have a value", None)


@dataclass(frozen=True, kw_only=True)
class LspConfig:
    """The learned sparse projectors (method lsp)."""

    subspace_dim: int | Literal["auto"] = 256
    """Size d of the (d, d) compressed gradient, for each side at most half of it; auto: largest the link hides."""
    nnz_per_row: int = 8
    """Non-zeros r in every row of a projector; projector memory grows with r, not with d; d is a multiple of r."""
    fit: Fit = "closed_form"
    """How projectors are made: closed_form and paper (its Adam, slow) learn them from gradients, random draws them."""
    balance: bool = True
    """Let closed_form learn projectors that change all rows and columns alike, as full fine-tuning does; more bias."""
    delta: Delta | None = None
    """Whether updates are merged into the weights or kept apart from them; default: merged, apart if quantised."""
    init_from: str | None = None
    """Start with an earlier run's projectors (its folder or lsp_projectors.safetensors); apart, its updates too."""
    calibration_batches: int = 4
    """Micro-batches whose gradients the closed form learns from."""
    timeout_s: float = 2.0
    """Seconds that fit paper may take for each matrix; it ends earlier at max_bias."""
    check_every: int = 100
    """Steps between measurements of bias on a random eighth of the matrices; 0 never measures nor refits."""
    max_bias: float = 0.9
    """Relative bias (at its best scalar) above which a measured matrix's projectors are learned anew."""

    def __post_init__(self) -> None:
        _no_nulls(self, "lsp.")
        if self.subspace_dim != "auto":
            _at_least("lsp.subspace_dim", self.subspace_dim, 1)
        elif self.init_from is not None:
            raise ConfigError("lsp.subspace_dim", "be the number of the run that lsp.init_from names", "auto")
        _at_least("lsp.nnz_per_row", self.nnz_per_row, 1)
        _at_least("lsp.calibration_batches", self.calibration_batches, 1)
        _at_least("lsp.check_every", self.check_every, 0)
        _at_least("lsp.timeout_s", self.timeout_s, 0)
        _at_least("lsp.max_bias", self.max_bias, 0)
        if self.subspace_dim != "auto" and self.nnz_per_row > self.subspace_dim:
            raise ConfigError("lsp.nnz_per_row", f"be at most lsp.subspace_dim ({self.subspace_dim})", self.nnz_per_row)

    @property
    def is_apart(self) -> bool:
        """Whether weights stay as they are, and updates beside them."""
        return self.delta == "apart"

    @property
    def dim(self) -> int:
        """The size d as a number.

        Raises:
            ConfigError: It is still open; `lsp_ray.plan.auto_dim` decides it.
        """
        if self.subspace_dim == "auto":
            raise ConfigError("lsp.subspace_dim", "be a number by now", "auto")
        return self.subspace_dim


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (method lora), named as in PEFT."""

    r: int = 8
    """Rank of the adapters, which stand beside every linear but a classifier's head; method lora."""
    lora_alpha: float = 16.0
    """The adapters' output is multiplied by lora_alpha / r."""

    def __post_init__(self) -> None:
        _no_nulls(self, "lora.")
        _at_least("lora.r", self.r, 1)
        _above_zero("lora.lora_alpha", self.lora_alpha)


@dataclass(frozen=True, kw_only=True)
class GaloreConfig:
    """Gradients projected onto their leading singular vectors (method galore), named and set as in galore-torch."""

    rank: int = 128
    """Dimensions that a gradient's shorter side is projected onto; smaller matrices train whole; method galore."""
    update_proj_gap: int = 200
    """Steps between two singular value decompositions of each matrix's gradient."""
    scale: float = 0.25
    """Factor of the updates of projected matrices."""

    def __post_init__(self) -> None:
        _no_nulls(self, "galore.")
        _at_least("galore.rank", self.rank, 1)
        _at_least("galore.update_proj_gap", self.update_proj_gap, 1)
        _above_zero("galore.scale", self.scale)


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """Actors, threads and schedule."""

    num_shards: int | None = None
    """CPU shard actors that own the optimizer state, of each machine with any; default: 1, from 16 cores on 2."""
    num_gpus: int | Literal["auto"] = "auto"
    """GPUs that compute, lsp and zero_offload alone several; auto: all, at most num_replicas."""
    address: str | None = None
    """Ray cluster whose machines compute, HOST:PORT or auto for the one that runs here; default: this machine alone."""
    policy: PolicyName | None = None
    """Order of transfers and updates; default: layerwise, for zero_offload sequential."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs; auto takes the GPU if there is one."""
    device_threads: int | None = None
    """CPU threads of the GPU actor; default: what the shards leave on a CPU run, else 2."""
    shard_threads: int | None = None
    """CPU threads of each shard; default: what a GPU run leaves, or a quarter of a CPU run's cores, over num_shards."""
    payload_dtype: PayloadDtype = "bfloat16"
    """Type of what crosses the link; int8, a quarter of float32's bytes, is for slow links."""
    cuda_graphs: bool | None = None
    """On a GPU, launch each block's passes as graphs, examples padded to multiples of 64; default: not if compiled."""
    weights: WeightsAsked = "auto"
    """Where frozen weights live; host: main memory, up block by block (lsp, lsp.delta apart); auto: where needed."""
    device_memory_gb: float | None = None
    """Take no more of each device's memory, in gigabytes (10⁹ bytes), also with device cpu; default: all there is."""
    activations: Weights = "device"
    """Where blocks' inputs wait for the backward; host: main memory, with gradient_checkpointing implied."""
    link_gbps: float | None = None
    """Slow the link down to so many gigabytes (10⁹ bytes) a second, in each direction by itself; default: as it is."""
    shard_nodes: ShardNodes = "auto"
    """Of a cluster, the machines that have shards: the driver's alone, or all; auto: all where there are three."""
    network_gbps: float | None = None
    """Slow the network to other machines down to so many gigabytes a second, in each direction; default: as it is."""
    emulate: EmulatedMachine | None = None
    """Slow link and shards down to a machine's proportions to GPU compute (paper, Table 1); measures the compute."""
    dashboard: bool = False
    """Serve Ray's dashboard on 127.0.0.1."""

    def __post_init__(self) -> None:
        _no_nulls(self, "runtime.")
        _at_least("runtime.num_shards", self.num_shards, 1)
        if self.num_gpus != "auto":
            _at_least("runtime.num_gpus", self.num_gpus, 1)
        _at_least("runtime.device_threads", self.device_threads, 1)
        _at_least("runtime.shard_threads", self.shard_threads, 1)
        _above_zero("runtime.device_memory_gb", self.device_memory_gb)
        _above_zero("runtime.link_gbps", self.link_gbps)
        _above_zero("runtime.network_gbps", self.network_gbps)
        _check_address(self.address)
        if self.dashboard and self.address is not None:
            raise ConfigError("runtime.dashboard", "be left out with runtime.address: the cluster has its own", True)
        if self.network_gbps is not None and self.address is None:
            raise ConfigError(
                "runtime.network_gbps", "come with runtime.address: one machine has no network", self.network_gbps
            )
        if self.shard_nodes != "auto" and self.address is None:
            raise ConfigError(
                "runtime.shard_nodes", "come with runtime.address: one machine has all shards", self.shard_nodes
            )
        if self.emulate is not None and self.link_gbps is not None:
            raise ConfigError("runtime.link_gbps", f"be left out where {self.emulate} is emulated", self.link_gbps)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One fine-tuning run."""

    model_name_or_path: str = "smollm2-135m"
    """Alias smollm2-135m or all-minilm-l6-v2 (an encoder), a local folder, a .gguf file or a hub id."""
    dataset: str = BUILT_IN_DATASET
    """stdlib-docstrings, a JSONL, CSV or Parquet file or a folder of them, or a hub id."""
    output_dir: str | None = None
    """New or empty folder for checkpoint, metrics and summary; default: lsp_output, or lsp_output-2 …"""
    method: Method = "lsp"
    """lsp: projected gradients; zero_offload: full gradients to the CPU; native, lora, galore: all on the device."""
    max_steps: int | None = None
    """Optimizer updates; default: as num_train_epochs says, as does -1; 40 of the built-in data set."""
    num_train_epochs: float | None = None
    """Passes over the training data where max_steps is not given; default: 1."""
    per_device_train_batch_size: int = 4
    """Examples in a micro-batch."""
    gradient_accumulation_steps: int = 1
    """Micro-batches in an optimizer update, of each replica."""
    num_replicas: int | None = None
    """Equal parts of an update, each with micro-batches of its own, whichever GPU computes it; default: the GPUs."""
    learning_rate: float = 1e-4
    """Peak learning rate; full fine-tuning's carries over to lsp, for a classifier at most a quarter of it."""
    lr_scheduler_type: SchedulerType = "linear"
    """Shape of the learning rate over the steps, as in transformers.get_scheduler."""
    lr_scheduler_kwargs: dict[str, Any] | None = None
    """What that shape takes besides, such as {"min_lr_rate": 0.1} for cosine_with_min_lr."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices; biases and norms have none."""
    max_grad_norm: float = 0.0
    """Clip what is sent (for lsp: compressed gradients) to this global norm, exactly; 0 (not HF's 1.0) never clips."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """At a loss or gradient of NaN or infinity: stop, or skip the step, so that no weight nor moment changes."""
    max_seq_length: int | None = None
    """Tokens kept of an example; default: what 99 % of them have, at most 1024; 128 of the built-in data set."""
    packing: bool = False
    """Join training examples up to max_seq_length, none seen by another: less padding; a batch counts joined ones."""
    train_sampling_strategy: SamplingStrategy = "random"
    """Order of training examples; group_by_length: those of an update are of like length, so that less is padding."""
    max_eval_samples: int = 128
    """Held-out examples on which eval loss is measured."""
    eval_steps: int = 0
    """Steps between measurements of eval loss while training, whose time is not counted; 0: only before and after."""
    load_best_model_at_end: bool = False
    """End with the weights of the lowest eval loss (eval_steps), not the last; their checkpoint is kept."""
    early_stopping_patience: int | None = None
    """End after so many measurements of eval loss (eval_steps) without a lower one; default: train to the end."""
    max_eval_answers: int = 0
    """Held-out questions answered to compare the final number, after ####, with the data's (as GSM8K has it); slow."""
    seed: int = 42
    """Seed of data order, projectors and rounding."""
    bf16: bool | None = None
    """Weights and activations in bfloat16; default: where the GPU or CPU is fast at it."""
    load_in_4bit: bool = False
    """Quantise the blocks' linears to 4 bits (NF4 of bitsandbytes): lsp keeps its updates apart, lora is QLoRA."""
    load_in_8bit: bool = False
    """The same to 8 bits (LLM.int8 of bitsandbytes)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more compute."""
    torch_compile: bool = False
    """Compile each block when it first runs, which takes long: fewer, larger kernels; excludes runtime.cuda_graphs."""
    save_steps: int = 500
    """Steps between checkpoints (checkpoint-N in output_dir), from which a run can go on; Ctrl-C saves in any case."""
    save_minutes: float = 10.0
    """Minutes between checkpoints where save_steps would be later; 0 for either leaves it to the other."""
    logging_steps: int = 1
    """Steps between lines of progress in a log file; metrics.jsonl has every step."""
    save_total_limit: int | None = 2
    """Checkpoints kept, the newest ones; null keeps all."""
    resume_from_checkpoint: str | None = None
    """Go on from a checkpoint-N folder, or from the last one in output_dir, to the same result as without the break."""
    report_to: ReportTo = "none"
    """Where metrics go beside metrics.jsonl: tensorboard (files in output_dir) or wandb; installed by you."""
    report_port: int | None = None
    """Serve the run's report page on 127.0.0.1 while it trains, at this port; 0: any free one, which is printed."""
    lsp: LspConfig = field(default_factory=LspConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    galore: GaloreConfig = field(default_factory=GaloreConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def __post_init__(self) -> None:
        _no_nulls(self)
        for name in (
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "num_replicas",
            "max_eval_samples",
        ):
            _at_least(name, getattr(self, name), 1)
        _at_least("max_seq_length", self.max_seq_length, 8)
        for name in ("save_total_limit", "early_stopping_patience", "logging_steps"):
            _at_least(name, getattr(self, name), 1)
        for name in (
            "learning_rate",
            "weight_decay",
            "max_grad_norm",
            "warmup_steps",
            "save_steps",
            "save_minutes",
            "seed",
            "eval_steps",
            "max_eval_answers",
            "report_port",
        ):
            _at_least(name, getattr(self, name), 0)
        for name in ("model_name_or_path", "dataset", "output_dir", "resume_from_checkpoint"):
            if getattr(self, name) == "":
                raise ConfigError(name, "name one", "")
        if self.report_port is not None and self.report_port > MAX_PORT:
            raise ConfigError("report_port", f"be at most {MAX_PORT}", self.report_port)
        if self.seed > MAX_SEED:
            raise ConfigError("seed", f"be at most {MAX_SEED}", self.seed)
        self._check_quantized()
        self._check_weights()
        self._check_places()
        self._check_combinations()

    def _check_quantized(self) -> None:
        if self.load_in_4bit and self.load_in_8bit:
            raise ConfigError("load_in_8bit", "be left out beside load_in_4bit", True)
        if self.bits is None:
            return
        field = f"load_in_{self.bits}bit"
        if self.method not in ("lsp", "lora"):
            raise ConfigError(
                "method", f"be lsp or lora with {field}, as quantised weights stay as they are", self.method
            )
        if self.lsp.delta == "merged":
            raise ConfigError("lsp.delta", f"be apart with {field}, as quantised weights stay as they are", "merged")

    def _check_weights(self) -> None:
        if not self.streams:
            return
        name, value = "runtime.weights", self.runtime.weights
        if self.method != "lsp":
            raise ConfigError(name, f"be device with method {self.method}; lsp alone brings weights up", value)
        if self.lsp.delta == "merged":
            raise ConfigError(
                "lsp.delta", "be apart with runtime.weights host, as those weights never change", "merged"
            )
        if self.load_in_8bit:
            raise ConfigError(
                name, "be device with load_in_8bit; weights in 4 bits, or as they are, can be host", value
            )

    def _check_places(self) -> None:
        for option, is_on in (("torch_compile", self.torch_compile), ("runtime.cuda_graphs", self.runtime.cuda_graphs)):
            if is_on and self.streams:
                raise ConfigError(option, "be false with runtime.weights host, as weights change their place", True)
            if is_on and self.parks_inputs:
                raise ConfigError(option, "be false with runtime.activations host, as blocks' inputs come and go", True)

    def _check_combinations(self) -> None:
        if self.max_steps is not None and self.max_steps < 1 and self.max_steps != -1:
            raise ConfigError("max_steps", "be at least 1, or -1 to train num_train_epochs", self.max_steps)
        _above_zero("num_train_epochs", self.num_train_epochs)
        if self.torch_compile and self.runtime.cuda_graphs:
            raise ConfigError("runtime.cuda_graphs", "be false or left out with torch_compile", True)
        if self.packing and self.train_sampling_strategy != "random":
            bound = "be random with packing, whose rows are all of one length"
            raise ConfigError("train_sampling_strategy", bound, self.train_sampling_strategy)
        shortest = 2 * (self.num_sketched_steps + 1)
        if 0 < self.lsp.check_every < shortest:
            bound = f"be 0 or at least {shortest}, so that a refit ends in time"
            raise ConfigError("lsp.check_every", bound, self.lsp.check_every)
        self._check_replicas()
        self._check_best()

    def _check_replicas(self) -> None:
        num_gpus = 1 if self.runtime.num_gpus == "auto" else self.runtime.num_gpus
        if not self.offloads:
            if self.replicas > 1:
                bound = f"be 1 with method {self.method}; gradient_accumulation_steps does the same"
                raise ConfigError("num_replicas", bound, self.num_replicas)
            if num_gpus > 1:
                bound = f"be 1 with method {self.method}, which trains on one GPU; method lsp uses several"
                raise ConfigError("runtime.num_gpus", bound, num_gpus)
            if self.runtime.address is not None:
                bound = f"be left out with method {self.method}, which trains on one GPU; method lsp uses several"
                raise ConfigError("runtime.address", bound, self.runtime.address)
        if self.num_replicas is not None and num_gpus > self.num_replicas:
            bound = f"be at most num_replicas ({self.num_replicas}), as a replica is computed by one GPU"
            raise ConfigError("runtime.num_gpus", bound, num_gpus)

    def _check_best(self) -> None:
        if self.eval_steps == 0 and (self.load_best_model_at_end or self.early_stopping_patience is not None):
            name = "load_best_model_at_end" if self.load_best_model_at_end else "early_stopping_patience"
            raise ConfigError("eval_steps", f"be at least 1 with {name}, which goes by eval loss", self.eval_steps)

    @property
    def replicas(self) -> int:
        """`num_replicas` as a number; 1 until it is decided."""
        return self.num_replicas or 1

    @property
    def micro_batches_per_step(self) -> int:
        """Of all replicas together."""
        return self.gradient_accumulation_steps * self.replicas

    @property
    def examples_per_step(self) -> int:
        """Of all micro-batches together."""
        return self.per_device_train_batch_size * self.micro_batches_per_step

    @property
    def steps(self) -> int:
        """Optimizer updates; -1 where `epochs` decide."""
        if self.max_steps is not None:
            return self.max_steps
        return BUILT_IN_STEPS if self.dataset == BUILT_IN_DATASET and self.num_train_epochs is None else -1

    @property
    def epochs(self) -> float:
        """Passes over the training data where `steps` is -1."""
        return 1.0 if self.num_train_epochs is None else self.num_train_epochs

    @property
    def asked_length(self) -> int | None:
        """Tokens kept of an example; None where the data decide."""
        is_built_in = self.max_seq_length is None and self.dataset == BUILT_IN_DATASET
        return BUILT_IN_LENGTH if is_built_in else self.max_seq_length

    @property
    def seq_length(self) -> int:
        """Tokens kept of an example, as a number.

        Raises:
            ConfigError: It is still open; the data decide it.
        """
        if self.asked_length is None:
            raise ConfigError("max_seq_length", "be a number by now", None)
        return self.asked_length

    @property
    def bits(self) -> Bits | None:
        """To which the blocks' linears are quantised as they are loaded."""
        return 4 if self.load_in_4bit else 8 if self.load_in_8bit else None

    @property
    def keeps_base(self) -> bool:
        """Whether the weights that a run begins with stay as they are, and what it trains beside them."""
        return self.method == "lora" or (self.method == "lsp" and self.lsp.is_apart)

    @property
    def num_sketched_steps(self) -> int:
        """Steps that have as many micro-batches as projectors are learned from."""
        return -(-self.lsp.calibration_batches // self.gradient_accumulation_steps)

    @property
    def offloads(self) -> bool:
        """Whether the optimizer's state is on the CPU, so that gradients and updates cross the link."""
        return self.method in ("lsp", "zero_offload")

    @property
    def uses_graphs(self) -> bool:
        """Whether blocks are launched as CUDA graphs where the model runs on a GPU."""
        asked = self.runtime.cuda_graphs
        return not (self.torch_compile or self.streams or self.parks_inputs) if asked is None else asked

    @property
    def streams(self) -> bool:
        """Whether the blocks' frozen weights come up from main memory."""
        return self.runtime.weights == "host"

    @property
    def parks_inputs(self) -> bool:
        """Whether the blocks' inputs wait in main memory for the backward."""
        return self.runtime.activations == "host"

    @property
    def recomputes(self) -> bool:
        """Whether the backward runs each block's forward again; where weights come up, what it kept would be gone."""
        return self.gradient_checkpointing or self.streams or self.parks_inputs

    @property
    def policy(self) -> PolicyName:
        """The policy asked for, else the method's own."""
        return self.runtime.policy or ("sequential" if self.method == "zero_offload" else "layerwise")
