"""What a run begins with of another one: its projectors, and where updates are kept apart all that it trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from lsp_ray.config import LspConfig
from lsp_ray.device.trained_file import check_trained, trained_digest
from lsp_ray.errors import ConfigError
from lsp_ray.models.digest import weights_digest
from lsp_ray.optim.sums import SummedPart
from lsp_ray.output_folder import INTERNALS
from lsp_ray.projection.projector_file import INIT_FROM, load_projectors
from lsp_ray.projection.sparse_projector import ProjectorSizes, SparseProjector

UPDATES = "lsp_trained.safetensors"  # in a run's internals


def check_beginning(
    start: Path,
    lsp: LspConfig,
    sizes: Mapping[str, ProjectorSizes],
    sums: Sequence[Sequence[SummedPart]] | None,
    model_folder: Path,
    *,
    quantized: bool,
    note: Callable[[str], None],
) -> Path | None:
    """Refuse what a run cannot begin with.

    Args:
        start: What `lsp.init_from` names.
        lsp: The run's.
        sizes: Of its projectors.
        sums: The parts of its payloads, where updates are kept apart.
        model_folder: Its base.
        quantized: Whether its linears are.
        note: Told, in one line, what is taken.

    Returns:
        The file with what the other run trained; None where projectors are all that is taken.

    Raises:
        ConfigError: It is damaged, or of another base, other sizes or another balance.
    """
    projectors = load_projectors(start, sizes)
    if sums is None:
        note(f"lsp.init_from: {len(projectors)} projectors of {start}, and no updates, as lsp.delta is merged")
        return None
    _check_balance(projectors, lsp)
    updates = start / INTERNALS / UPDATES
    if not updates.is_file():
        kind = "a run's folder without updates kept apart" if start.is_dir() else "a file of projectors alone"
        note(f"lsp.init_from: {len(projectors)} projectors of {start}, and no updates, as it is {kind}")
        return None
    with damaged_updates(str(start)):
        digest, has_other_base = trained_digest(updates), check_trained(updates, sums)
    if digest != weights_digest(model_folder):
        raise ConfigError(INIT_FROM, "be a run on the same base, to whose weights its updates belong", str(start))
    if has_other_base and quantized:
        bound = "be a run without refits, as a quantised base cannot take in what earlier projectors did"
        raise ConfigError(INIT_FROM, bound, str(start))
    others = sum(map(len, sums)) - len(projectors)
    note(
        f"lsp.init_from: {len(projectors)} projectors of {start}, with their updates and those of {others} other "
        "parameters; Adam's moments begin anew"
    )
    return updates


@contextmanager
def damaged_updates(start: str | None) -> Iterator[None]:
    """Turn whatever a damaged file of updates makes readers raise into one line."""
    try:
        yield
    except (OSError, SafetensorError, ValueError, TypeError, LookupError) as error:
        line = " ".join(str(error).split())[:200]
        raise ConfigError(INIT_FROM, f"hold intact updates of the same sizes ({line})", start) from error


def _check_balance(projectors: Mapping[str, SparseProjector], lsp: LspConfig) -> None:
    """Refuse projectors that shards, who know of a run's options alone, would take for others."""
    expected = lsp.fit == "closed_form" and lsp.balance
    if any((each.left.scale_F is not None) != expected for each in projectors.values()):
        raise ConfigError(INIT_FROM, "hold projectors of the same lsp.balance with lsp.delta apart", str(lsp.init_from))
