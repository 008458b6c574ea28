"""A run from configuration to checkpoint: what the command line and Python's API have in common."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import yaml

from lsp_ray.config import RunConfig
from lsp_ray.errors import ConfigError
from lsp_ray.inputs import check_inputs, check_temp_folder
from lsp_ray.output_folder import claimed
from lsp_ray.process import uncollected
from lsp_ray.report.page import report
from lsp_ray.report.run_folder import REPORT, read_run
from lsp_ray.report.server import report_server
from lsp_ray.runtime.stop_signal import StopSignal
from lsp_ray.runtime.watch.trackers import check_tracker
from lsp_ray.sim.store import size_text

if TYPE_CHECKING:  # --help and a wrong option are answered before torch and ray are imported
    from rich.console import Console

    from lsp_ray.data.tokenize import TokenizedRows
    from lsp_ray.report.progress import Progress
    from lsp_ray.runtime.cluster.nodes import Node
    from lsp_ray.runtime.cluster.private_cluster import ClusterInfo
    from lsp_ray.runtime.fine_tune import Summary
    from lsp_ray.runtime.prepare.job import Job
    from lsp_ray.runtime.prepare.machines import Machine
    from lsp_ray.trace import StepMetrics


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What a run left.

    Attributes:
        output_dir: Holds checkpoint, metrics and summary.
        summary: What summary.json holds.
    """

    output_dir: Path
    summary: Summary


class Follower(Protocol):
    """Who follows a run beside its progress display."""

    def begins(self, num_steps: int, steps_per_epoch: float, first_step: int) -> None:
        """All is decided: so many steps in all, so many an epoch, so many made before."""
        ...

    def step(self, metrics: StepMetrics) -> None:
        """See `Listener`; a step that is made again comes again."""
        ...

    def saved(self, checkpoint: Path) -> None:
        """See `Listener`."""
        ...

    def has_enough(self) -> bool:
        """See `Listener`."""
        ...


class _Followed:
    """The progress display, and who follows besides."""

    def __init__(self, progress: Progress, follower: Follower | None) -> None:
        self.note, self.phase = progress.note, progress.phase
        self._progress, self._follower = progress, follower

    def step(self, metrics: StepMetrics) -> None:
        self._progress.step(metrics)
        if self._follower is not None:
            self._follower.step(metrics)

    def saved(self, checkpoint: Path) -> None:
        if self._follower is not None:
            self._follower.saved(checkpoint)

    def has_enough(self) -> bool:
        return self._follower is not None and self._follower.has_enough()


def run_config(
    config: RunConfig,
    *,
    stop: StopSignal | None = None,
    console: Console | None = None,
    rows: TokenizedRows | None = None,
    follower: Follower | None = None,
) -> RunResult:
    """Fine-tune from configuration to checkpoint.

    Args:
        config: The run.
        stop: Ends it early; default: nothing does.
        console: Where progress is shown; default: standard output.
        rows: What to train on in place of `config.dataset`.
        follower: Told of the run's course.

    Raises:
        LspRayError: Something failed underway; a ConfigError: something cannot work, and nothing was written.
    """
    _check_surroundings(config, with_dataset=rows is None)
    with report_server(config.report_port) as server, claimed(config) as output_dir:
        from lsp_ray.report.progress import Progress

        with Progress(console=console) as progress:
            if server is not None:
                server.serve(output_dir, progress.status)
                progress.note(f"report: {server.url}")
            with _joined(config.runtime.address, progress) as machines:
                progress.phase("preparing model and data")
                with _loading(stop):
                    # what follows takes from them
                    import transformers.optimization  # noqa: F401

                    import lsp_ray.plan.auto_dim
                    import lsp_ray.runtime.prepare.job  # noqa: F401
                job = _prepared(config, rows, output_dir, progress.note, machines)
                _show(job, progress)
                summary = _trained(config, job, output_dir, progress, stop, follower)
            progress.note(_done(job, summary, output_dir, progress.elapsed))
    return RunResult(output_dir=output_dir, summary=summary)


@contextmanager
def _loading(stop: StopSignal | None) -> Iterator[None]:
    with nullcontext() if stop is None else stop.held(), uncollected(is_own=stop is not None):
        yield


