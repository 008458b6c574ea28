"""What an actor answers; a failure becomes an error that says what was waited for."""

from __future__ import annotations

from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from lsp_ray.errors import DeadlineError, LspRayError, OutOfDeviceMemoryError, WorkerLostError


def answer(ref: ray.ObjectRef[Any], what: str, timeout_s: float | None = None) -> Any:
    """Fetch an answer.

    Args:
        ref: Of the call.
        what: Was waited for.
        timeout_s: How long it may take; None waits for as long as the actor lives.

    Raises:
        LspRayError: The actor died, failed, or did not answer in time.
    """
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
