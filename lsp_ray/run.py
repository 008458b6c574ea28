"""`python -m lsp_ray.run`: fine-tune a model, from options to checkpoint."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from itertools import count, pairwise
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, Self, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from lsp_ray.config import RunConfig
from lsp_ray.errors import ConfigError, LspRayError

if TYPE_CHECKING:  # --help and a wrong option are answered before torch and ray are imported
    from lsp_ray.report.progress import Progress
    from lsp_ray.runtime.cluster import ClusterInfo
    from lsp_ray.runtime.job import Job

DEFAULT_OUTPUT = "lsp_output"
_SWITCHES = ("--bf16", "--gradient_checkpointing", "--lsp.balance", "--lsp.whiten", "--runtime.dashboard")
_PARSER_KEY = re.compile(r'Parser key "(?P<field>[^"]+)":.*?(?:Got|Given) value:\s*(?P<value>.*?)\s*(?:Subtypes.*|$)')
_WORDS = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "text"}


class _Sigterm:
    """Within the context SIGTERM ends a run as Ctrl-C does, and `received` tells which of the two it was.

    The exception alone cannot tell: Ray passes on a plain KeyboardInterrupt, whatever a handler raised while it waited.
    """

    def __init__(self) -> None:
        self.received = False

    def __enter__(self) -> Self:
        self._before = signal.getsignal(signal.SIGTERM)
        self.take()
        return self

    def __exit__(self, *_error: object) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._before)

    def take(self) -> None:
        """Set the handler; once more after Ray's start, as Ray sets one of its own."""

        def interrupt(_number: int, _frame: object) -> None:
            self.received = True
            raise KeyboardInterrupt

        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, interrupt)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for what a person can mend, 1 for what failed underway."""
    with _Sigterm() as sigterm:
        try:
            _fine_tune(_parse(sys.argv[1:] if argv is None else argv), sigterm)
        except ConfigError as error:
            return _fail(f"error: {error}", 2)
        except LspRayError as error:
            return _fail(f"failed: {error}", 1)
        except KeyboardInterrupt:
            ending, code = ("terminated", 143) if sigterm.received else ("stopped", 130)
            return _fail(f"{ending}: no checkpoint was written", code)
    return 0


def _parse(argv: Sequence[str]) -> RunConfig:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)  # the text under each field is its help
    parser = ArgumentParser(
        prog="python -m lsp_ray.run",
        description="Fine-tune a language model on the GPU you own: sparse projectors, offloaded optimizer.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these options; later options win.")
    parser.add_class_arguments(RunConfig)
    try:
        namespace = parser.parse_args(_with_switch_values(argv))
    except (argparse.ArgumentError, UnicodeDecodeError, OSError) as error:
        raise _config_error(" ".join(str(error).split()), argv) from error
    values = dict(parser.instantiate(namespace))
    values.pop("config")
    return RunConfig(**values)


def _with_switch_values(argv: Sequence[str]) -> list[str]:
    """Let `--bf16` alone mean `--bf16 true`, as everywhere else."""
    completed: list[str] = []
    for position, argument in enumerate(argv):
        completed.append(argument)
        following = argv[position + 1] if position + 1 < len(argv) else "--"
        if argument in _SWITCHES and following.startswith("--"):
            completed.append("true")
    return completed


def _config_error(message: str, argv: Sequence[str]) -> ConfigError:
    """Say what jsonargparse found in the words of every other error."""
    found = _PARSER_KEY.search(message)
    if found is not None and (hint := _hint(found["field"])) is not None:
        return ConfigError(found["field"], f"be {_in_words(hint)}", found["value"])
    named = next((value for option, value in pairwise([*argv, ""]) if option == "--config"), None)
    unknown = re.search(r"unrecognized arguments: (.*)", message)
    if unknown is None and named is not None:
        return ConfigError("config", "be a readable YAML file of the options that --help lists", named, hint=message)
    return ConfigError("options", "be those that --help lists", unknown[1] if unknown else message)


def _hint(field: str) -> Any:
    """The annotation of a (nested) option, or None."""
    owner: Any = RunConfig
    for part in field.split("."):
        hints = get_type_hints(owner) if is_dataclass(owner) else {}
        owner = hints.get(part)
    return owner


def _in_words(hint: Any) -> str:
    """What a person may give for an annotation."""
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    kinds = [kind for kind in get_args(hint) if kind is not NoneType] or [hint]
    return " or ".join(
        _in_words(kind) if get_args(kind) else _WORDS.get(kind.__name__, kind.__name__) for kind in kinds
    )


def _fine_tune(config: RunConfig, sigterm: _Sigterm) -> None:
    with _claimed(config.output_dir) as output_dir:
        from lsp_ray.report.progress import Progress
        from lsp_ray.runtime.cluster import ray_cluster
        from lsp_ray.runtime.fine_tune import fine_tune
        from lsp_ray.runtime.job import check_memory, prepare_job
        from lsp_ray.runtime.ray_workers import RayWorkers

        with Progress() as progress:
            progress.phase("preparing model and data")
            job = prepare_job(config, progress.note)
            check_memory(job)
            progress.total_steps = job.num_steps
            progress.note(_plan_line(job))
            progress.phase("starting Ray")
            with ray_cluster(
                num_actors=1 + job.layout.num_shards,
                num_gpus=int(job.device == "cuda"),
                store_bytes=job.store_bytes,
                dashboard=config.runtime.dashboard,
            ) as cluster:
                sigterm.take()
                _note_dashboard(cluster, progress)
                workers = RayWorkers(job)
                try:
                    _write_config(output_dir, job)
                    summary = fine_tune(job, workers, output_dir, progress, _decoder(job))
                finally:
                    workers.close()
            progress.note(
                f"done: eval loss {summary.eval_loss_before:.4f} → {summary.eval_loss_after:.4f}, "
                f"{summary.step_time_s_median:.2f} s a step, {summary.overlap_fraction:.1%} overlapped; "
                f"checkpoint, metrics and summary are in {output_dir}"
            )


@contextmanager
def _claimed(asked: str | None) -> Iterator[Path]:
    """Make the output folder, which must be new or empty: a run never writes over another one's results.

    Without a wish it is lsp_output, or lsp_output-2, lsp_output-3 … where that has content. A run that ends before its
    first step leaves nothing behind.

    Raises:
        ConfigError: The folder asked for has content or cannot be written.
    """
    path = _first_free() if asked is None else Path(asked)
    if not _is_free(path):
        bound = (
            "be a new or empty folder, so that nothing is overwritten" if path.is_dir() else "be a folder, not a file"
        )
        raise ConfigError("output_dir", bound, str(path))
    existed = path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.yaml").touch()
    except OSError as error:
        raise ConfigError("output_dir", f"be writable ({error.strerror})", str(path)) from error
    try:
        yield path
    except BaseException:
        metrics = path / "metrics.jsonl"
        if not metrics.exists() or metrics.stat().st_size == 0:
            for name in ("config.yaml", "metrics.jsonl", "events.jsonl", "trace.json"):
                (path / name).unlink(missing_ok=True)
            if not existed:
                path.rmdir()
        raise


def _first_free() -> Path:
    numbered = (DEFAULT_OUTPUT if number == 1 else f"{DEFAULT_OUTPUT}-{number}" for number in count(1))
    return next(path for path in map(Path, numbered) if _is_free(path))


def _is_free(path: Path) -> bool:
    return not os.path.lexists(path) or (path.is_dir() and not any(path.iterdir()))


def _write_config(output_dir: Path, job: Job) -> None:
    """Leave what the run is, with every default filled in: `--config` repeats it, in a folder of its own."""
    resolved = asdict(job.resolved_config)
    del resolved["output_dir"]
    (output_dir / "config.yaml").write_text(yaml.safe_dump(resolved, sort_keys=False), encoding="utf-8")


def _plan_line(job: Job) -> str:
    layout, config = job.layout, job.config
    parts = [f"plan: {config.method} on {job.device}, {str(job.dtype).removeprefix('torch.')}"]
    if job.subspace_dims:
        dims = sorted(set(job.subspace_dims.values()), reverse=True)
        parts.append(f"{len(job.subspace_dims)} projected matrices with d = {', '.join(map(str, dims))}")
    parts.append(f"{job.num_steps} steps of {config.per_device_train_batch_size * config.gradient_accumulation_steps}")
    if job.payload_sizes:
        parts.append(f"{_size(4 * sum(job.payload_sizes))} each way a step")
        parts.append(f"{layout.num_shards} shard(s) × {layout.shard_threads} thread(s)")
        parts.append(f"policy {config.policy}")
    parts.append(f"{layout.device_threads} device thread(s)")
    return ", ".join(parts)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:.1f} kB"


def _note_dashboard(cluster: ClusterInfo, progress: Progress) -> None:
    if cluster.dashboard_url:
        progress.note(f"dashboard: {cluster.dashboard_url} (it asks for the token in {cluster.token_path})")


def _decoder(job: Job) -> Callable[[Sequence[int]], str]:
    """Turn a sample's tokens, or its label, into one line of text."""
    if job.task == "sequence_classification":
        return lambda labels: f"label {job.label_names[labels[0]]}"
    from lsp_ray.models.load import load_tokenizer

    tokenizer = load_tokenizer(job.model_folder)
    return lambda ids: repr(tokenizer.decode(list(ids), skip_special_tokens=True))


def _fail(line: str, code: int) -> int:
    print(line, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
