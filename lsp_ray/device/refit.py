"""Refitter: measure bias every so often and refit what exceeds a bound, while training goes on. Paper, MAYBEUPDATE.

A period of `check_every` steps:

    its first step          the bias of a random eighth of the matrices is measured on that step's own gradients
    the next few steps      their gradients also go into lessons of the matrices above the bound
    until half the period   a thread fits, beside the steps
    half the period         the new projectors take over, before the forward

All of it happens at steps that the configuration alone decides, so neither a schedule nor a slow thread changes values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from statistics import fmean

import torch

from lsp_ray.device.fits import Fit
from lsp_ray.device.projected_linear import BiasProbe, ProjectedLinear, ProjectedTarget
from lsp_ray.device.rounding import mixed
from lsp_ray.device.unit import Unit
from lsp_ray.projection.bias import Bias
from lsp_ray.projection.reproject import Reprojection
from lsp_ray.projection.sparse_projector import SparseProjector

SAMPLED_SHARE = 8  # one matrix in so many is measured in each period


@dataclass(frozen=True, slots=True, kw_only=True)
class BiasReport:
    """Means over the matrices measured in one step, and how many of them are refitted.

    `relative_by_unit` has the relative bias alone, of the units with a matrix in the sample.
    """

    bias: Bias
    relative_by_unit: dict[int, float]
    num_measured: int
    num_refitted: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RefitState:
    """What is under way between two steps, by the number of the matrix: lessons, and projectors that wait to take over.

    The lessons' tensors are the Refitter's own.
    """

    lessons: Mapping[int, Mapping[str, torch.Tensor]]
    fitted: Mapping[int, SparseProjector]


@dataclass(frozen=True, slots=True)
class Site:
    """A projected matrix and its place: the unit's index, its target's first payload element, its number."""

    module: ProjectedLinear
    unit: int
    first: int
    key: int


class Refitter:
    """See the module's text.

    Args:
        units: The trained layers.
        fit: How projectors are learned.
        check_every: Steps of a period, more than twice `num_sketched`.
        max_bias: Bound of the relative bias (at its best scalar).
        num_sketched: Steps whose gradients a fit learns from.
        seed: Of samples, sketches and positions.
        whitened: Whether the shards whiten, which makes the bias less.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        fit: Fit,
        *,
        check_every: int,
        max_bias: float,
        num_sketched: int,
        seed: int,
        whitened: bool,
    ) -> None:
        assert num_sketched < check_every // 2, "the gradients of a refit must be there before it takes over"
        self._fit, self._check_every, self._max_bias = fit, check_every, max_bias
        self._num_sketched, self._seed = num_sketched, seed
        self._whitened = whitened
        self._sites = _sites(units)
        self._sampled: list[Site] = []
        self._learning: list[Site] = []
        self._fits: list[tuple[Site, Future[SparseProjector | None]]] = []
        self._takeovers: dict[int, list[tuple[Site, SparseProjector]]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="refit")

    def before_step(self, step: int) -> None:
        """Arm what observes this step; where new projectors take over in it, wait for them."""
        phase = step % self._check_every
        if step >= self._check_every and phase == 0:
            self._sampled = self._sample(step)
            for site in self._sampled:
                site.module.probe = BiasProbe()
        if phase == self._check_every // 2:
            for site, fit in self._fits:
                new = fit.result()  # done long ago, unless fitting is slower than half a period of steps
                if new is not None:
                    self._takeovers.setdefault(site.unit, []).append((site, new))
            self._fits = []

    def has_new(self, unit: int) -> bool:
        """Whether `switch` would change anything."""
        return unit in self._takeovers

    def switch(self, unit: int) -> tuple[Reprojection, ...]:
        """Give the unit's matrices their new projectors, if there are any; what is returned its shard must follow.

        To be called once the deltas made for the old projectors are added, before the forward.
        """
        switched = []
        for site, new in self._takeovers.pop(unit, ()):
            old, weight = site.module.projector, site.module.weight
            site.module.set_projector(new.to(weight.device, weight.dtype))
            host = torch.device("cpu")
            switched.append(Reprojection(first=site.first, old=old.to(host), new=site.module.projector.to(host)))
        return tuple(switched)

    def after_step(self, step: int) -> BiasReport | None:
        """Read what observed this step; returns the bias where it was measured."""
        phase = step % self._check_every
        if phase == self._num_sketched and self._learning:
            self._start_fits(step)
        if not self._sampled:
            return None
        sampled, self._sampled = self._sampled, []
        found: list[tuple[Site, Bias]] = []
        for site in sampled:
            probe, site.module.probe = site.module.probe, None
            bias = probe.read(site.module.projector, whitened=self._whitened) if probe else None
            if bias is None:
                continue
            found.append((site, bias))
            if bias.relative > self._max_bias:
                self._learning.append(site)
                projector, generator = site.module.projector, self._generator(step, site.key, 0)
                site.module.lesson = self._fit.lesson(projector.shape, projector.dim, generator)
        return _report(found, len(self._learning))

    def state(self) -> RefitState:
        """Return what is under way; waits for fits that still run."""
        fitted = {site.key: fit.result() for site, fit in self._fits}
        return RefitState(
            lessons={site.key: site.module.lesson.state() for site in self._learning if site.module.lesson},
            fitted={key: projector for key, projector in fitted.items() if projector is not None},
        )

    def restore(self, state: RefitState) -> None:
        """Go on where another Refitter was between two steps.

        Raises:
            ValueError: Its matrices were others.
        """
        for key, tensors in state.lessons.items():
            site = self.site(key)
            projector = site.module.projector
            site.module.lesson = self._fit.lesson(projector.shape, projector.dim, torch.Generator())
            site.module.lesson.restore(tensors)
            self._learning.append(site)
        for key, projector in state.fitted.items():
            done: Future[SparseProjector | None] = Future()
            done.set_result(projector)
            self._fits.append((self.site(key), done))

    def site(self, key: int) -> Site:
        """The matrix with this number.

        Raises:
            ValueError: There is none.
        """
        if not 0 <= key < len(self._sites):
            raise ValueError(f"matrix {key} of {len(self._sites)}")
        return self._sites[key]

    def _sample(self, step: int) -> list[Site]:
        order = torch.randperm(len(self._sites), generator=self._generator(step))
        return [self._sites[int(index)] for index in order[: -(-len(self._sites) // SAMPLED_SHARE)]]

    def _start_fits(self, step: int) -> None:
        for site in self._learning:
            lesson, site.module.lesson = site.module.lesson, None
            assert lesson is not None
            old, generator = site.module.projector, self._generator(step, site.key, 1)
            fit = self._thread.submit(lesson.learn, old.dim, old.left.nnz_per_row, generator, torch.device("cpu"))
            self._fits.append((site, fit))
        self._learning = []

    def _generator(self, *numbers: int) -> torch.Generator:
        return torch.Generator().manual_seed(mixed(self._seed, *numbers))


def _sites(units: Sequence[Unit]) -> list[Site]:
    places = [
        (target.owner, unit.index, first)
        for unit in units
        for first, target in zip(unit.offsets, unit.targets, strict=True)
        if isinstance(target, ProjectedTarget)
    ]
    return [Site(*place, key) for key, place in enumerate(places)]


def _report(found: Sequence[tuple[Site, Bias]], num_refitted: int) -> BiasReport | None:
    if not found:
        return None
    mean = Bias(
        raw=fmean(bias.raw for _, bias in found),
        relative=fmean(bias.relative for _, bias in found),
        cosine=fmean(bias.cosine for _, bias in found),
    )
    units = sorted({site.unit for site, _ in found})
    by_unit = {unit: fmean(bias.relative for site, bias in found if site.unit == unit) for unit in units}
    return BiasReport(bias=mean, relative_by_unit=by_unit, num_measured=len(found), num_refitted=num_refitted)
