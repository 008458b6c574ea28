"""fine_tune: one run from job to result, on the workers given."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lsp_ray.output_folder import INTERNALS
from lsp_ray.runtime.actors.decided import SetupReport
from lsp_ray.runtime.checkpoints.checkpoint import checkpoints
from lsp_ray.runtime.prepare.job import Job
from lsp_ray.runtime.training import FineTuneWorkers, Listener, NeverStop, Stop, Training
from lsp_ray.runtime.watch.step_totals import StepTotals


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What summary.json holds. Times are seconds, without the step whose memory was measured; sizes are bytes.

    Attributes:
        model: See `RunConfig.model_name_or_path`.
        dataset: See `RunConfig`.
        num_train_examples: What is trained on.
        num_eval_examples: What is held out.
        method: See `RunConfig`.
        policy: None where nothing leaves the device.
        device: cpu or cuda.
        num_shards: 0 where nothing leaves the device.
        num_steps: Optimizer updates made.
        best_step: The update with the lowest eval loss, whose weights these are; None: they are the last ones.
        duration_s: From set-up to the saved model, of the process that ended the run.
        eval_loss_before: Mean over the held-out targets, before training.
        eval_loss_after: The same after training.
        eval_before: Every score of the task, its `loss` as well.
        eval_after: The same after training.
        step_time_s_median: Of an optimizer update.
        tokens_per_second: Tokens that are no padding, over the steps' time.
        overlap_fraction: 1 − exposed time / step time.
        num_clipped: Steps whose gradients were scaled down, see `StepMetrics.grad_scale`.
        num_skipped: Steps that were left out.
        emulated_compute_s: Compute of a step that an emulated machine's link and shards were scaled to.
        peak_device_bytes: Of tensors alive on the device in one of the first steps.
        bytes_d2h_per_step: Down the link, a median.
        bytes_h2d_per_step: Up the link, a median.
        sample_before: The model's answer to a held-out prompt, before training.
        sample_after: The same after training.
        sample_expected: What the data says.
    """

    model: str
    dataset: str
    num_train_examples: int
    num_eval_examples: int
    method: str
    policy: str | None
    device: str
    num_shards: int
    num_steps: int
    best_step: int | None
    duration_s: float
    eval_loss_before: float
    eval_loss_after: float
    eval_before: dict[str, float]
    eval_after: dict[str, float]
    step_time_s_median: float
    tokens_per_second: float
    overlap_fraction: float
    num_clipped: int
    num_skipped: int
    emulated_compute_s: float | None
    peak_device_bytes: int | None
    bytes_d2h_per_step: int
    bytes_h2d_per_step: int
    sample_before: str
    sample_after: str
    sample_expected: str


def fine_tune(
    job: Job,
    workers: FineTuneWorkers,
    output_dir: Path,
    listener: Listener,
    decode: Callable[[Sequence[float]], str],
    stop: Stop | None = None,
) -> Summary:
    """Set up, evaluate, train, evaluate again, and write everything into `output_dir`.

    Args:
        job: The run.
        workers: Who acts; stay the caller's.
        output_dir: Exists and is writable.
        listener: Told what happens.
        decode: Turns a sample's numbers into text.
        stop: Asked between steps; default: nobody stops it.

    Raises:
        StoppedError: Someone did; the last checkpoint holds every step made. Once all are made, the run is finished
            all the same.
    """
    stop = stop or NeverStop()
    start_s = time.monotonic()
    setup = workers.setup(listener.phase)
    _note_setup(job, setup, listener)
    job = job.with_parts(setup.gpu_of_part)
    if job.saved is None:
        listener.phase("evaluating before training")
        before, sample_before = workers.evaluate(), decode(workers.sample())
        listener.note(f"eval loss before: {_scores_line(before)}")
        listener.note(f"sample before: {sample_before}")
    else:
        before, sample_before = job.saved.eval_before, job.saved.sample_before
        listener.note(f"going on from {job.saved.folder}, after {job.saved.step} steps")
    training = Training(job, workers, output_dir, listener, (before, sample_before))
    with stop.deferred(lambda: listener.note("stopping once all that is done is saved; a second time stops at once")):
        totals, peak_bytes = training.run(setup.throttle, stop)
        listener.phase("evaluating after training")
        after, best = _evaluated(job, workers, totals, output_dir, listener)
        change = (after["loss"] - before["loss"]) / before["loss"]
        listener.note(f"eval loss after: {_scores_line(after)} (loss {change:+.1%})")
        sample_after = decode(workers.sample())
        listener.note(f"sample after: {sample_after}")
        listener.note(f"sample in the data: {job.sample_expected}")
        listener.phase("saving the checkpoint")
        workers.save(output_dir)
        summary = _summary(
            job,
            totals,
            (before, after),
            (sample_before, sample_after),
            peak_bytes=peak_bytes,
            emulated_compute_s=setup.throttle.compute_s,
            best_step=None if best is None else int(best.name.rpartition("-")[2]),
            duration_s=time.monotonic() - start_s,
        )
        if job.subspace_dims:
            _write_json(output_dir / INTERNALS / "subspace_dims.json", job.subspace_dims)
        _write_json(output_dir / "summary.json", asdict(summary))
    return summary


