"""SavedRun: what a checkpoint says about its run, read with suspicion."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError

from lsp_ray.config import RunConfig
from lsp_ray.errors import ConfigError
from lsp_ray.runtime.checkpoints.checkpoint import FACTS, FORMAT, STATE, TRAINED, checkpoints, checksum

FIELD = "resume_from_checkpoint"
LAST = "last"
_MAX_FACTS_BYTES = 64 << 20
_MOMENTS = re.compile(r"moments-\d+\.safetensors")
# what may differ: it decides where and how fast a run computes, not what, or whether it ends early, or who watches it
_FREE = {
    *("output_dir", FIELD, "eval_steps", "save_steps", "save_minutes", "save_total_limit", "runtime", "on_nonfinite"),
    *("report_to", "report_port", "logging_steps", "load_best_model_at_end", "early_stopping_patience"),
}
_PATHS = ("model_name_or_path", "dataset")  # a run's data are compared by their content besides
_GRAPHS = "runtime.cuda_graphs"  # pads batches on a GPU
_BOUND = {"runtime.payload_dtype", _GRAPHS}  # of what is free: they change values


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedRun:
    """A checkpoint's folder, whose files are as they were written, and what its run was until then.

    `step` counts updates; `staleness` is that of its policy; `data_digest` is `Job.data_digest`.
    """

    folder: Path
    step: int
    config: dict[str, Any]
    device: str
    staleness: int
    data_digest: str
    eval_before: dict[str, float]
    sample_before: str
    peak_device_bytes: int | None

    def facts(self) -> dict[str, Any]:
        """What state.json holds of it."""
        facts = asdict(self)
        del facts["folder"], facts["step"]
        return facts

    @property
    def state(self) -> Path:
        """The folder of what Hugging Face's checkpoints have no place for."""
        return self.folder / STATE

    @property
    def moments(self) -> list[Path]:
        """Files with Adam's state, one of each shard of then."""
        return sorted(path for path in self.state.iterdir() if _MOMENTS.fullmatch(path.name))


def find_checkpoint(asked: str, run_folder: Path) -> Path:
    """Return the folder that an option's value names: a path, or `last` for the newest of `run_folder`.

    Raises:
        ConfigError: There is none.
    """
    if asked != LAST:
        return Path(asked).absolute()
    saved = checkpoints(run_folder)
    if not saved:
        raise ConfigError(FIELD, f"name a checkpoint: there is none in {run_folder}", asked)
    return saved[max(saved)].absolute()


def read_saved_run(folder: Path) -> SavedRun:
    """Read and check a checkpoint: every file must have the size and the CRC-32 that it was written with.

    Raises:
        ConfigError: It is no checkpoint, or not whole.
    """
    if not (folder / FACTS).is_file():
        raise ConfigError(FIELD, f"be {LAST} or the checkpoint-N folder of a run, with {FACTS} in it", str(folder))
    with reading(folder):
        if (folder / FACTS).stat().st_size > _MAX_FACTS_BYTES:
            raise ValueError(f"{FACTS} is too large")
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        if not isinstance(facts, dict) or facts.pop("format", None) != FORMAT:
            raise ValueError(f"{FACTS} is not of format {FORMAT}")
        _check_files(folder, facts.pop("files"))
        saved = SavedRun(folder=folder, **facts)
        _check_facts(saved)
    return saved


