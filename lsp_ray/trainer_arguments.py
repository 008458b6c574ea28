"""transformers' TrainingArguments as a RunConfig: every field is followed, or refused or warned of by its name."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields, replace
from typing import Any, cast, get_args

from transformers import TrainingArguments

from lsp_ray.config import LspConfig, Method, ReportTo, RunConfig, RuntimeConfig, SamplingStrategy, SchedulerType
from lsp_ray.errors import ConfigError

GIVEN = "(rows given to LSPTrainer)"
NEVER_LOGGED = 10**9

_SHARED = (
    *("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate"),
    *("weight_decay", "seed", "max_grad_norm", "save_total_limit", "torch_compile", "train_sampling_strategy"),
)
_FOLLOWED = {
    *_SHARED,
    *("output_dir", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "bf16", "activation_checkpointing"),
    *("gradient_checkpointing", "report_to", "logging_strategy", "logging_steps", "eval_strategy", "eval_steps"),
    *("save_strategy", "save_steps", "load_best_model_at_end", "use_cpu", "disable_tqdm", "remove_unused_columns"),
}
# what transformers' Trainer does not read itself, or what a run does anyway
_SCRIPTS_OWN = {"do_train", "do_eval", "do_predict", "resume_from_checkpoint", "local_rank"}
_ALWAYS_SO = {"logging_first_step", "eval_on_start", "full_determinism", "prediction_loss_only"}
_STRATEGIES = get_args(SamplingStrategy)
_ADAMW = ("adamw_torch", "adamw_torch_fused")
_MUST: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "fp16": (lambda value: not value, "be false: weights are float32 or bfloat16"),
    "optim": (lambda value: str(getattr(value, "value", value)) in _ADAMW, f"be one of {', '.join(_ADAMW)}"),
    "adam_beta1": (lambda value: value == 0.9, "be 0.9"),
    "adam_beta2": (lambda value: value == 0.999, "be 0.999"),
    "adam_epsilon": (lambda value: value == 1e-8, "be 1e-8"),
    "optim_args": (lambda value: not value, "be left out"),
    "optim_target_modules": (lambda value: not value, "be left out: all linears of the blocks are projected"),
    "label_smoothing_factor": (lambda value: not value, "be 0"),
    "neftune_noise_alpha": (lambda value: not value, "be left out"),
    "metric_for_best_model": (lambda value: value in (None, "loss", "eval_loss"), "be loss"),
    "greater_is_better": (lambda value: not value, "be false: the lowest loss is the best"),
    "deepspeed": (lambda value: not value, "be left out: one GPU, the state on the CPU already"),
    "fsdp": (lambda value: not value, "be left out: one GPU"),
    "torch_compile_backend": (lambda value: value in (None, "inductor"), "be inductor"),
    "torch_compile_mode": (lambda value: value in (None, "default"), "be left out"),
    "parallelism_config": (lambda value: not value, "be left out: one GPU"),
    "auto_find_batch_size": (lambda value: not value, "be false; `lsp-ray plan` says what fits"),
    "push_to_hub": (lambda value: not value, "be false: nothing leaves the machine"),
    "train_sampling_strategy": (lambda value: value in _STRATEGIES, f"be one of {', '.join(_STRATEGIES)}"),
}


def run_config_of(
    args: TrainingArguments, method: Method, lsp: LspConfig, runtime: RuntimeConfig, *, num_rows: int
) -> RunConfig:
    """Return the run that the arguments ask for; its model is still open.

    Args:
        args: transformers' own, or a subclass.
        method: See `RunConfig`.
        lsp: The projectors.
        runtime: Actors, threads and schedule.
        num_rows: Of an epoch, for what happens once in each.

    Raises:
        ConfigError: A field asks for what a run cannot do.
    """
    for name, (is_fine, bound) in _MUST.items():
        if hasattr(args, name) and not is_fine(getattr(args, name)):
            raise ConfigError(name, bound, getattr(args, name))
    _warn_of_ignored(args)
    schedule = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    if schedule not in get_args(SchedulerType):
        raise ConfigError("lr_scheduler_type", f"be one of {', '.join(get_args(SchedulerType))}", schedule)
    if args.warmup_steps != int(args.warmup_steps):
        raise ConfigError("warmup_steps", "be a whole number", args.warmup_steps)
    report_to = args.report_to or ["none"]
    if len(report_to) > 1 or report_to[0] not in get_args(ReportTo):
        raise ConfigError("report_to", f"be one of {', '.join(get_args(ReportTo))}", args.report_to)
    per_epoch = math.ceil(num_rows / (args.per_device_train_batch_size * args.gradient_accumulation_steps))
    if args.use_cpu and runtime.device == "auto":
        runtime = replace(runtime, device="cpu")
    return RunConfig(
        dataset=GIVEN,
        output_dir=args.output_dir,
        method=method,
        lr_scheduler_type=cast(SchedulerType, schedule),
        lr_scheduler_kwargs=cast(dict[str, Any] | None, args.lr_scheduler_kwargs) or None,
        warmup_steps=int(args.warmup_steps),
        bf16=True if args.bf16 else None,
        gradient_checkpointing=bool(args.gradient_checkpointing or args.activation_checkpointing),
        report_to=cast(ReportTo, report_to[0]),
        logging_steps=_every(args, "logging", args.logging_steps, per_epoch) or NEVER_LOGGED,
        eval_steps=_every(args, "eval", args.eval_steps or args.logging_steps, per_epoch),
        save_steps=_every(args, "save", args.save_steps, per_epoch),
        load_best_model_at_end=args.load_best_model_at_end,
        lsp=lsp,
        runtime=runtime,
        **{name: getattr(args, name) for name in _SHARED if name != "num_train_epochs" or args.max_steps < 1},
    )


def _every(args: TrainingArguments, what: str, steps: float, per_epoch: int) -> int:
    """Steps between two loggings, evaluations or checkpoints; 0: none."""
    strategy = str(getattr(args, f"{what}_strategy").value)
    if strategy not in ("no", "steps", "epoch"):
        raise ConfigError(f"{what}_strategy", "be one of no, steps, epoch", strategy)
    if strategy == "no":
        return 0
    if strategy == "epoch":
        return per_epoch
    if steps < 1:  # a share of all steps
        total = args.max_steps if args.max_steps > 0 else math.ceil(per_epoch * args.num_train_epochs)
        return max(1, math.ceil(total * steps))
    return int(steps)


def _warn_of_ignored(args: TrainingArguments) -> None:
    ignored = ignored_fields(args)
    if ignored:
        warnings.warn(f"LSPTrainer does not follow these TrainingArguments: {', '.join(ignored)}", stacklevel=5)


def ignored_fields(args: TrainingArguments) -> Sequence[str]:
    """Fields with another value than their default that a run does not follow."""
    kind = type(args)
    try:
        plain: TrainingArguments = kind(output_dir=args.output_dir, use_cpu=args.use_cpu)
    except (TypeError, ValueError):  # a subclass that cannot do with less
        plain = TrainingArguments(output_dir=args.output_dir, use_cpu=args.use_cpu)
    known = {*_FOLLOWED, *_MUST, *_SCRIPTS_OWN, *_ALWAYS_SO}
    if args.data_seed == args.seed:
        known.add("data_seed")
    found = []
    for field in fields(args):
        default = getattr(plain, field.name, None if field.default is MISSING else field.default)
        if field.name not in known and getattr(args, field.name) != default:
            found.append(field.name)
    return found