def _evaluated(
    job: Job, workers: FineTuneWorkers, totals: StepTotals, output_dir: Path, listener: Listener
) -> tuple[dict[str, float], Path | None]:
    """The scores of the weights that the run ends with, and the checkpoint that they are from, if they are."""
    after = workers.evaluate()
    best = _best(job, totals, after["loss"], output_dir)
    if best is not None:
        listener.note(f"going back to {best.name}, whose eval loss is lower than the last one, {after['loss']:.4f}")
        workers.take_weights(best)
        after = workers.evaluate()
    return after, best


def _best(job: Job, totals: StepTotals, last_loss: float, output_dir: Path) -> Path | None:
    """The checkpoint that a run is to end with, where that is not the last step."""
    best = totals.best if job.config.load_best_model_at_end else None
    if best is None or best.eval_loss is None or best.eval_loss >= last_loss:
        return None
    folders = [output_dir] if job.saved is None else [output_dir, job.saved.folder.parent]
    found = (checkpoints(folder).get(best.step) for folder in folders)
    return next((folder for folder in found if folder is not None), None)


def _scores_line(scores: dict[str, float]) -> str:
    """The loss without its name, then every other score with it."""
    others = [f"{name} {score:.4g}" for name, score in scores.items() if name != "loss"]
    return ", ".join([f"{scores['loss']:.4f}", *others])


def _note_linears(names: Sequence[str], what: str, job: Job, listener: Listener) -> None:
    if names:
        shown = f"{', '.join(names[:3])}{' …' if len(names) > 3 else ''}"
        listener.note(f"{len(names)} of {len(job.subspace_dims)} {what}: {shown}")


def _note_setup(job: Job, setup: SetupReport, listener: Listener) -> None:
    for place in setup.places:
        listener.note(place)
    if setup.num_pageable:
        listener.note(
            f"{setup.num_pageable} buffers could not be page-locked (ulimit -l, or WSL2): copies to and from the GPU "
            "run slower and overlap less"
        )
    if job.gives_back:
        listener.note("updates begin with what they can give back of the rounding to 4 bits")
    _note_linears(setup.unfitted, "projectors stay random, as calibration gave their layers no gradient", job, listener)
    _note_linears(
        setup.missing, "updates begin with zeros, as their weights before rounding are not found", job, listener
    )
    if setup.gpu_of_part != job.layout.gpu_of_part:
        counts = [f"{job.layout.name_of(gpu)} {setup.gpu_of_part.count(gpu)}" for gpu in range(job.layout.num_gpus)]
        listener.note(f"parts of a step that each GPU computes, by its pace: {', '.join(counts)}")
    if job.staleness:
        listener.note(
            f"policy {job.config.policy}: every update is added {job.staleness} step late, which changes losses"
        )
    throttle = setup.throttle
    if throttle.compute_s is not None and throttle.link_gbps is not None and throttle.updates_per_s is not None:
        listener.note(
            f"emulating {job.config.runtime.emulate}: a step computes {throttle.compute_s:.3g} s, so the link passes "
            f"{throttle.link_gbps:.3g} GB/s each way and the shards update {throttle.updates_per_s:.3g} elements/s"
        )


def _summary(
    job: Job,
    totals: StepTotals,
    scores: tuple[dict[str, float], dict[str, float]],
    samples: tuple[str, str],
    *,
    peak_bytes: int | None,
    emulated_compute_s: float | None,
    best_step: int | None,
    duration_s: float,
) -> Summary:
    """Of a run whose eval scores and sample answers were these, before and after."""
    return Summary(
        model=job.config.model_name_or_path,
        dataset=job.config.dataset,
        num_train_examples=job.micro_batches.num_train_examples,
        num_eval_examples=job.micro_batches.num_eval_examples,
        method=job.config.method,
        policy=job.config.policy if job.payload_sizes else None,
        device=job.device,
        num_shards=job.layout.num_shards,
        num_steps=totals.last,
        best_step=best_step,
        duration_s=duration_s,
        eval_loss_before=scores[0]["loss"],
        eval_loss_after=scores[1]["loss"],
        eval_before=scores[0],
        eval_after=scores[1],
        step_time_s_median=totals.step_time_s_median,
        tokens_per_second=totals.tokens_per_second,
        overlap_fraction=totals.overlap_fraction,
        num_clipped=totals.num_clipped,
        num_skipped=totals.num_skipped,
        emulated_compute_s=emulated_compute_s,
        peak_device_bytes=peak_bytes,
        bytes_d2h_per_step=totals.bytes_d2h_per_step,
        bytes_h2d_per_step=totals.bytes_h2d_per_step,
        sample_before=samples[0],
        sample_after=samples[1],
        sample_expected=job.sample_expected,
    )


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