def with_saved_choices(config: RunConfig, folder: Path) -> RunConfig:
    """Return the run with what was decided for it when the checkpoint was written, where it leaves that open.

    Raises:
        ConfigError: It is no checkpoint, or not whole.
    """
    saved = read_saved_run(folder).config
    with reading(folder):
        if config.lsp.subspace_dim == "auto":
            config = replace(config, lsp=replace(config.lsp, subspace_dim=int(saved["lsp"]["subspace_dim"])))
        if config.bf16 is None:  # is measured, and may come out either way
            config = replace(config, bf16=bool(saved["bf16"]))
        if config.num_replicas is None:  # else as many as there are GPUs
            config = replace(config, num_replicas=int(saved.get("num_replicas") or 1))
        if config.max_seq_length is None:
            config = replace(config, max_seq_length=int(saved["max_seq_length"]))
        if config.max_steps is None and config.num_train_epochs is None:
            config = replace(config, max_steps=int(saved["max_steps"]))
            if config.max_steps == -1:
                config = replace(config, num_train_epochs=float(saved["num_train_epochs"]))
    return config


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Turn whatever a damaged checkpoint makes readers raise into one line."""
    try:
        yield
    except ConfigError:
        raise
    # RuntimeError: torch's
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, SafetensorError) as error:
        line = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConfigError(FIELD, f"hold a whole checkpoint ({line})", str(folder)) from error


def check_same_run(saved: SavedRun, config: Mapping[str, Any], *, device: str, staleness: int, digest: str) -> None:
    """Refuse to go on where the result would not be that of one run.

    Args:
        saved: The run until now.
        config: The run from now on, with every default decided, as nested mappings.
        device: Where it computes.
        staleness: Of its policy.
        digest: See `Job.data_digest`.

    Raises:
        ConfigError: Names the option, what it was, and what it would be.
    """
    without_effect = {
        *(["num_train_epochs"] if config["max_steps"] != -1 else []),
        *([_GRAPHS] if device == "cpu" else []),
    }
    saved_config = dict(_flat(saved.config))
    # of options that there were not when the checkpoint was written
    defaults = dict(_flat(asdict(RunConfig(num_replicas=1))))
    for name, now in _flat(config):
        if name in without_effect:
            continue
        before = saved_config.get(name, defaults.get(name))
        if before != now and not (name in _PATHS and _same_path(before, now)):
            raise ConfigError(name, f"be {before!r} as it was at {saved.folder.name}", now)
    if saved.device != device:
        raise ConfigError("runtime.device", f"be {saved.device!r} as it was at {saved.folder.name}", device)
    if saved.staleness != staleness:
        kind = "delayed" if saved.staleness else "other than delayed"
        raise ConfigError("runtime.policy", f"be {kind} as it was at {saved.folder.name}", config["runtime"]["policy"])
    if saved.data_digest != digest:
        raise ConfigError("dataset", f"have the content that it had at {saved.folder.name}", config["dataset"])


def _same_path(before: Any, now: Any) -> bool:
    """Whether what was given as seen from some folder may be what is now given from the root on."""
    if not isinstance(before, str) or not isinstance(now, str):
        return False
    path = Path(before).expanduser()
    ends = tuple(part for part in path.parts if part != "..")
    return not path.is_absolute() and bool(ends) and Path(now).parts[-len(ends) :] == ends


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for part, value in config.items():
        name = f"{prefix}{part}"
        if isinstance(value, Mapping) and name != "lr_scheduler_kwargs":  # else one that is gone would not be missed
            yield from _flat(value, f"{name}.")
        elif name in _BOUND or name.split(".")[0] not in _FREE:
            yield name, value


def _check_files(folder: Path, files: Any) -> None:
    required = {"config.json", "trainer_state.json"}
    if not isinstance(files, dict) or not required <= set(files):
        raise ValueError(f"{FACTS} does not list its files")
    weights = (name for name in files if "/" not in name or name == TRAINED)
    if not any(name.endswith(".safetensors") for name in weights):
        raise ValueError("it has no weights")
    for name, expected in files.items():
        _check_file(folder, name, expected)
    for index in folder.glob("*.index.json"):
        for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values():
            if name not in files:
                raise ValueError(f"{index.name} names {name!r}")


def _check_file(folder: Path, name: str, expected: Any) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{name!r} is outside of it")
    if not (folder / path).is_file():
        raise ValueError(f"{name} is missing")
    if (folder / path).stat().st_size != expected[0] or checksum(folder / path) != expected:
        raise ValueError(f"{name} is damaged")


def _check_facts(saved: SavedRun) -> None:
    kinds: dict[str, Any] = {
        "step": int,
        "config": dict,
        "device": str,
        "staleness": int,
        "data_digest": str,
        "eval_before": dict,
        "sample_before": str,
        "peak_device_bytes": int | None,
    }
    for name, kind in kinds.items():
        value = getattr(saved, name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{name} is {value!r}")
    if "loss" not in saved.eval_before or not all(isinstance(score, float) for score in saved.eval_before.values()):
        raise ValueError(f"eval_before is {saved.eval_before!r}")
    if saved.step < 1:
        raise ValueError(f"step is {saved.step}")
