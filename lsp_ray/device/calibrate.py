"""Fit projectors from gradients of a few micro-batches, before step 1."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch
from transformers import PreTrainedModel

from lsp_ray.device.fits import Fit
from lsp_ray.device.projected_linear import InSubspace, set_projectors
from lsp_ray.device.rounding import mixed
from lsp_ray.models.loss import Batch, num_targets, summed_loss
from lsp_ray.projection.sparse_projector import SparseProjector

_Named = tuple[str, InSubspace]
_Linear = TypeVar("_Linear", bound=InSubspace)

LESSON_BYTES = 1 << 30  # host memory for lessons: larger models calibrate in several passes over the batches


def fit_projectors(
    model: PreTrainedModel,
    linears: Sequence[tuple[str, InSubspace]],
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
        linears: Names and modules; each keeps the sizes of its projector, and those that share Q still do.
        batches: Calibration micro-batches, on any device.
        fit: How they learn.
        seed: Of sketches.
        num_threads: Groups of linears fitted at once.
        on_fitted: Called with the number of linears done and their total.

    Returns:
        Names of linears without a usable gradient (all zero or not finite); they keep the projector they had.
    """
    unfitted: list[str] = []
    done = 0

    def host_bytes(group: list[_Named]) -> int:
        return sum(fit.host_bytes(module.projector.shape, len(batches)) for _, module in group)

    for groups in passes(by_right_factor(linears), host_bytes):
        for key, (_, module) in enumerate((linear for group in groups for linear in group), start=done):
            module.lesson = fit.lesson(module.projector.shape, torch.Generator().manual_seed(mixed(seed, key)))
        _backward_all(model, [module for _, module in linears], batches)
        generators = [torch.Generator().manual_seed(mixed(seed, done, number)) for number in range(len(groups))]
        _load_linalg(next(model.parameters()).device)
        with _single_threaded(), ThreadPoolExecutor(num_threads) as executor:
            learned = executor.map(partial(_learned, fit), groups, generators)
            for group, projectors in zip(groups, learned, strict=True):
                if projectors is None:
                    unfitted += [name for name, _ in group]
                else:
                    set_projectors([module for _, module in group], projectors)
                done += len(group)
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


def by_right_factor(linears: Sequence[tuple[str, _Linear]]) -> list[list[tuple[str, _Linear]]]:
    """Linears that share Q, together."""
    groups: dict[int, list[tuple[str, _Linear]]] = {}
    for name, module in linears:
        groups.setdefault(id(module.projector.right), []).append((name, module))
    return list(groups.values())


def passes(
    groups: Sequence[list[tuple[str, _Linear]]], host_bytes: Callable[[list[tuple[str, _Linear]]], int]
) -> Iterator[list[list[tuple[str, _Linear]]]]:
    """Split into runs of groups that together remember LESSON_BYTES at most, one group at least."""
    run: list[list[tuple[str, _Linear]]] = []
    total_bytes = 0
    for group in groups:
        size_bytes = host_bytes(group)
        if run and total_bytes + size_bytes > LESSON_BYTES:
            yield run
            run, total_bytes = [], 0
        run.append(group)
        total_bytes += size_bytes
    if run:
        yield run


def _backward_all(model: PreTrainedModel, modules: Sequence[InSubspace], batches: Sequence[Batch]) -> None:
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


def _learned(fit: Fit, group: Sequence[_Named], generator: torch.Generator) -> list[SparseProjector] | None:
    lessons = [module.lesson for _, module in group if module.lesson is not None]
    for _, module in group:
        module.lesson = None
    device = group[0][1].projector.device
    return fit.learn(lessons, [module.projector.sizes for _, module in group], generator, device)