def _trained(
    config: RunConfig,
    job: Job,
    output_dir: Path,
    progress: Progress,
    stop: StopSignal | None,
    follower: Follower | None,
) -> Summary:
    """What came of the job, on a Ray of its own or on the cluster that was joined."""
    with _loading(stop):
        from lsp_ray.runtime.actors.ray_workers import RayWorkers
        from lsp_ray.runtime.cluster.nodes import check_nodes, nodes
        from lsp_ray.runtime.cluster.private_cluster import ray_cluster
        from lsp_ray.runtime.persistence import fine_tune_persistently
        from lsp_ray.runtime.prepare.host_memory import check_memory, read_host_memory

    check_memory(job, read_host_memory())
    runtime = job.config.runtime
    is_joined = runtime.address is not None
    places = len(set(job.layout.nodes)) or 1
    progress.phase(f"starting actors on {places} machine(s)" if is_joined else "starting Ray")
    with ray_cluster(
        num_actors=job.layout.num_gpus + job.layout.num_shards,
        num_gpus=job.layout.num_gpus if job.device == "cuda" else 0,
        store_bytes=job.store_bytes,
        dashboard=runtime.dashboard,
    ) as cluster:
        if is_joined:
            there = nodes()
            _check_stores(job, there)
            check_nodes(there, job.model_folder, output_dir.absolute())
        if stop is not None:
            stop.take()
        _note_dashboard(cluster, progress)
        _write_config(output_dir, job, config.runtime.num_gpus)
        if follower is not None:
            follower.begins(job.num_steps, job.micro_batches.steps_per_epoch, job.first_step)
        with _reported(output_dir, progress):
            return fine_tune_persistently(
                job,
                partial(RayWorkers, note=progress.note, shared=output_dir.absolute() if is_joined else None),
                output_dir,
                _Followed(progress, follower),
                _decoder(job),
                stop or StopSignal(),
                _laid_out if is_joined else _as_it_is,
            )


@contextmanager
def _joined(address: str | None, progress: Progress) -> Iterator[Sequence[Machine]]:
    """The machines of the cluster that a run uses; none: it starts a Ray of its own on this one."""
    if address is None:
        yield []
        return
    from lsp_ray.runtime.cluster.joined_cluster import joined_cluster
    from lsp_ray.runtime.cluster.nodes import machines

    progress.phase("joining Ray's cluster")
    with joined_cluster(address) as there:
        found = machines(there)
        names = ", ".join(f"{one.name} ({one.cores} cores, {one.num_gpus} GPUs)" for one in found)
        progress.note(f"cluster: {len(found)} machine(s): {names}")
        yield found


def _laid_out(job: Job) -> Job:
    """The job for the machines that are left of its cluster."""
    from lsp_ray.runtime.cluster.nodes import answering, machines, nodes
    from lsp_ray.runtime.prepare.job import laid_out

    there = answering(nodes())
    job = laid_out(job, machines(there))
    _check_stores(job, there)  # where shards have come to other machines
    return job


def _check_stores(job: Job, there: Sequence[Node]) -> None:
    from lsp_ray.runtime.actors.places import spare_gpus
    from lsp_ray.runtime.cluster.nodes import check_stores
    from lsp_ray.runtime.prepare.host_memory import store_bytes_at

    needed = [
        store_bytes_at(job, node.name, is_own=node.is_own, num_spare_gpus=spare_gpus(job, node)) for node in there
    ]
    check_stores(there, needed)


def _as_it_is(job: Job) -> Job:
    return job


def _check_surroundings(config: RunConfig, *, with_dataset: bool) -> None:
    """Raise ConfigError where something is missing outside of the run; nothing slow is imported."""
    check_inputs(config, with_dataset=with_dataset)
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():  # else the run uses the Ray that this process has started
        check_temp_folder(os.environ, os.getpid())
    check_tracker(config.report_to)


@contextmanager
def _reported(output_dir: Path, progress: Progress) -> Iterator[None]:
    """Leave a report however the run ends, once there is a step to show."""
    try:
        yield
    finally:
        try:
            run = read_run(output_dir)
            if run.steps:
                (output_dir / REPORT).write_text(report([run]), encoding="utf-8")
        except (ConfigError, OSError) as error:
            progress.note(f"no {REPORT}: {error}")


def _done(job: Job, summary: Summary, output_dir: Path, elapsed: str) -> str:
    """The last lines: what came of it, and what to do next."""
    peak = summary.peak_device_bytes
    facts = [
        f"done in {elapsed}: eval {_changes(summary)}",
        f"{summary.step_time_s_median:.2f} s a step",
        *([f"{summary.overlap_fraction:.1%} of it not waiting"] if job.payload_sizes else []),
        *([] if peak is None else [f"peak device memory {peak / 1e9:.2f} GB"]),
        f"everything is in {output_dir}",
    ]
    command, folder = _command(), shlex.quote(str(output_dir))
    following = [f"{command} report {folder}", f"{command} export {folder} {shlex.quote(f'{output_dir}-exported')}"]
    if job.task == "causal_lm":
        following.insert(0, f"{command} chat {folder} --base")
    return "\n".join([", ".join(facts), "next:", *(f"  {line}" for line in following)])


