"""GpuPool: the GPU actors. The first one decides what all must have alike, and speaks for the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from lsp_ray.device.shared_weights import CAN_SHARE, WeightsPlace
from lsp_ray.device.switch import Takeover
from lsp_ray.errors import DivergedError, WorkerLostError
from lsp_ray.runtime.actors.decided import SetupReport
from lsp_ray.runtime.actors.gpu_actor import GpuActor
from lsp_ray.runtime.actors.keepers import Keepers
from lsp_ray.runtime.actors.places import Places
from lsp_ray.runtime.actors.throttle import Throttle
from lsp_ray.runtime.cluster.leftovers import own_folder
from lsp_ray.runtime.cluster.nodes import on_node
from lsp_ray.runtime.prepare.job import Job
from lsp_ray.runtime.prepare.layout import parts_by_pace
from lsp_ray.runtime.transport.answers import answer
from lsp_ray.runtime.transport.lanes import (
    COMPUTE,
    D2H,
    GPU_GROUPS,
    H2D,
    NEWS,
    START_TIMEOUT_S,
    Lane,
    Order,
    actor_class,
    gpu_lanes,
    link_lane,
)

_UP = link_lane(H2D, 0)  # whose thread is free for what is not a delta
MAX_TRIES = 2  # of putting an actor into a lost one's place


class GpuPool:
    """Starts an actor for every GPU of the layout.

    Args:
        job: The run.
        kind: Of whose kind they are.
        places: Where they are.
        keepers: Of the slots there.
        shared: A folder that all machines see; None: there is one.
    """

    def __init__(self, job: Job, kind: type[GpuActor], places: Places, keepers: Keepers, shared: Path | None) -> None:
        self._job, self._kind, self._shared = job, kind, shared
        self._places, self._keepers = places, keepers
        self._num_gpus, self._num_homes = job.layout.num_gpus, len(job.layout.homes)
        self._home_of_unit = job.layout.home_of_unit
        self._actors = [self._new(gpu) for gpu in range(self._num_gpus)]
        self._lanes: list[dict[str, Lane]] = []  # none of a GPU that is lost

    def open(self) -> None:
        """Wait until all have started."""
        for gpu in range(self._num_gpus):
            self._lanes.append(self._opened(gpu))

    @property
    def lanes(self) -> list[Lane]:
        """All, to wait for."""
        return [lane for lanes in self._lanes for lane in lanes.values()]

    @property
    def copying(self) -> list[Lane]:
        """Those of both directions of the links."""
        return [lane for lanes in self._lanes for name, lane in lanes.items() if name not in (COMPUTE, NEWS)]

    def gpu_of(self, lane: Lane) -> int | None:
        """Whose lane it is; None: no GPU's."""
        return next((gpu for gpu, lanes in enumerate(self._lanes) if lane in lanes.values()), None)

    def forget(self, gpu: int) -> list[Lane]:
        """Take the lanes of one that is lost away; orders to it are for nobody until it is replaced."""
        lanes, self._lanes[gpu] = self._lanes[gpu], {}
        ray.kill(self._actors[gpu])
        return list(lanes.values())

    def replace(self, gpu: int, step: int) -> None:
        """Start another one, with what the others have before a step that all of them have made.

        One that is lost before it has begun is replaced as well.

        Raises:
            WorkerLostError: That has not helped, or the one that has the weights is lost.
        """
        for tries_left in reversed(range(MAX_TRIES)):
            try:
                self._replace(gpu, step)
            except WorkerLostError:
                if not tries_left:
                    raise
                self.forget(gpu)
            else:
                return

    def _replace(self, gpu: int, step: int) -> None:
        self._keepers.find_place(gpu)
        self._actors[gpu] = self._new(gpu)
        with own_folder(self._shared) as folder:
            weights = str(folder / "weights.safetensors")
            donor = next(own for own in range(self._num_gpus) if own != gpu)
            what = f"weights for {self._name(gpu)}"
            decided = self._lanes[donor][_UP].call(what, "hand_over", step, weights)
            self._lanes[gpu] = self._opened(gpu)
            if self._shares_weights:
                self._lanes[gpu][COMPUTE].call("loading", "share", self._weights_place(gpu))
            self._lanes[gpu][COMPUTE].call("setup", "setup", decided)

    def start_again(self, gpu: int, steps: range, *, drains: bool) -> None:
        """Let one run steps that the others have begun; returns at once."""
        for step in steps:
            self._order(gpu, COMPUTE, "step {0}", "run_step", step)
        if drains:
            self._order(gpu, COMPUTE, "the last deltas", "drain")

    def setup(self, on_progress: Callable[[str], None]) -> SetupReport:
        """See `DeviceSide.setup`. What the first one decides, the others are given."""
        said = ""

        def tell_progress() -> None:
            nonlocal said
            now = answer(self._actors[0].progress.remote(), "gpu: progress", START_TIMEOUT_S)
            if now and now != said:
                on_progress(now)
                said = now

        if self._shares_weights:
            self._share(tell_progress)
        if self._job.has_parts_to_divide:
            self._divide(tell_progress)
        report: SetupReport = self.first("setup", "setup", meanwhile=tell_progress)
        if self._num_gpus > 1:
            decided = self.first("what is decided", "decided")
            for gpu in range(1, self._num_gpus):
                self._order(gpu, COMPUTE, "setup", "setup", decided)
            reports: list[SetupReport] = [report, *self.wait()[1:]]
            report = replace(report, places=tuple(place for own in reports for place in own.places))
            self.check_alike()
        return report

    @property
    def _shares_weights(self) -> bool:
        return CAN_SHARE and self._num_gpus > 1 and self._job.config.streams

    def _share(self, meanwhile: Callable[[], None]) -> None:
        """Let one GPU of each machine load the model, and the others of it take that one's."""
        first_of = {node.id: gpu for gpu, node in reversed(list(enumerate(self._places.gpus)))}
        for gpu in first_of.values():
            if gpu != 0:
                self._order(gpu, COMPUTE, "loading", "share", None)
        self.first("loading", "share", None, meanwhile=meanwhile)
        self.wait()
        for gpu in range(self._num_gpus):
            if gpu not in first_of.values():
                self._order(gpu, COMPUTE, "loading", "share", self._weights_place(gpu))
        self.wait()

    def _weights_place(self, gpu: int) -> WeightsPlace | None:
        """Where one that begins finds the machine's frozen weights; None: it is the only one there."""
        places = self._places.gpus
        for own, node in enumerate(places):
            if own != gpu and node.id == places[gpu].id and self._lanes[own]:
                place: WeightsPlace | None = self._lanes[own][_UP].call(
                    f"frozen weights for {self._name(gpu)}", "weights_place"
                )
                if place is not None:
                    return place
        return None

    def _divide(self, meanwhile: Callable[[], None]) -> None:
        """Let a fast GPU compute more parts than a slow one; all measure at the same time, as they will compute."""
        for gpu in range(1, self._num_gpus):
            self._order(gpu, COMPUTE, "pace", "pace")
        first_s: float = self.first("pace", "pace", meanwhile=meanwhile)
        gpu_of_part = parts_by_pace(self._job.config.replicas, [first_s, *self.wait()[1:]])
        self._job = self._job.with_parts(gpu_of_part)
        for gpu in range(self._num_gpus):
            self._order(gpu, COMPUTE, "parts", "divide", gpu_of_part)
        self.wait()

    def first(self, what: str, method: str, *args: Any, meanwhile: Callable[[], None] = lambda: None) -> Any:
        """Call a method of the first one and return what it does."""
        return self._lanes[0][COMPUTE].call(what, method, *args, meanwhile=meanwhile)

    def wait(self) -> list[Any]:
        """Wait for the long calls under way; returns each one's last answer. Of a drain nobody needs the answer."""
        answers: list[Any] = [None] * self._num_gpus
        for gpu, lanes in enumerate(self._lanes):
            while lanes[COMPUTE].owed:
                answers[gpu] = lanes[COMPUTE].answer()
        return answers

    def keep_to(self, throttle: Throttle) -> None:
        """See `DeviceSide.keep_to`."""
        for gpu in range(self._num_gpus):
            self._order(gpu, COMPUTE, "throttle", "keep_to", throttle)
        self.wait()

    def check_alike(self) -> None:
        """Between two steps: compare what all train; nothing to do for one.

        Raises:
            DivergedError: It is not the same.
        """
        if self._num_gpus == 1:
            return
        for gpu in range(self._num_gpus):
            self._order(gpu, COMPUTE, "digest", "digest")
        digests = self.wait()
        for gpu, digest in enumerate(digests):
            if digest != digests[0]:
                raise DivergedError(f"the weights of {self._name(gpu)} are not those of {self._name(0)}")

    def take(self, takeover: Takeover) -> None:
        """Pass on which projectors take over on the first one."""
        for gpu in range(1, self._num_gpus):
            self._order(gpu, _UP, "projectors", "take", takeover)

    def start_step(self, step: int) -> None:
        """Let all run it after those started before; returns at once."""
        for gpu in range(self._num_gpus):
            self._order(gpu, COMPUTE, "step {0}", "run_step", step)

    def drain(self) -> None:
        """See `DeviceWorker.drain`; returns at once."""
        for gpu in range(self._num_gpus):
            self._order(gpu, COMPUTE, "the last deltas", "drain")

    def send(self, gpu: int, step: int, unit: int, part: int) -> None:
        """See `GpuActor.send`; returns at once."""
        self._order(gpu, self._link(D2H, unit), "send of unit {1}, step {0}", "send", step, unit, part)

    def prefetch(self, gpu: int, step: int, unit: int, *, is_void: bool) -> None:
        """See `GpuActor.prefetch`; returns at once."""
        self._order(gpu, self._link(H2D, unit), "prefetch of unit {1}, step {0}", "prefetch", step, unit, is_void)

    def close(self) -> None:
        """End the actors; what they held is lost."""
        for actor in self._actors:
            ray.kill(actor)
        for lane in self.lanes:
            lane.close()

    def _order(self, gpu: int, lane: str, what: str, method: str, *args: Any) -> None:
        if self._lanes[gpu]:
            self._lanes[gpu][lane].order(Order(what=what, method=method, args=args))

    def _new(self, gpu: int) -> Any:
        start = actor_class(self._kind, **GPU_GROUPS).options(  # type: ignore[arg-type]  # classes are hashable
            num_cpus=1,
            num_gpus=int(self._job.device == "cuda"),
            max_restarts=0,
            **on_node(self._places.gpus[gpu].id),
        )
        given = self._keepers.given(gpu)
        return start.remote(self._job, given.slots, gpu, given.way)

    def _link(self, direction: str, unit: int) -> str:
        return link_lane(direction, self._home_of_unit[unit])

    def _opened(self, gpu: int) -> dict[str, Lane]:
        return self._keepers.open_lanes(
            self._actors[gpu], self._name(gpu), gpu_lanes(self._num_homes), self._places.gpus[gpu]
        )

    def _name(self, gpu: int) -> str:
        return self._job.layout.name_of(gpu)
