"""What Ray answers of an actor; a failure becomes an error that says what was waited for."""

from __future__ import annotations

import re
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from lsp_ray.errors import DeadlineError, LspRayError, WorkerLostError
from lsp_ray.runtime.cluster.own_raylet import check_raylet

_WHY = {  # Ray's types of a worker's exit; it does not see which signal ended one
    "SYSTEM_ERROR": "its process was killed, as Linux does where memory is full (dmesg tells), or crashed",
    "NODE_OUT_OF_MEMORY": "Ray ended its process, as the machine's memory was nearly full",
}


def answer(ref: ray.ObjectRef[Any], what: str, timeout_s: float | None = None) -> Any:
    """Fetch an answer.

    Args:
        ref: Of the call.
        what: Was waited for.
        timeout_s: How long it may take; None waits for as long as the actor lives.

    Raises:
        LspRayError: The actor died or did not answer in time.
        RayLostError: And all that Ray ran on this machine.
    """
    try:
        return _got(ref, timeout_s)
    except RayActorError as error:
        raise WorkerLostError(_death(str(error), what)) from error
    except GetTimeoutError as error:
        raise DeadlineError(f"no answer within {timeout_s:.0f} s ({what})") from error
    except RayTaskError as error:
        if isinstance(error.cause, LspRayError):
            raise error.cause from error
        raise  # a bug of ours in the actor: as it is
    except RayError as error:
        raise WorkerLostError(f"Ray failed ({what}): {str(error).splitlines()[0]}") from error


def _got(ref: ray.ObjectRef[Any], timeout_s: float | None) -> Any:
    try:
        return ray.get(ref, timeout=timeout_s)
    except RayError:
        check_raylet()
        raise


def _death(told: str, what: str) -> str:
    """Who died and why, in one line, from Ray's many."""
    name, pid, kind = (
        re.search(pattern, told) for pattern in (r"class_name: (\w+)", r"pid: (\d+)", r"Worker exit type: (\w+)")
    )
    who = f"the {name[1]}{f' of process {pid[1]}' if pid else ''}" if name else "an actor"
    why = _WHY.get(kind[1]) if kind else None
    return f"{who} died ({what}): {why or told.splitlines()[-1][:200]}"
