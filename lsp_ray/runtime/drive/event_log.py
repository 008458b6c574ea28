"""EventLog: a run's events and the decisions they led to, one JSON line each, so that a policy can be replayed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from lsp_ray.schedule.delta_room import DeltaRoom
from lsp_ray.schedule.ops import (
    Action,
    CostsMeasured,
    DeltaDue,
    Event,
    GradientReady,
    Launch,
    LayerSeconds,
    Op,
    OpDone,
    StepAgain,
    StepJudged,
    StepRun,
)
from lsp_ray.schedule.policy import POLICIES, Policy
from lsp_ray.trace import WorkStream

MAX_STEPS = 100  # enough to see and to replay what a policy does; a run of days must not fill the disk with it

# a stream's name, "gradient" or "due", step, layer, and the part or GPU unless it is 0; "judged", step, whether it
# stands; "costs", step, layers' seconds; "run" or "again", step, 0
_Row = list[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """An event and what the policy answered."""

    event: Event
    actions: list[Action]


class EventLog:
    """Writes decisions as they are taken; the first line says which policy took them.

    Args:
        file: Open for writing; stays the caller's.
        name: The policy's, in POLICIES.
        shard_of_layer: As the policy has it.
        policy: Whose decisions are logged.
    """

    def __init__(self, file: TextIO, name: str, shard_of_layer: Sequence[int], policy: Policy) -> None:
        self._file = file
        self._is_full = False
        header = {
            "policy": name,
            "shard_of_layer": list(shard_of_layer),
            "speculates": policy.speculates,
            "room": None if policy.room is None else asdict(policy.room),
            "gpu_of_part": list(policy.gpu_of_part),
            "home_of_layer": list(policy.home_of_layer),
        }
        self._file.write(json.dumps(header) + "\n")

    def write(self, event: Event, actions: Sequence[Action]) -> None:
        """Append one decision, up to the first event of step MAX_STEPS: what follows would have no beginning."""
        if self._is_full:
            return
        step = event.op.step if isinstance(event, OpDone) else event.step
        self._is_full = step >= MAX_STEPS
        if not self._is_full:
            launched = ", ".join([_op_text(action.op) for action in actions])
            self._file.write(f'{{"event": {_event_text(event)}, "launch": [{launched}]}}\n')


def read_event_log(path: Path) -> tuple[Policy, Iterator[Decision]]:
    """Return a fresh policy like the one that wrote the log, and the decisions to compare it with."""
    lines = path.read_text(encoding="utf-8").splitlines()
    header = json.loads(lines[0])
    room = header["room"]
    policy = POLICIES[header["policy"]](
        header["shard_of_layer"],
        speculates=header["speculates"],
        room=None if room is None else DeltaRoom(sizes=tuple(room["sizes"]), num_bytes=room["num_bytes"]),
        gpu_of_part=header.get("gpu_of_part", [0]),  # logs of before there were parts
        home_of_layer=header.get("home_of_layer", ()),
    )
    return policy, (_decision(json.loads(line)) for line in lines[1:])


def _decision(line: dict[str, Any]) -> Decision:
    return Decision(event=_event(line["event"]), actions=[Launch(op=_op(row)) for row in line["launch"]])


def _event(row: _Row) -> Event:
    kind, step, subject, *more = row
    part = more[0] if more else 0
    match kind:
        case "gradient":
            return GradientReady(step=step, layer=subject, part=part)
        case "due":
            return DeltaDue(step=step, layer=subject, gpu=part)
        case "again":
            return StepAgain(step=step)
        case "run":
            return StepRun(step=step)
        case "judged":
            return StepJudged(step=step, stands=subject)
        case "costs":
            return CostsMeasured(step=step, layers=tuple(LayerSeconds(**seconds) for seconds in subject))
    return OpDone(op=_op(row))


def _event_text(event: Event) -> str:
    match event:
        case OpDone():
            return _op_text(event.op)
        case GradientReady():
            return _text("gradient", event.step, event.layer, event.part)
        case DeltaDue():
            return _text("due", event.step, event.layer, event.gpu)
        case CostsMeasured():
            return json.dumps(["costs", event.step, [asdict(layer) for layer in event.layers]])
        case StepJudged():
            return json.dumps(["judged", event.step, event.stands])
        case StepAgain():
            return _text("again", event.step, 0)
        case StepRun():
            return _text("run", event.step, 0)


def _op_text(op: Op) -> str:
    return _text(op.stream, op.step, op.layer, op.part)


def _text(kind: str, step: int, subject: int, part: int = 0) -> str:
    """A row as JSON; by hand, as the encoder takes five times as long and a step has hundreds."""
    return f'["{kind}", {step}, {subject}, {part}]' if part else f'["{kind}", {step}, {subject}]'


def _op(row: _Row) -> Op:
    stream, step, layer, *part = row
    return Op(stream=WorkStream(stream), step=step, layer=layer, part=part[0] if part else 0)
