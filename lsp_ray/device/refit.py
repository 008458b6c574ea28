"""Refitter: renews projectors in the middle of training. Paper, Algorithm 1, MAYBEUPDATE.

A period has `check_every` steps. Linears that share Q are measured together, and learn together:

    its first step          the bias of a random eighth of the groups is measured on that step's own gradients
    the next few steps      their gradients also go into lessons of the groups with a matrix above the bound
    until half the period   a thread fits, beside the steps
    half the period         the new projectors take over, before the forward

All of it happens at steps that the configuration alone decides, so neither a schedule nor a slow thread changes values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean

import torch

from lsp_ray.device.delta_linear import DeltaLinear
from lsp_ray.device.fits import Fit
from lsp_ray.device.projected_linear import BiasProbe, InSubspace, SubspaceTarget, on_device, set_projectors
from lsp_ray.device.rounding import mixed
from lsp_ray.device.unit import Unit
from lsp_ray.optim.reproject import Reprojection
from lsp_ray.projection.sparse_projector import SparseProjector
from lsp_ray.projection.transition import transition

SAMPLED_SHARE = 8  # one group in so many is measured in each period
_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class BiasReport:
    """Mean relative bias of the matrices measured in one step, and how many of them are refitted.

    `relative_by_unit` has the same of each unit with a matrix in the sample.
    """

    relative: float
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
    """A projected matrix and its place: its target's first payload element, its number."""

    module: InSubspace
    first: int
    key: int


@dataclass(frozen=True, slots=True)
class Group:
    """The matrices of a unit that share Q; `key` is the first one's."""

    unit: int
    sites: tuple[Site, ...]

    @property
    def key(self) -> int:
        """Numbers the group among all."""
        return self.sites[0].key

    @property
    def modules(self) -> list[InSubspace]:
        """The linears."""
        return [site.module for site in self.sites]


