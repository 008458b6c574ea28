"""RayWorkers: the device and the shards as actors, and the slots between them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from lsp_ray.device.worker import StepReport
from lsp_ray.errors import DeadlineError, LspRayError, OutOfDeviceMemoryError, WorkerLostError
from lsp_ray.projection.reproject import Reprojection
from lsp_ray.runtime.device_side import SetupReport
from lsp_ray.runtime.driver import Completion
from lsp_ray.runtime.gpu_actor import CONCURRENCY_GROUPS, GpuActor
from lsp_ray.runtime.job import Job
from lsp_ray.runtime.ledger import OpReport
from lsp_ray.runtime.shard_actor import ShardActor, ShardReport, SlotPair
from lsp_ray.runtime.slots import new_slot_buffer
from lsp_ray.schedule.ops import Op
from lsp_ray.trace import WorkStream

START_TIMEOUT_S = 120.0  # an actor starts in seconds; past that it cannot be placed
COMPLETION_TIMEOUT_S = 900.0  # only a hang lasts so long: a dead actor shows at once
POLL_S = 1.0  # of the long poll for gradients, and of the progress of long calls


class RayWorkers:
    """See `Workers`. Ray must be running; leave by `close`.

    Args:
        job: The run.
        completion_timeout_s: How long nothing at all may happen.
    """

    def __init__(self, job: Job, *, completion_timeout_s: float = COMPLETION_TIMEOUT_S) -> None:
        self._job = job
        self._completion_timeout_s = completion_timeout_s
        self._pending: dict[ray.ObjectRef[Any], str] = {}
        self._reprojections: dict[tuple[int, int], Sequence[Reprojection]] = {}  # on their way to an update
        self._pairs = pairs = [_new_pair(unit, numel) for unit, numel in enumerate(job.payload_sizes)]
        layout = job.layout
        self._gpu: Any = (
            ray.remote(concurrency_groups=CONCURRENCY_GROUPS)(GpuActor)  # type: ignore[call-overload]
            .options(num_cpus=1, num_gpus=int(job.device == "cuda"), max_restarts=0)
            .remote(job, pairs)
        )
        self._shards: list[Any] = [
            ray.remote(ShardActor)
            .options(num_cpus=1, max_restarts=0)
            .remote([pairs[unit] for unit in layout.units_of(index)], layout.shard_threads)
            for index in range(layout.num_shards if pairs else 0)
        ]
        for index, shard in enumerate(self._shards):
            self._result(shard.ready.remote(), f"shard {index}: start", START_TIMEOUT_S)

    # long calls of the GPU actor, one at a time

    def setup(self, on_progress: Callable[[str], None]) -> SetupReport:
        """See `DeviceSide.setup`."""
        ref = self._gpu.setup.remote()
        said = ""
        while not ray.wait([ref], timeout=POLL_S)[0]:
            now = self._result(self._gpu.progress.remote(), "gpu: progress", START_TIMEOUT_S)
            if now and now != said:
                on_progress(now)
                said = now
        report: SetupReport = self._result(ref, "gpu: setup")
        calls = [shard.slow_down.remote(report.throttle, len(self._shards)) for shard in self._shards]
        for index, call in enumerate(calls):
            self._result(call, f"shard {index}: throttle", START_TIMEOUT_S)
        if self._job.whitens:
            projectors = self._gpu.projectors.remote()  # goes from actor to actors, not through here
            calls = [shard.whiten.remote(projectors) for shard in self._shards]
            for index, call in enumerate(calls):
                self._result(call, f"shard {index}: whitening")
        return report

    def evaluate(self) -> float:
        """See `DeviceSide.evaluate`."""
        loss: float = self._result(self._gpu.evaluate.remote(), "gpu: evaluation")
        return loss

    def sample(self) -> list[int]:
        """See `DeviceSide.sample`."""
        tokens: list[int] = self._result(self._gpu.sample.remote(), "gpu: sample answer")
        return tokens

    def save(self, folder: Path) -> None:
        """See `DeviceSide.save`."""
        # absolute: an actor's working directory need not be this process's
        self._result(self._gpu.save.remote(str(folder.absolute())), "gpu: save")

    # the driver's seam

    def start_step(self, step: int) -> None:
        """See `Workers`."""
        if step == 0 and self._shards:
            self._poll_gradients()
        self._pending[self._gpu.run_step.remote(step)] = f"gpu: step {step}"

    def launch(self, op: Op) -> None:
        """See `Workers`."""
        match op.stream:
            case WorkStream.D2H:
                ref, who = self._gpu.send.remote(op.step, op.layer), "gpu: send"
            case WorkStream.H2D:
                ref, who = self._gpu.prefetch.remote(op.step, op.layer), "gpu: prefetch"
            case _:
                index = self._job.layout.shard_of_unit[op.layer]
                learning_rate = self._job.learning_rates[op.step]
                reprojections = self._reprojections.pop((op.step, op.layer), ())
                ref = self._shards[index].update.remote(op.step, op.layer, learning_rate, reprojections)
                who = f"shard {index}: update"
        self._pending[ref] = f"{who} of unit {op.layer}, step {op.step}"

    def next_completions(self) -> list[Completion]:
        """See `Workers`."""
        deadline_s = time.monotonic() + self._completion_timeout_s
        completions: list[Completion] = []
        while not completions:
            waiting = list(self._pending)
            ray.wait(waiting, timeout=max(0.0, deadline_s - time.monotonic()))
            done, _ = ray.wait(waiting, num_returns=len(waiting), timeout=0)  # all that are there by now
            for ref in done:
                completions += self._received(self._result(ref, self._pending.pop(ref)))
            if not completions and time.monotonic() >= deadline_s:
                pending = ", ".join(sorted(self._pending.values()))
                raise DeadlineError(f"nothing happened for {self._completion_timeout_s:.0f} s; waiting for {pending}")
        return completions

    def _received(self, result: object) -> list[Completion]:
        match result:
            case OpReport():
                if result.reprojections:
                    self._reprojections[result.span.step, result.span.layer] = result.reprojections
                return [result]
            case StepReport():
                return [result]
            case ShardReport():
                return [OpReport(span=result.span, grad_square_sum=result.grad_square_sum)]
            case list():  # gradients, or none for a while
                self._poll_gradients()
                return result
        raise AssertionError(f"an actor answered {result!r}")

    def close(self) -> None:
        """End the actors; what they held is lost."""
        for actor in (self._gpu, *self._shards):
            ray.kill(actor)

    def _poll_gradients(self) -> None:
        self._pending[self._gpu.next_gradients.remote(POLL_S)] = "gpu: next gradients"

    def _result(self, ref: ray.ObjectRef[Any], what: str, timeout_s: float | None = None) -> Any:
        """Fetch an answer; a failure becomes an error that says what was waited for."""
        try:
            return ray.get(ref, timeout=timeout_s)
        except RayActorError as error:
            raise WorkerLostError(f"an actor died ({what}): {str(error).splitlines()[0]}") from error
        except GetTimeoutError as error:
            raise DeadlineError(f"no answer within {timeout_s:.0f} s ({what})") from error
        except RayTaskError as error:
            if isinstance(error.cause, LspRayError):
                raise error.cause from error
            if isinstance(error.cause, torch.OutOfMemoryError):
                raise OutOfDeviceMemoryError(
                    f"the GPU's memory is full ({what}); a smaller per_device_train_batch_size or max_seq_length, or "
                    "gradient_checkpointing, needs less"
                ) from error
            raise
        except RayError as error:
            raise WorkerLostError(f"Ray failed ({what}): {str(error).splitlines()[0]}") from error


def _new_pair(unit: int, numel: int) -> SlotPair:
    down, up = (ray.put(new_slot_buffer(numel)) for _ in range(2))
    return SlotPair(unit=unit, numel=numel, down=down, up=up)
