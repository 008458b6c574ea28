"""The error tree: everything a person can cause is an `LspRayError` with one clear line."""

from __future__ import annotations

from typing import Any


class LspRayError(Exception):
    """Root of every error that lsp_ray raises on purpose."""


class ConfigError(LspRayError, ValueError):
    """A value a person gave cannot work; names the field, the bound and the value.

    Args:
        field: The option as typed on the command line, without dashes, e.g. `lsp.subspace_dim`.
        bound: What would have been accepted, phrased to follow "must", e.g. `be at least 1`.
        value: What was given.
        hint: An optional way out, appended after a semicolon.
    """

    def __init__(self, field: str, bound: str, value: object, *, hint: str = "") -> None:
        self.field, self.bound, self.value, self.hint = field, bound, value, hint
        tail = f"; {hint}" if hint else ""
        super().__init__(f"{field} must {bound}, got {value!r}{tail}")

    def __reduce__(self) -> tuple[object, ...]:  # keyword-only arguments need this to cross processes
        return (_rebuild_config_error, (self.field, self.bound, self.value, self.hint))


def _rebuild_config_error(field: str, bound: str, value: object, hint: str) -> ConfigError:
    return ConfigError(field, bound, value, hint=hint)


class StaleSlotError(LspRayError):
    """A slot held another step's payload than its reader expected: a scheduling bug, never ignored."""


class ForeignSlotError(LspRayError):
    """A slot of another node was opened, where it is a copy that nobody writes to: a bug, never ignored."""


class DivergedError(LspRayError):
    """Two GPUs that train the same model have weights that differ: a bug, or a GPU that computes wrongly."""


class DeadlineError(LspRayError, TimeoutError):
    """A wait ran past its deadline; names what was waited for."""


class WorkerLostError(LspRayError):
    """An actor died while its answer was awaited; names the actor and the step."""


class GpuLostError(WorkerLostError):
    """A GPU actor died; others that train the same model may live. `gpu` is its number."""

    def __init__(self, message: str, gpu: int) -> None:
        super().__init__(message)
        self.gpu = gpu

    def __reduce__(self) -> tuple[Any, ...]:
        """An exception with more arguments than a message does not copy itself."""
        return GpuLostError, (str(self), self.gpu)


class RayLostError(LspRayError):
    """Ray has ended on the driver's machine: nobody can start an actor in the place of a lost one.

    Attributes:
        told: What a person was told of it already.
    """

    told = ""


class CheckpointError(LspRayError):
    """A checkpoint could not be written; those before it are as they were."""


class TrackerError(LspRayError):
    """A tracker that was asked for (`report_to`) did not start."""


class StoppedError(LspRayError):
    """Someone asked the run to stop, and it has saved what it had; says how to go on."""


class NonFiniteGradientError(LspRayError):
    """A gradient holds NaN or infinity; names step and layer. Moments and weights are as they were before it."""


class OutOfDeviceMemoryError(LspRayError):
    """The device has too little memory for a step; says what needs less."""


class NonFiniteLossError(LspRayError):
    """The loss became NaN or infinite; names the step. Weights of earlier steps are intact."""
