"""Refitter: renews projectors in the middle of training. Paper, Algorithm 1, MAYBEUPDATE.

A period has `check_every` steps. Linears that share Q are measured together, and learn together:

    its first step          the bias of a random eighth of the groups is measured on that step's own gradients
    the next few steps      their gradients also go into lessons of the groups with a matrix above the bound
    until half the period   a thread fits, beside the steps
    half the period         the new projectors take over, before the forward

All of it happens at steps that the configuration alone decides, so neither a schedule nor a slow thread changes values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean

import torch

from lsp_ray.device.fits import Fit
from lsp_ray.device.projected_linear import BiasProbe, InSubspace
from lsp_ray.device.rounding import mixed
from lsp_ray.device.step_report import BiasReport
from lsp_ray.device.switch import Group, Switch, Takeover, takes_over
from lsp_ray.device.unit import Unit
from lsp_ray.projection.sparse_projector import SparseProjector

SAMPLED_SHARE = 8  # one group in so many is measured in each period
_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class RefitState:
    """What is under way between two steps, by the number of the matrix: lessons, and projectors that wait to take over.

    The lessons' tensors are the Refitter's own.
    """

    lessons: Mapping[int, Mapping[str, torch.Tensor]]
    fitted: Mapping[int, SparseProjector]


class Refitter(Switch):
    """See the module's text.

    Args:
        units: The trained layers.
        fit: How projectors are learned.
        check_every: Steps of a period, more than twice `num_sketched`.
        max_bias: Bound of the relative bias (at its best scalar).
        num_sketched: Steps whose gradients a fit learns from.
        seed: Of samples, sketches and positions.
        on_takeover: Told what takes over, at every step in which something might.
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
        on_takeover: Callable[[Takeover], None] | None = None,
    ) -> None:
        super().__init__(units, check_every)
        assert num_sketched < check_every // 2, "the gradients of a refit must be there before it takes over"
        self._fit, self._max_bias = fit, max_bias
        self._num_sketched, self._seed, self._on_takeover = num_sketched, seed, on_takeover
        self._sampled: list[Group] = []
        self._learning: list[Group] = []
        self._fits: list[tuple[Group, Future[list[SparseProjector] | None]]] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="refit")

    def before_step(self, step: int) -> None:
        """Arm what observes this step; where new projectors take over in it, wait for them."""
        phase = step % self._check_every
        if step >= self._check_every and phase == 0:
            self._sampled = self._sample(step)
            for module in (module for group in self._sampled for module in group.modules):
                module.probe = BiasProbe()
        if takes_over(step, self._check_every):
            projectors: dict[int, SparseProjector] = {}
            for group, fit in self._fits:
                new = fit.result()  # done long ago, unless fitting is slower than half a period of steps
                projectors |= {site.key: own for site, own in zip(group.sites, new or (), strict=new is not None)}
            self._fits = []
            if self._on_takeover is not None:
                self._on_takeover(Takeover(step=step, projectors=projectors))
            self.take_over(projectors)

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
        for group in self.with_all(state.lessons):
            for site in group.sites:
                site.module.lesson = self._fit.lesson(site.module.projector.shape, torch.Generator())
                site.module.lesson.restore(state.lessons[site.key])
            self._learning.append(group)
        for group in self.with_all(state.fitted):
            done: Future[list[SparseProjector] | None] = Future()
            done.set_result([state.fitted[site.key] for site in group.sites])
            self._fits.append((group, done))

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