def _command() -> str:
    """How this installation is started from a shell."""
    if shutil.which("lsp-ray"):
        return "lsp-ray"
    beside = Path(sys.executable).with_name("lsp-ray")
    if not beside.exists():
        return f"{shlex.quote(sys.executable)} -m lsp_ray"
    here = Path.cwd()
    return shlex.quote(str(beside.relative_to(here) if beside.is_relative_to(here) else beside))


def _prepared(
    config: RunConfig,
    rows: TokenizedRows | None,
    output_dir: Path,
    note: Callable[[str], None],
    machines: Sequence[Machine],
) -> Job:
    """The job with everything decided, from its checkpoint on if there is one."""
    from lsp_ray.plan.auto_dim import with_subspace_dim
    from lsp_ray.runtime.checkpoints.saved_run import find_checkpoint, with_saved_choices
    from lsp_ray.runtime.cluster.leftovers import clear_leftovers
    from lsp_ray.runtime.prepare.job import prepare_job, resumed

    asked = config.resume_from_checkpoint
    checkpoint = None if asked is None else find_checkpoint(asked, output_dir)
    if checkpoint is not None:
        config = with_saved_choices(config, checkpoint)
    elif rows is None:
        config = with_subspace_dim(config, note, machines)
    job = prepare_job(config, note, rows, machines)
    clear_leftovers(output_dir, note)
    return job if checkpoint is None else resumed(job, checkpoint)


def _write_config(output_dir: Path, job: Job, num_gpus: int | Literal["auto"]) -> None:
    """Leave what the run is, with every default filled in: `--config` repeats it, in a folder of its own.

    Of GPUs it has as many as were asked for; where none were, another machine has as many as it has.
    """
    resolved = asdict(job.resolved_config)
    resolved["runtime"]["num_gpus"] = num_gpus
    del resolved["output_dir"], resolved["resume_from_checkpoint"]
    if resolved["max_steps"] != -1:
        del resolved["num_train_epochs"]  # is not looked at
    (output_dir / "config.yaml").write_text(yaml.safe_dump(resolved, sort_keys=False), encoding="utf-8")


def _show(job: Job, progress: Progress) -> None:
    """Tell the display what it shows of steps, and the person what was decided."""
    progress.total_steps, progress.steps_per_epoch = job.num_steps, job.micro_batches.steps_per_epoch
    progress.device, progress.logging_steps = "gpu" if job.device == "cuda" else "cpu", job.config.logging_steps
    progress.note(_plan_line(job))


def _plan_line(job: Job) -> str:
    layout, config = job.layout, job.config
    parts = [f"plan: {config.method} on {job.device}, {str(job.dtype).removeprefix('torch.')}"]
    if job.subspace_dims:
        sent = ", ".join(
            f"{rows} × {columns}" for rows, columns in sorted(set(job.subspace_dims.values()), reverse=True)
        )
        parts.append(f"{len(job.subspace_dims)} projected matrices that send {sent}")
    in_parts = f" in {config.replicas} replicas on {layout.num_gpus} GPU(s)" if config.replicas > 1 else ""
    parts.append(f"{job.num_steps} steps of {config.examples_per_step}{in_parts}")
    if job.payload_sizes:
        parts.append(f"{size_text(job.bytes_each_way)} each way a step")
        where = f" on {', '.join(layout.homes)}" if layout.shard_nodes else ""
        parts.append(f"{layout.num_shards} shard(s){where} × {layout.shard_threads} thread(s)")
        parts.append(f"policy {config.policy}")
    parts.append(f"{layout.device_threads} device thread(s)")
    return ", ".join(parts)


def _note_dashboard(cluster: ClusterInfo, progress: Progress) -> None:
    if cluster.dashboard_url:
        progress.note(f"dashboard: {cluster.dashboard_url} (it asks for the token in {cluster.token_path})")


def _decoder(job: Job) -> Callable[[Sequence[float]], str]:
    """Turn a sample's tokens, its label's index or its number into one line of text."""
    if job.is_regression:
        return lambda numbers: f"label {numbers[0]:.4g}"
    if job.task == "sequence_classification":
        return lambda labels: f"label {job.label_names[int(labels[0])]}"
    from lsp_ray.models.load import load_tokenizer

    tokenizer = load_tokenizer(job.model_folder)
    return lambda ids: repr(tokenizer.decode(list(map(int, ids)), skip_special_tokens=True))


def _changes(summary: Summary) -> str:
    """Every eval score before and after."""
    after = summary.eval_after
    return ", ".join(f"{name} {score:.4g} → {after[name]:.4g}" for name, score in summary.eval_before.items())