class Refitter:
    """See the module's text.

    Args:
        units: The trained layers.
        fit: How projectors are learned.
        check_every: Steps of a period, more than twice `num_sketched`.
        max_bias: Bound of the relative bias (at its best scalar).
        num_sketched: Steps whose gradients a fit learns from.
        seed: Of samples, sketches and positions.
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
    ) -> None:
        assert num_sketched < check_every // 2, "the gradients of a refit must be there before it takes over"
        self._fit, self._check_every, self._max_bias = fit, check_every, max_bias
        self._num_sketched, self._seed = num_sketched, seed
        self._groups = _groups(units)
        self._sampled: list[Group] = []
        self._learning: list[Group] = []
        self._fits: list[tuple[Group, Future[list[SparseProjector] | None]]] = []
        self._takeovers: dict[int, list[tuple[Group, list[SparseProjector]]]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="refit")

    def before_step(self, step: int) -> None:
        """Arm what observes this step; where new projectors take over in it, wait for them."""
        phase = step % self._check_every
        if step >= self._check_every and phase == 0:
            self._sampled = self._sample(step)
            for module in (module for group in self._sampled for module in group.modules):
                module.probe = BiasProbe()
        if phase == self._check_every // 2:
            for group, fit in self._fits:
                new = fit.result()  # done long ago, unless fitting is slower than half a period of steps
                if new is not None:
                    self._takeovers.setdefault(group.unit, []).append((group, new))
            self._fits = []

    @contextmanager
    def looking_away(self) -> Iterator[None]:
        """Within the context nothing observes what passes through the linears."""
        modules = [module for group in (*self._sampled, *self._learning) for module in group.modules]
        observers = [(module.lesson, module.probe) for module in modules]
        for module in modules:
            module.lesson = module.probe = None
        yield
        for module, (lesson, probe) in zip(modules, observers, strict=True):
            module.lesson, module.probe = lesson, probe

    def has_new(self, unit: int) -> bool:
        """Whether `switch` would change anything."""
        return unit in self._takeovers

    def switch(self, unit: int) -> tuple[Reprojection, ...]:
        """Give the unit's matrices their new projectors, if there are any; what is returned its shard must follow.

        To be called once the deltas made for the old projectors are added, before the forward.
        """
        switched = []
        for group, new in self._takeovers.pop(unit, ()):
            projectors = on_device(group.modules, new)
            right_HRR = transition(group.modules[0].projector.right, projectors[0].right)
            for site, projector in zip(group.sites, projectors, strict=True):
                left_GRR = transition(site.module.projector.left, projector.left)
                switched.append(Reprojection(first=site.first, left_GRR=left_GRR, right_HRR=right_HRR))
            for module in group.modules:
                if isinstance(module, DeltaLinear):
                    module.merge_()
            set_projectors(group.modules, projectors)
        return tuple(switched)

    def after_step(self, step: int) -> BiasReport | None:
        """Read what observed this step; returns the bias where it was measured."""
        phase = step % self._check_every
        if phase == self._num_sketched and self._learning:
            self._start_fits(step)
        if not self._sampled:
            return None
        sampled, self._sampled = self._sampled, []
        found: list[tuple[int, float]] = []
        for group in sampled:
            biases = [bias for module in group.modules if (bias := _read_probe(module)) is not None]
            found += [(group.unit, bias) for bias in biases]
            if max(biases, default=0.0) > self._max_bias:
                self._learning.append(group)
                for site in group.sites:
                    generator = self._generator(step, site.key, 0)
                    site.module.lesson = self._fit.lesson(site.module.projector.shape, generator)
        return _report(found, sum(len(group.sites) for group in self._learning))

    def state(self) -> RefitState:
        """Return what is under way; waits for fits that still run."""
        fitted = [(group, fit.result()) for group, fit in self._fits]
        sites = [site for group in self._learning for site in group.sites]
        return RefitState(
            lessons={site.key: site.module.lesson.state() for site in sites if site.module.lesson},
            fitted={
                site.key: projector
                for group, projectors in fitted
                for site, projector in zip(group.sites, projectors or (), strict=projectors is not None)
            },
        )

    def restore(self, state: RefitState) -> None:
        """Go on where another Refitter was between two steps.

        Raises:
            ValueError: Its matrices were others.
        """
        for group in self._with_all(state.lessons):
            for site in group.sites:
                site.module.lesson = self._fit.lesson(site.module.projector.shape, torch.Generator())
                site.module.lesson.restore(state.lessons[site.key])
            self._learning.append(group)
        for group in self._with_all(state.fitted):
            done: Future[list[SparseProjector] | None] = Future()
            done.set_result([state.fitted[site.key] for site in group.sites])
            self._fits.append((group, done))

    def projector(self, key: int) -> SparseProjector:
        """The projector in use of the matrix with this number.

        Raises:
            ValueError: There is none.
        """
        for site in (site for group in self._groups for site in group.sites):
            if site.key == key:
                return site.module.projector
        raise ValueError(f"there is no matrix {key}")

    def _with_all(self, keys: Mapping[int, object]) -> list[Group]:
        """The groups that these numbers make up, in the order of the first ones."""
        groups = [group for group in self._groups if any(site.key in keys for site in group.sites)]
        if {site.key for group in groups for site in group.sites} != set(keys):
            raise ValueError("linears that shared an input no longer do")
        return sorted(groups, key=lambda group: list(keys).index(group.key))

    def _sample(self, step: int) -> list[Group]:
        order = torch.randperm(len(self._groups), generator=self._generator(step))
        return [self._groups[int(index)] for index in order[: -(-len(self._groups) // SAMPLED_SHARE)]]

    def _start_fits(self, step: int) -> None:
        for group in self._learning:
            lessons = [module.lesson for module in group.modules if module.lesson is not None]
            for module in group.modules:
                module.lesson = None
            sizes = [module.projector.sizes for module in group.modules]
            fit = self._thread.submit(self._fit.learn, lessons, sizes, self._generator(step, group.key, 1), _CPU)
            self._fits.append((group, fit))
        self._learning = []

    def _generator(self, *numbers: int) -> torch.Generator:
        return torch.Generator().manual_seed(mixed(self._seed, *numbers))


def _groups(units: Sequence[Unit]) -> list[Group]:
    groups: dict[tuple[int, int], list[Site]] = {}
    num_sites = 0
    for unit in units:
        for first, target in zip(unit.offsets, unit.targets, strict=True):
            if isinstance(target, SubspaceTarget):
                site = Site(target.owner, first, num_sites)
                groups.setdefault((unit.index, id(target.owner.projector.right)), []).append(site)
                num_sites += 1
    return [Group(unit, tuple(sites)) for (unit, _), sites in groups.items()]


def _read_probe(module: InSubspace) -> float | None:
    probe, module.probe = module.probe, None
    return None if probe is None else probe.read()


def _report(found: Sequence[tuple[int, float]], num_refitted: int) -> BiasReport | None:
    """Of biases by unit."""
    if not found:
        return None
    units = sorted({unit for unit, _ in found})
    return BiasReport(
        relative=fmean(bias for _, bias in found),
        relative_by_unit={unit: fmean(bias for where, bias in found if where == unit) for unit in units},
        num_measured=len(found),
        num_refitted=num_refitted,
    )
