"""A check: what it runs on, and how its outcome is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lsp_ray.device.backend import Backend
from lsp_ray.errors import LspRayError


class CheckFailedError(Exception):
    """The device does not do what it must; says by how much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How large the checks are; lengths of matrices' sides, or tokens, unless said.

    Attributes:
        rows: M of the matrix that is projected.
        columns: N of it.
        dim: D of its subspace.
        num_tokens: T of a batch that passes it.
        copy_numel: Float32 elements of a copy.
        busy_side: Of the square that keeps the compute stream busy while copies run beside it.
    """

    rows: int = 1536
    columns: int = 576
    dim: int = 256
    num_tokens: int = 512
    copy_numel: int = 1 << 24
    busy_side: int = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Where a check runs, and how large it is."""

    backend: Backend
    sizes: Sizes

    @property
    def device(self) -> torch.device:
        """The backend's."""
        return self.backend.device

    @property
    def on_gpu(self) -> bool:
        """Whether copies and compute can run side by side at all."""
        return self.device.type == "cuda"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A line of the table; `figure` says what was measured, or what is wrong."""

    check: str
    passed: bool
    figure: str


Check = Callable[[], str]
"""Returns its figure; raises CheckFailedError."""


def outcomes(checks: Sequence[tuple[str, Check]], say: Callable[[Outcome], None]) -> list[Outcome]:
    """Run every check, whatever the others found; `say` is told each outcome as it is there."""
    found = []
    for name, check in checks:
        outcome = _outcome(name, check)
        say(outcome)
        found.append(outcome)
    return found


def _outcome(name: str, check: Check) -> Outcome:
    try:
        return Outcome(check=name, passed=True, figure=check())
    except CheckFailedError as error:
        return Outcome(check=name, passed=False, figure=str(error))
    except (RuntimeError, ValueError, AssertionError, LspRayError) as error:  # RuntimeError: all that CUDA reports
        lines = str(error).splitlines() or [""]
        return Outcome(check=name, passed=False, figure=f"{type(error).__name__}: {lines[0]}")


def require(is_so: bool, what: str) -> None:
    """Raise CheckFailedError unless it is so; `what` says what is wrong."""
    if not is_so:
        raise CheckFailedError(what)


def relative_error(found: torch.Tensor, expected: torch.Tensor, bound: float) -> str:
    """Return ‖found − expected‖ / ‖expected‖ as a figure.

    Raises:
        CheckFailedError: It is above `bound`, or not a number.
    """
    expected = expected.double().cpu()
    error = float((found.detach().double().cpu() - expected).norm() / expected.norm())
    require(error <= bound, f"differs by {error:.2g} of its norm, at most {bound:.2g} is right")
    return f"within {error:.1g} of the CPU's"
