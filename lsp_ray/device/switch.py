"""Switch: lets new projectors take over in the middle of training, whoever learned them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lsp_ray.device.delta_linear import DeltaLinear
from lsp_ray.device.projected_linear import InSubspace, SubspaceTarget, on_device, set_projectors
from lsp_ray.device.unit import Unit
from lsp_ray.optim.reproject import Reprojection
from lsp_ray.projection.sparse_projector import SparseProjector
from lsp_ray.projection.transition import transition


@dataclass(frozen=True, slots=True, kw_only=True)
class Takeover:
    """The projectors that take over in a step, by the number of the matrix; often none."""

    step: int
    projectors: Mapping[int, SparseProjector]


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


def takes_over(step: int, check_every: int) -> bool:
    """Whether new projectors take over in this step, if there are any."""
    return step >= check_every and step % check_every == check_every // 2


class Switch:
    """The groups of matrices that learn together, and the projectors that wait to take over.

    Args:
        units: The trained layers.
        check_every: Steps of a period, in whose middle projectors take over.
    """

    def __init__(self, units: Sequence[Unit], check_every: int) -> None:
        self._check_every = check_every
        self._groups = _groups(units)
        self._takeovers: dict[int, list[tuple[Group, list[SparseProjector]]]] = {}

    def take_over(self, projectors: Mapping[int, SparseProjector]) -> None:
        """Let these be the next ones of the matrices with these numbers, of whole groups; see `switch`."""
        for group in self.with_all(projectors):
            new = [projectors[site.key] for site in group.sites]
            self._takeovers.setdefault(group.unit, []).append((group, new))

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

    def projector(self, key: int) -> SparseProjector:
        """The projector in use of the matrix with this number.

        Raises:
            ValueError: There is none.
        """
        for site in (site for group in self._groups for site in group.sites):
            if site.key == key:
                return site.module.projector
        raise ValueError(f"there is no matrix {key}")

    def with_all(self, keys: Mapping[int, object]) -> list[Group]:
        """The groups that these numbers make up, in the order of the first ones."""
        groups = [group for group in self._groups if any(site.key in keys for site in group.sites)]
        if {site.key for group in groups for site in group.sites} != set(keys):
            raise ValueError("linears that shared an input no longer do")
        return sorted(groups, key=lambda group: list(keys).index(group.key))


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
