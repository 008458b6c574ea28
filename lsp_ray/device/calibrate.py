"""Fit projectors from gradients of a few micro-batches, before step 1."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import repeat

import torch
from transformers import PreTrainedModel

from lsp_ray.device.fits import Fit
from lsp_ray.device.projected_linear import ProjectedLinear
from lsp_ray.device.rounding import mixed
from lsp_ray.models.loss import Batch, num_targets, summed_loss

LESSON_BYTES = 1 << 30  # host memory for lessons: larger models calibrate in several passes over the batches


def fit_projectors(
    model: PreTrainedModel,
    linears: Sequence[tuple[str, ProjectedLinear]],
    batches: Sequence[Batch],
    fit: Fit,
    *,
    seed: int,
    num_threads: int,
    on_fitted: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Replace every linear's projector by a learned one.

    Args:
        model: On its device; its weights do not change.
        linears: Names and modules; each keeps its subspace dimension and its number of non-zeros.
        batches: Calibration micro-batches, on any device.
        fit: How they learn.
        seed: Of sketches and positions.
        num_threads: Matrices fitted at once.
        on_fitted: Called with the number of linears done and their total.

    Returns:
        Names of linears without a usable gradient (all zero or not finite); they keep the projector they had.
    """
    unfitted: list[str] = []
    done = 0
    for group in _groups(linears, fit, len(batches)):
        for key, (_, module) in enumerate(group, start=done):
            generator = torch.Generator().manual_seed(mixed(seed, key))
            module.lesson = fit.lesson(module.projector.shape, module.projector.dim, generator)
        _backward_all(model, [module for _, module in linears], batches)
        keys = range(done, done + len(group))
        _load_linalg(next(model.parameters()).device)
        with _single_threaded(), ThreadPoolExecutor(num_threads) as executor:
            is_fitted = executor.map(_fit, [module for _, module in group], repeat(seed), keys)
            for (name, _), was_fitted in zip(group, is_fitted, strict=True):
                if not was_fitted:
                    unfitted.append(name)
                done += 1
                if on_fitted is not None:
                    on_fitted(done, len(linears))
    return unfitted


def _load_linalg(device: torch.device) -> None:
    """Let torch load its solvers: on CUDA it fails where the first call comes from several threads (pytorch#90613)."""
    torch.linalg.cholesky(torch.eye(1, device=device))


@contextmanager
def _single_threaded() -> Iterator[None]:
    """Within the context operators use one thread.

    A fit is thousands of small operators. Sharing each out would make threads wait for each other at every one, which
    beside another busy program took twenty times as long as one matrix a thread.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _groups(
    linears: Sequence[tuple[str, ProjectedLinear]], fit: Fit, num_batches: int
) -> Iterator[list[tuple[str, ProjectedLinear]]]:
    """Split into runs whose lessons fit in LESSON_BYTES, one linear at least."""
    group: list[tuple[str, ProjectedLinear]] = []
    total_bytes = 0
    for name, module in linears:
        size_bytes = fit.host_bytes(module.projector.shape, module.projector.dim, num_batches)
        if group and total_bytes + size_bytes > LESSON_BYTES:
            yield group
            group, total_bytes = [], 0
        group.append((name, module))
        total_bytes += size_bytes
    if group:
        yield group


def _backward_all(model: PreTrainedModel, modules: Sequence[ProjectedLinear], batches: Sequence[Batch]) -> None:
    """Let the lessons see every batch; no gradient is left behind for the first step to add to."""
    device = next(model.parameters()).device
    for position, batch in enumerate(batches):
        torch.manual_seed(position)
        on_device = {name: tensor.to(device) for name, tensor in batch.items()}
        loss = summed_loss(model, on_device) / max(1, num_targets(batch))
        loss.backward()
        model.zero_grad(set_to_none=True)
        for module in modules:
            module.leaf.grad = None


def _fit(module: ProjectedLinear, seed: int, key: int) -> bool:
    lesson, old = module.lesson, module.projector
    assert lesson is not None
    module.lesson = None
    generator = torch.Generator().manual_seed(mixed(seed, key, 1))
    learned = lesson.learn(old.dim, old.left.nnz_per_row, generator, module.weight.device)
    if learned is None:
        return False
    module.set_projector(learned.to(module.weight.device, module.weight.dtype))
    return True
