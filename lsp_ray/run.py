"""`python -m lsp_ray.run`: fine-tune a model, from options to checkpoint."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from lsp_ray.config import RunConfig
from lsp_ray.errors import ConfigError, LspRayError

if TYPE_CHECKING:  # --help and a wrong option are answered before torch and ray are imported
    from lsp_ray.report.progress import Progress
    from lsp_ray.runtime.cluster import ClusterInfo
    from lsp_ray.runtime.job import Job

DEFAULT_OUTPUT = "lsp_output"
_SWITCHES = ("--bf16", "--gradient_checkpointing", "--lsp.whiten", "--runtime.dashboard")
_TYPE_ERROR = re.compile(r'Parser key "(?P<field>[^"]+)": Expected an? (?P<type>.+)\. Got value: (?P<value>.*)')


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for what a person can mend, 1 for what failed underway."""
    try:
        config = _parse(sys.argv[1:] if argv is None else argv)
        _fine_tune(config)
    except ConfigError as error:
        return _fail(f"error: {error}", 2)
    except LspRayError as error:
        return _fail(f"failed: {error}", 1)
    except KeyboardInterrupt:
        return _fail("stopped: no checkpoint was written", 130)
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
    except argparse.ArgumentError as error:
        raise _config_error(" ".join(str(error).split())) from error
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


def _config_error(message: str) -> ConfigError:
    """Say what jsonargparse found in the words of every other error."""
    found = _TYPE_ERROR.match(message)
    if found is None:
        return ConfigError("options", "be those that --help lists", message)
    wanted = found["type"].replace("typing.", "").replace("<class '", "").replace("'>", "")
    choices = re.fullmatch(r"Literal\[(.*)\]", wanted)
    return ConfigError(found["field"], f"be one of {choices[1]}" if choices else f"be {wanted}", found["value"])


def _fine_tune(config: RunConfig) -> None:
    output_dir = _output_dir(config.output_dir)
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
        _write_config(output_dir, job)
        progress.note(_plan_line(job))
        progress.phase("starting Ray")
        with ray_cluster(
            num_actors=1 + job.layout.num_shards,
            num_gpus=int(job.device == "cuda"),
            slot_bytes=job.slot_bytes,
            dashboard=config.runtime.dashboard,
        ) as cluster:
            _note_dashboard(cluster, progress)
            workers = RayWorkers(job)
            try:
                summary = fine_tune(job, workers, output_dir, progress, _decoder(job))
            finally:
                workers.close()
        progress.note(
            f"done: eval loss {summary.eval_loss_before:.4f} → {summary.eval_loss_after:.4f}, "
            f"{summary.step_time_s_median:.2f} s a step, {summary.overlap_fraction:.1%} overlapped; "
            f"checkpoint, metrics and summary are in {output_dir}"
        )


def _output_dir(asked: str | None) -> Path:
    """Return a folder that is new or empty: a run never writes over another one's results.

    Without a wish it is lsp_output, or lsp_output-2, lsp_output-3 … where that has content.

    Raises:
        ConfigError: The folder asked for has content or cannot be written.
    """
    if asked is None:
        numbered = (DEFAULT_OUTPUT if number == 1 else f"{DEFAULT_OUTPUT}-{number}" for number in count(1))
        return next(path for path in map(Path, numbered) if _is_free(path))
    path = Path(asked)
    if not _is_free(path):
        raise ConfigError("output_dir", "be a new or empty folder, so that nothing is overwritten", asked)
    nearest = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError("output_dir", f"be writable; {nearest} is not", asked)
    return path


def _is_free(path: Path) -> bool:
    return not os.path.lexists(path) or (path.is_dir() and not any(path.iterdir()))


def _write_config(output_dir: Path, job: Job) -> None:
    """Make the folder and leave in it what the run is, with every default filled in: `--config` repeats it."""
    resolved = asdict(job.resolved_config(str(output_dir)))
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / "config.yaml").write_text(yaml.safe_dump(resolved, sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise ConfigError("output_dir", f"be writable ({error.strerror})", str(output_dir)) from error


def _plan_line(job: Job) -> str:
    layout, config = job.layout, job.config
    parts = [f"plan: {config.method} on {job.device}, {str(job.dtype).removeprefix('torch.')}"]
    if job.subspace_dims:
        dims = sorted(set(job.subspace_dims.values()), reverse=True)
        parts.append(f"{len(job.subspace_dims)} projected matrices with d = {', '.join(map(str, dims))}")
    parts.append(f"{job.num_steps} steps of {config.per_device_train_batch_size * config.gradient_accumulation_steps}")
    if job.payload_sizes:
        parts.append(f"{4 * sum(job.payload_sizes) / 1e6:.1f} MB each way a step")
        parts.append(f"{layout.num_shards} shard(s) × {layout.shard_threads} thread(s)")
        parts.append(f"policy {config.policy}")
    parts.append(f"{layout.device_threads} device thread(s)")
    return ", ".join(parts)


def _note_dashboard(cluster: ClusterInfo, progress: Progress) -> None:
    if cluster.dashboard_url:
        progress.note(f"dashboard: {cluster.dashboard_url} (it asks for the token in {cluster.token_path})")


def _decoder(job: Job) -> Callable[[Sequence[int]], str]:
    """Turn a sample's tokens, or its label, into one line of text."""
    if job.task == "sequence_classification":
        return lambda labels: job.label_names[labels[0]]
    from lsp_ray.models.load import load_tokenizer

    tokenizer = load_tokenizer(job.model_folder)
    return lambda ids: repr(tokenizer.decode(list(ids), skip_special_tokens=True))


def _fail(line: str, code: int) -> int:
    print(line, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
